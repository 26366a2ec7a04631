"""User namespaces: the map of the new container takes the place of the checkpoint's.

CRIU keeps ids as the container sees them and the map apart, in userns-N.img, from which it makes the namespace. The engine has
given the new container's files to the ids of its own map, so that is the map that must be made: it is written into the image. The
layer of the checkpoint's files has the host's ids, and is moved from one map to the other (`shifts`).
A map that lacks ids which the old one had cannot hold the processes, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec, as_list, as_object


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A line of a map: `count` ids from `inside` in the container are those from `outside` on the host."""

    inside: int
    outside: int
    count: int


Map = tuple[Extent, ...]


def maps(spec: Spec) -> tuple[Map, Map]:
    """`linux.uidMappings` and `linux.gidMappings`, sorted."""
    linux = as_object(spec.document.get("linux"), "linux")
    return _map(linux, "uidMappings"), _map(linux, "gidMappings")


def check(old: Spec, new: Spec) -> None:
    """Raise NAMESPACE_MISMATCH when the new container's user namespace lacks ids that the checkpoint's has."""
    if "user" not in old.namespaces or "user" not in new.namespaces:
        return  # whether there is one is compared with the other namespaces
    for kind, before, now in zip(("user", "group"), maps(old), maps(new), strict=True):
        lost = _lost(before, now)
        if before and now and lost is not None:
            raise SmrError(
                f"the user namespace has no {kind} id {lost}: found {_shown(now)}, needed the checkpoint's {_shown(before)}",
                hint="give the container as many ids: --userns=auto:size=N, --uidmap, --subuidname",
                code=Code.NAMESPACE_MISMATCH,
            )


def differ(old: Spec, new: Spec) -> bool:
    """Whether both have maps, and other ones."""
    return all(any(maps(spec)) for spec in (old, new)) and maps(old) != maps(new)


def adapt(folder: Path, old: Spec, new: Spec) -> None:
    """Write the new container's map into CRIU's images in `folder`. Raises IMAGE_CORRUPT."""
    if not differ(old, new):
        return
    from smr.images.criu_files import read_image_file, read_message, write_messages
    from smr.proto.criu import identity_pb2

    for path in folder.glob("userns-*.img"):
        entry = read_message(path, identity_pb2.UsernsEntry)
        for name, extents in zip(("uid_map", "gid_map"), maps(new), strict=True):
            entry.ClearField(name)
            for one in extents:
                getattr(entry, name).add(first=one.inside, lower_first=one.outside, count=one.count)
        write_messages(path, read_image_file(path)[:8], [entry])


def shifts(old: Spec, new: Spec) -> tuple[Callable[[int], int], Callable[[int], int]] | None:
    """How the host's user and group ids of the checkpoint's files become those of the new container; None where they stay."""
    if not differ(old, new):
        return None
    (old_uids, old_gids), (new_uids, new_gids) = maps(old), maps(new)
    return lambda uid: _shift(uid, old_uids, new_uids), lambda gid: _shift(gid, old_gids, new_gids)


def _shift(value: int, before: Sequence[Extent], now: Sequence[Extent]) -> int:
    inside = next((one.inside + value - one.outside for one in before if 0 <= value - one.outside < one.count), None)
    if inside is None:
        return value  # nobody of the container's
    return next((one.outside + inside - one.inside for one in now if 0 <= inside - one.inside < one.count), value)


def _lost(before: Map, now: Map) -> int | None:
    """The first id of one map that the other lacks; extents of a map do not overlap."""
    for one in before:
        at = one.inside
        while at < one.inside + one.count:
            holder = next((other for other in now if other.inside <= at < other.inside + other.count), None)
            if holder is None:
                return at
            at = holder.inside + holder.count
    return None


def _map(linux: dict[str, object], key: str) -> Map:
    entries = [as_object(entry, f"linux.{key}[]") for entry in as_list(linux.get(key), f"linux.{key}")]
    found = (
        Extent(
            inside=int(str(one.get("containerID", 0))), outside=int(str(one.get("hostID", 0))), count=int(str(one.get("size", 0)))
        )
        for one in entries
    )
    return tuple(sorted(found, key=lambda extent: extent.inside))


def _shown(extents: Map) -> str:
    return ", ".join(f"{one.inside}:{one.outside}:{one.count}" for one in extents)
