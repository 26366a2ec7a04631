"""How much of a file is in the page cache, how it gets there, and how much memory there is for more.

`cachestat` (kernel 6.5) answers for any range in one call; before it, `mincore` on a mapping does, page by page.
A kernel may keep both from who neither owns the file nor may write it (6.14 and 5.2): then the answer is that nothing is cached.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

# One number on all architectures: system calls from 424 on are numbered alike.
_CACHESTAT = 451
_MINCORE_PIECE_BYTES = 1 << 30
_NO_LIMIT_BYTES = 1 << 60
_SAMPLED_FROM_BYTES = 1 << 30
_SAMPLE_BYTES = 1 << 20
_SAMPLES_APART = 16
_BUFFER_BYTES = 512 << 10
_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Stat(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted"))


def cached_bytes(fd: int, offset: int, length: int) -> int:
    """How many bytes of this range of an open file are in memory, in whole pages, at most `length`."""
    if length <= 0:
        return 0
    pages = _cachestat(fd, offset, length)
    if pages is None:
        return _mincore(fd, offset, length)
    return min(length, pages * mmap.PAGESIZE)


def cached_bytes_of(path: Path) -> int:
    """How many bytes of a file are in memory; of a large file a sixteenth is looked at, 1 MiB at a time.

    The kernel counts 4 KiB at a time where memory was read so: a file of 12 GB took 0.2 s, and a restore asks too.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        size_bytes = os.fstat(fd).st_size
        if size_bytes < _SAMPLED_FROM_BYTES:
            return cached_bytes(fd, 0, size_bytes)
        looked = range(0, size_bytes - _SAMPLE_BYTES, _SAMPLES_APART * _SAMPLE_BYTES)
        found = sum(cached_bytes(fd, offset, _SAMPLE_BYTES) for offset in looked)
        return size_bytes * found // (len(looked) * _SAMPLE_BYTES)
    finally:
        os.close(fd)


def read_ahead(fd: int, offset: int, length: int) -> None:
    """Bring a range of an open file into the page cache, and wait for it. `offset` is a multiple of 4096.

    By a mapping that is populated (kernel 5.14), not by reading: nothing is copied, and in a mapping that wants huge pages the
    kernel reads and keeps 2 MiB at a time where the file system can. That took a fifteenth of the processor time of
    posix_fadvise, and mapping the whole of such a file again, which is what a fill from the page cache does, a fiftieth.
    A range beyond the end of the file is nothing. Raises OSError when the disk fails.
    """
    length = min(length, os.fstat(fd).st_size - offset)
    if length <= 0:
        return
    libc = _libc()
    address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
    if address not in (None, ctypes.c_void_p(-1).value):
        try:
            libc.madvise(address, length, _MADV_HUGEPAGE)  # a kernel without huge pages says no, and reads as it can
            if libc.madvise(address, length, _MADV_POPULATE_READ) == 0:
                return
        finally:
            libc.munmap(address, length)
    # An older kernel; or one that has found no memory, a hole in the disk, an end that has moved: reading says which.
    buffer = bytearray(min(length, _BUFFER_BYTES))
    end = offset + length
    while offset < end and (count := os.preadv(fd, [memoryview(buffer)[: end - offset]], offset)):
        offset += count


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that can be had without swapping: the machine's, or what the limits around our own cgroup leave, if that is less.

    Locked memory, so also pinned images, is not among it.
    """
    return max(0, min(node_available_bytes(proc), *_cgroup_rooms(proc, cgroups)))


def node_available_bytes(proc: Path = Path("/proc")) -> int:
    """Memory of the machine that can be had without swapping, whatever limits our own cgroup has."""
    return meminfo(proc)["MemAvailable"]


def meminfo(proc: Path = Path("/proc")) -> dict[str, int]:
    """/proc/meminfo, in bytes."""
    lines = (line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    return {name: int(rest.split()[0]) << (10 if rest.endswith("kB") else 0) for name, rest in lines}


def _cgroup_rooms(proc: Path, cgroups: Path) -> list[int]:
    """What each limit from our cgroup up leaves, on cgroup v1 and v2."""
    rooms = [_NO_LIMIT_BYTES]
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                root, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            elif not controllers:
                root, names = cgroups, ("memory.max", "memory.current")
            else:
                continue
            folder = root / path.lstrip("/")
            rooms += [_room(place, *names) for place in (folder, *folder.parents) if place.is_relative_to(root)]
    return rooms


def _room(cgroup: Path, limit: str, usage: str) -> int:
    """Limit less what is in use and is not a file's: the kernel drops page cache before it refuses memory."""
    with suppress(OSError, ValueError):  # "max", or a cgroup that our namespace does not show
        limit_bytes = int((cgroup / limit).read_text())
        with suppress(OSError, ValueError):
            lines = (line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
            files = {name: int(count) for name, count in lines if name.endswith("active_file")}
            # v1 counts the children in total_*, v2 always.
            cached = sum(files.get(f"total_{name}", files.get(name, 0)) for name in ("active_file", "inactive_file"))
            return limit_bytes - int((cgroup / usage).read_text()) + cached
        return limit_bytes
    return _NO_LIMIT_BYTES


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    return libc


def _cachestat(fd: int, offset: int, length: int) -> int | None:
    """Cached pages of the range; None where the kernel has no such call."""
    span, found = _Range(offset, length), _Stat()
    arguments = (ctypes.c_long(_CACHESTAT), ctypes.c_uint(fd), ctypes.byref(span), ctypes.byref(found), ctypes.c_uint(0))
    if _libc().syscall(*arguments) == 0:
        return int(found.cached)
    # EPERM is also what a seccomp profile says to a call it does not know.
    return None if ctypes.get_errno() in {errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP} else 0


def _mincore(fd: int, offset: int, length: int) -> int:
    begin = offset - offset % mmap.PAGESIZE
    pages = 0
    for start in range(begin, offset + length, _MINCORE_PIECE_BYTES):
        pages += _mincore_piece(fd, start, min(_MINCORE_PIECE_BYTES, offset + length - start))
    return min(length, pages * mmap.PAGESIZE)


def _mincore_piece(fd: int, offset: int, length: int) -> int:
    libc = _libc()
    address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
    if address in (None, ctypes.c_void_p(-1).value):
        return 0
    try:
        vector = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
        if libc.mincore(address, length, vector) != 0:
            return 0
        return sum(state & 1 for state in vector.raw)
    finally:
        libc.munmap(address, length)
