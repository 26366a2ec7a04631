"""Which device nodes a container may have."""

from __future__ import annotations

import pytest

from smr.images.tar import Entry, Kind
from smr.proto.oci import parse_spec
from smr.shim.device_rules import usable

DEFAULT: list[dict[str, object]] = [
    {"allow": False, "access": "rwm"},
    {"allow": True, "type": "c", "access": "m"},
    {"allow": True, "type": "b", "access": "m"},
    {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rwm"},
]
PRIVILEGED: list[dict[str, object]] = [{"allow": True, "access": "rwm"}]


@pytest.mark.parametrize(
    ("rules", "kind", "device", "allowed"),
    [
        (DEFAULT, Kind.CHAR, (1, 3), True),
        (DEFAULT, Kind.CHAR, (136, 7), True),
        (DEFAULT, Kind.CHAR, (10, 229), True),
        (DEFAULT, Kind.CHAR, (10, 200), False),
        (DEFAULT, Kind.BLOCK, (8, 0), False),
        (DEFAULT, Kind.BLOCK, (1, 3), False),
        ([], Kind.BLOCK, (8, 0), False),
        (PRIVILEGED, Kind.BLOCK, (8, 0), True),
        (PRIVILEGED, Kind.CHAR, (0, 0), False),
        ([*PRIVILEGED, {"allow": False, "type": "b", "major": 8, "access": "rwm"}], Kind.BLOCK, (8, 0), False),
    ],
)
def test_the_last_rule_that_fits_decides(rules: list[object], kind: Kind, device: tuple[int, int], allowed: bool) -> None:
    """A node may be in a root when its container may open it; the right to make nodes alone is not enough."""
    spec = parse_spec({"linux": {"resources": {"devices": rules}}})
    assert usable(spec)(Entry(name="n", kind=kind, device=device)) is allowed
