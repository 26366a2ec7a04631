"""Facts read out of others' formats."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smr.images.archive_facts import addresses_of, annotation, criu_version, pause_s, wire_fields
from smr.proto.errors import SmrError
from tests.tar_support import criu_image


@pytest.mark.parametrize(
    ("number", "version"), [("40101", "4.1.1"), ("40000", "4.0"), ("31801", "3.18.1"), ("4.2", "4.2"), ("", "")]
)
def test_criu_versions(number: str, version: str) -> None:
    """podman and CRI-O write CRIU's version as one number, checkpointctl as text."""
    assert criu_version(number) == version


def test_annotations_of_any_family() -> None:
    """A fact is found under whichever prefix it stands; checkpointctl's is preferred."""
    assert annotation({"io.kubernetes.cri-o.annotations.checkpoint.name": "a"}, "name") == "a"
    assert annotation({"io.podman.annotations.checkpoint.name": "b", "org.criu.checkpoint.name": "c"}, "name") == "c"
    assert annotation({}, "name") == ""


def test_addresses_of_all_networks() -> None:
    """Every interface of every network counts; null is what podman writes without one."""
    subnets = {"subnets": [{"ipnet": "10.1.0.2/24"}, {"ipnet": "fd00::2/64"}]}
    assert addresses_of({"a": {"interfaces": {"eth0": subnets}}, "b": {}}) == ("10.1.0.2", "fd00::2")
    assert addresses_of(None) == ()
    with pytest.raises(SmrError):
        addresses_of([1])


def test_the_pause_is_read_from_crius_statistics(tmp_path: Path) -> None:
    """frozen_time is in microseconds; a file that is missing or no statistics gives no pause."""
    dump = b"\x08\x05\x10\xc0\x84\x3d"
    (tmp_path / "stats-dump").write_bytes(criu_image(b"\x0a" + bytes([len(dump)]) + dump))
    assert pause_s(tmp_path / "stats-dump") == 1.0
    (tmp_path / "bad").write_bytes(b"\x0a\x05")
    assert pause_s(tmp_path / "bad") == 0.0
    assert pause_s(tmp_path / "missing") == 0.0


@given(data=st.binary(max_size=200))
def test_any_bytes_are_fields_or_a_value_error(data: bytes) -> None:
    """The reader of protobuf's wire format raises nothing else, and ends."""
    try:
        fields = list(wire_fields(data))
    except ValueError:
        return
    assert all(number >= 0 for number, _ in fields)
