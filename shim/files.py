"""Files written whole or not at all, and trees removed without ever leaving their file system."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path


def write_atomic(path: Path, data: bytes, *, mode: int = 0o600, durable: bool = True) -> None:
    """Replace `path` by `data`: temporary sibling, fsync, rename, fsync of the folder. `durable=False` skips both fsyncs."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_tree(path: Path, *, keep_root: bool = False) -> None:
    """Remove a directory and what is in it, but nothing that is mounted there: shutil.rmtree would empty the mount.

    Raises OSError (EBUSY, ENOTEMPTY) when something is mounted inside, after removing the rest. A missing path is no error.
    """
    from smr.shim import mountinfo

    if any(point.startswith(f"{path.resolve()}/") for point in mountinfo.points()):
        raise OSError(errno.EBUSY, "something is mounted in it", str(path))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        _empty(fd, os.fstat(fd).st_dev)
    finally:
        os.close(fd)
    if not keep_root:
        path.rmdir()


def _empty(fd: int, device: int) -> None:
    for name in os.listdir(fd):  # by descriptor
        if not stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=fd)
            continue
        child = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        try:
            if os.fstat(child).st_dev == device:
                _empty(child, device)
        finally:
            os.close(child)
        os.rmdir(name, dir_fd=fd)


def drop_tree(path: Path) -> None:
    """`remove_tree`, where what cannot be removed is left for the next sweep."""
    with contextlib.suppress(OSError):
        remove_tree(path)
