"""What the host has mounted below the source of a recursive bind mount: it is in the container, and in no spec.

CRIU takes such a mount for the container's own and cannot dump it, so a dump names each as external, by its path in the
container; the image has them among its external mounts. At a restore each is bound from the same place below the new source,
whether or not something is mounted there. What the new source has more of is given as other extra mounts are
(smr.shim.extra_mounts).

A runtime that restores binds the sources into the root for a moment, on the host, and unmounts them recursively. Where the host's
mounts are shared, as systemd has them, that unmounts what is below the source itself (seen with runc 1.1.5 and 1.3.6). So with
such a source it restores in a mount namespace of its own.
"""

from __future__ import annotations

import ctypes
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from smr.proto.annotations import Annotations
from smr.proto.checkpoint import CheckpointConfig
from smr.proto.mount_list import clean
from smr.proto.oci import Mount, Spec
from smr.shim import criu, mounts
from smr.shim.mountinfo import unescape

_CLONE_NEWNS, _MS_REC, _MS_SLAVE = 0x20000, 1 << 14, 1 << 19


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of a mountinfo: where, and what: the file system's number and the folder of it."""

    point: str
    what: tuple[str, str]


def of_container(pid: int, spec: Spec, rootfs: Path) -> tuple[str, ...]:
    """Paths in the container of `pid` of mounts that came along with the sources of its binds."""
    inside = {line.point: line.what for line in _lines(Path(f"/proc/{pid}/mountinfo"))}
    real = {destination: path for path, destination in mounts.bound_paths(spec, rootfs).items()}
    named = set(real) | set(real.values())
    found: dict[str, None] = {}
    for mount, line in _below(spec.mounts):
        destination = clean(mount.destination)
        point = posixpath.join(real.get(destination, destination), posixpath.relpath(line.point, mount.source))
        if point not in named and inside.get(point) == line.what:
            found[point] = None
    return tuple(found)


def dump_externals(points: Iterable[str]) -> dict[str, str]:
    """CRIU's options of a dump that name them."""
    return criu.external_mounts({point: point for point in points})


def restore_externals(config: CheckpointConfig, spec: Spec, annotations: Annotations) -> dict[str, str]:
    """CRIU's options of a restore: what takes their place below the new sources."""
    given = mounts.by_destination(spec, annotations)
    nodes = mounts.of_node(config)
    names = [one for one in config.external_mounts if clean(one) not in given and not nodes(one)]
    sources = {one: mounts.source_below(one, given) for one in names}
    return criu.external_mounts({one: source for one, source in sources.items() if source})


def more(wanted: Iterable[Mount], there: Mapping[str, object]) -> list[Mount]:
    """What the host has mounted below the sources of these binds and the container, whose mount points are `there`, has not."""
    found = []
    for mount, line in _below(wanted):
        destination = posixpath.join(clean(mount.destination), posixpath.relpath(line.point, mount.source))
        if clean(mount.destination) in there and destination not in there:
            found.append(Mount(destination=destination, type="bind", source=line.point, options=mount.options))
    return found


def any_below(spec: Spec, annotations: Annotations) -> bool:
    """Whether some source of this container's mounts has mounts below."""
    return next(_below(mounts.asked_mounts(spec, annotations)), None) is not None


def leave_mounts() -> Callable[[], None]:
    """What a child process calls to have mounts of its own, into which the host's still propagate. Raises OSError there."""
    libc = ctypes.CDLL(None, use_errno=True)

    def leave() -> None:
        if libc.unshare(_CLONE_NEWNS) != 0 or libc.mount(b"none", b"/", None, _MS_REC | _MS_SLAVE, None) != 0:
            raise OSError(ctypes.get_errno(), "no mount namespace")

    return leave


def _below(wanted: Iterable[Mount]) -> Iterator[tuple[Mount, _Line]]:
    """Each recursive bind with a mount of ours below its source; one that another lies over is left out."""
    recursive = [mount for mount in wanted if mount.is_bind and "rbind" in mount.options and os.path.isdir(mount.source)]  # noqa: PTH112
    own = {line.point: line for line in _lines(Path("/proc/self/mountinfo"))} if recursive else {}
    for mount in recursive:
        source = mount.source.rstrip("/")
        if source:
            yield from ((mount, line) for point, line in own.items() if point.startswith(f"{source}/"))


def _lines(path: Path) -> Iterator[_Line]:
    for text in path.read_text(errors="surrogateescape").split("\n"):
        words = text.split(" ")
        if len(words) > 5:
            yield _Line(unescape(words[4]), (words[2], unescape(words[3])))
