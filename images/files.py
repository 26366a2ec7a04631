"""File primitives of the store: locks by flock, atomic writes, and disk errors said in words.

Locks are `flock` on an open file description: they end with their holder, also by kill -9, and never go stale. Python opens
files close-on-exec, so no child program keeps one. Standard library only, and no heavy part of it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from smr.proto.errors import Code, SmrError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_POLL_S = 0.02


def disk_full(path: Path, needed_bytes: int = 0) -> SmrError:
    """The error for a full file system (or quota) at `path`; `needed_bytes` is 0 where nobody knows."""
    free = _free_bytes(path)
    needed = f"needed {needed_bytes} bytes, " if needed_bytes else ""
    return SmrError(
        f"no space left on the file system of {path}: {needed}found {free} bytes free",
        hint="'smr images gc' drops what no image needs, 'smr images rm IMAGE' an image; or put the store on a larger disk",
        code=Code.DISK_FULL,
        path=path,
        needed_bytes=needed_bytes,
        free_bytes=free,
    )


@contextmanager
def writing(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn what the disk says against writing at `path` into DISK_FULL or PERMISSION; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise disk_full(path, needed_bytes) from error
        if error.errno in _REFUSED:
            raise SmrError(
                f"cannot write {path}: {error.strerror}",
                hint="run as the owner of the store (root)",
                code=Code.PERMISSION,
                path=path,
            ) from error
        raise


def write_atomic(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace `path` by `data`, durably. The caller is its only writer, so the temporary sibling has a fixed name."""
    temporary = temporary_of(path)
    try:
        write_file(temporary, data, mode=mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def temporary_of(path: Path) -> Path:
    """The sibling that `write_atomic` fills first; a crash may leave it."""
    return path.with_name(f".{path.name}.tmp")


def write_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write `path` and fsync it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())


def fsync_directory(path: Path) -> None:
    """Make the names in `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def try_lock(fd: int, operation: int = fcntl.LOCK_EX) -> bool:
    """Take the flock of `fd` when it is free."""
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(path: Path, *, timeout_s: float = 60.0) -> Iterator[None]:
    """Hold the exclusive lock of `path`, a file that is made when missing and is never removed. TIMEOUT after `timeout_s`."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + timeout_s
        while not try_lock(fd):
            if time.monotonic() > deadline:
                raise SmrError(
                    f"{path} is held by another process for over {timeout_s:g} s",
                    hint=f"'fuser -v {path}' shows which",
                    code=Code.TIMEOUT,
                )
            time.sleep(_POLL_S)
        yield
    finally:
        os.close(fd)


def _free_bytes(path: Path) -> int:
    for place in (path, *path.parents):
        with suppress(OSError):
            found = os.statvfs(place)
            return found.f_bavail * found.f_frsize
    return 0
