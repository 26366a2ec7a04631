"""Which devices a container may open, by the rules of its spec: a device node that it could not use need not be in its root.

`linux.resources.devices` is a list in which the last rule that fits decides; runc and crun put the devices that every container
has (null, zero, full, random, urandom, tty, ptmx, pseudo terminals) behind it. Making a node (`m`) is not using it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from smr.proto.oci import Spec, as_list, as_object

if TYPE_CHECKING:
    from smr.images.tar import Entry

_ALWAYS = frozenset({(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)})
_PTS = 136


def usable(spec: Spec) -> Callable[[Entry], bool]:
    """Whether a container of `spec` may read or write the device of a tar entry."""
    resources = as_object(as_object(spec.document.get("linux"), "linux").get("resources"), "linux.resources")
    rules = [
        as_object(rule, "linux.resources.devices[]") for rule in as_list(resources.get("devices"), "linux.resources.devices")
    ]

    def allowed(entry: Entry) -> bool:
        kind = "c" if entry.kind.name == "CHAR" else "b"
        if kind == "c" and (entry.device in _ALWAYS or entry.device[0] == _PTS):
            return True
        if entry.device == (0, 0):  # overlayfs's whiteout: no device at all
            return False
        fitting = [rule for rule in rules if _fits(rule, kind, entry.device)]
        return bool(fitting) and bool(fitting[-1].get("allow"))

    return allowed


def _fits(rule: Mapping[str, object], kind: str, device: tuple[int, int]) -> bool:
    """Of rules that allow, only those of more than making a node count; a rule without access or numbers is for all."""
    access = str(rule.get("access") or "rwm")
    if not set(access) & {"r", "w"}:
        return False
    numbers = (rule.get("major"), rule.get("minor"))
    same = all(number in (None, -1, wanted) for number, wanted in zip(numbers, device, strict=True))
    return same and rule.get("type") in (None, "", "a", kind)
