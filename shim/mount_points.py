"""Mount points in a container's root: found below it, and made where they are missing, as runtimes do.

Paths are the container's; symbolic links are followed within its root. Some of this runs in a thread in the container's mount
namespace, where an import would look into the container: there are none within functions.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from smr.proto.annotations import Annotations
from smr.proto.checkpoint import CheckpointConfig
from smr.proto.mount_list import clean
from smr.proto.oci import Spec
from smr.shim import mounts
from smr.shim.inside import open_in_root


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Ids of the host's that new mount points belong to."""

    uid: int = 0
    gid: int = 0


def owner_of(pid: int) -> Owner:
    """The container's root, as the host knows it; ours where the container has none."""
    return Owner(uid=_container_root(pid, "uid_map"), gid=_container_root(pid, "gid_map"))


def prepare(config: CheckpointConfig, spec: Spec, annotations: Annotations, rootfs: str) -> None:
    """Make the points of the checkpoint's mounts that will lie below an extra one: CRIU has only the root to mount them in."""
    given = {clean(mount.destination): mount for mount in mounts.asked_mounts(spec, annotations)}
    external = {clean(destination) for destination in config.external_mounts}
    extra = [one for one in given if one not in external]
    below = [one for one in sorted(external & given.keys()) if any(one.startswith(f"{above}/") for above in extra)]
    if not below:
        return
    root = os.open(rootfs, os.O_PATH | os.O_CLOEXEC)
    try:
        for destination in below:
            os.close(make_point(root, destination, directory=Path(given[destination].source).is_dir()))
    finally:
        os.close(root)


def make_point(root: int, path: str, *, directory: bool, owner: Owner | None = None, outside: int = -1) -> int:
    """An open path of the mount point `path` below the directory `root`, made where it is missing.

    `outside`: the host's side of a root that is read-only inside. Raises OSError.
    """
    with contextlib.suppress(FileNotFoundError):
        return open_in_root(root, path, os.O_PATH, symlinks=True)
    above, name = posixpath.split(path)
    parent = make_point(root, above, directory=True, owner=owner, outside=outside)
    try:
        if outside < 0 or not os.fstatvfs(parent).f_flag & os.ST_RDONLY:
            _make(parent, name, directory=directory, owner=owner)
        else:
            with found(outside, above) as there:
                _make(there, name, directory=directory, owner=owner)
    finally:
        os.close(parent)
    return open_in_root(root, path, os.O_PATH, symlinks=True)


@contextlib.contextmanager
def found(root: int, path: str) -> Iterator[int]:
    """An open path of what is at `path` below the directory `root`. Raises OSError."""
    fd = open_in_root(root, path, os.O_PATH, symlinks=True)
    try:
        yield fd
    finally:
        os.close(fd)


def _make(parent: int, name: str, *, directory: bool, owner: Owner | None) -> None:
    """With the file system ids of the owner, which are this thread's: a user namespace's mounts take no files of ids it lacks."""
    libc = ctypes.CDLL(None)
    if owner is not None:
        libc.setfsgid(ctypes.c_uint(owner.gid))
        libc.setfsuid(ctypes.c_uint(owner.uid))
    try:
        if directory:
            os.mkdir(name, 0o755, dir_fd=parent)
        else:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=parent))
    finally:
        if owner is not None:
            libc.setfsuid(ctypes.c_uint(os.geteuid()))
            libc.setfsgid(ctypes.c_uint(os.getegid()))


def _container_root(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/{name}").read_text().splitlines():
        inside, outside, count = (int(word) for word in line.split())
        if inside <= 0 < inside + count:
            return outside - inside
    return 0
