"""Files for bench.pages: into the page cache, out of it, and how fast the device gives them without it.

The device's own rate is that of reads past the page cache (O_DIRECT), 8 MiB each, by as many threads as fill the pages.
"""

from __future__ import annotations

import errno
import mmap
import os
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from smr.images.pagecache import cached_bytes_of

_PIECE_BYTES = 8 << 20


def cached_share(paths: Sequence[Path]) -> float:
    """Which share of these files is in memory."""
    sizes = [path.stat().st_size for path in paths]
    return round(sum(map(cached_bytes_of, paths)) / max(sum(sizes), 1), 4)


def warm(paths: Sequence[Path]) -> None:
    """Read them all. Raises RuntimeError when memory does not hold them."""
    for _ in range(3):  # what nobody used for a while is reclaimed early on some machines
        _in_threads(paths, os.O_RDONLY)
        if cached_share(paths) > 0.999:
            return
    if cached_share(paths) < 0.99:
        raise RuntimeError("memory does not hold the files in the page cache: take a smaller --size-gib")


def drop(paths: Sequence[Path]) -> None:
    """Put them out of the page cache. Raises RuntimeError when they do not go, as on tmpfs."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    if (left := cached_share(paths)) > 0.01:
        raise RuntimeError(f"{left:.1%} of the files stay in the page cache: --dir must be on a disk")


def device_gb_per_s(paths: Sequence[Path]) -> float | None:
    """Rate of the device for these files; None where the file system has no O_DIRECT."""
    begin = time.perf_counter()
    try:
        _in_threads(paths, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None
    return sum(path.stat().st_size for path in paths) / (time.perf_counter() - begin) / 1e9


def threads() -> int:
    """As many as fill pages that come from a disk."""
    return max(4, 2 * min(16, len(os.sched_getaffinity(0))))


def _in_threads(paths: Sequence[Path], flags: int) -> None:
    todo: queue.SimpleQueue[tuple[Path, int]] = queue.SimpleQueue()
    for path in paths:
        for offset in range(0, path.stat().st_size, _PIECE_BYTES):
            todo.put((path, offset))
    failed: list[OSError] = []
    workers = [threading.Thread(target=_read, args=(todo, flags, failed)) for _ in range(threads())]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed:
        raise failed[0]


def _read(todo: queue.SimpleQueue[tuple[Path, int]], flags: int, failed: list[OSError]) -> None:
    fds: dict[Path, int] = {}
    with mmap.mmap(-1, _PIECE_BYTES) as buffer:
        try:
            while not failed:
                try:
                    path, offset = todo.get_nowait()
                except queue.Empty:
                    break
                if path not in fds:
                    fds[path] = os.open(path, flags)
                _read_piece(fds[path], memoryview(buffer), offset)
        except OSError as error:
            failed.append(error)
        finally:
            for fd in fds.values():
                os.close(fd)


def _read_piece(fd: int, view: memoryview, offset: int) -> None:
    with view:
        done = 0
        while done < len(view) and (count := os.preadv(fd, [view[done:]], offset + done)):
            done += count
            if count % mmap.PAGESIZE:
                break  # the end of the file
