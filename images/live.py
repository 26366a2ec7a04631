"""Memory of processes that hold still, read from outside: what is there, its bytes, and which pages of two processes are equal.

The processes are frozen or stopped from before `Live` is entered until it is left; nothing here makes sure of that. Bytes come by
process_vm_readv, which copies once and releases the interpreter's lock, and where a protection forbids that, from /proc/PID/mem.
Addresses and lengths are in pages of 4096 bytes. Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from smr.images import process_vm
from smr.images.pagetable import PAGE_BYTES
from smr.images.process_vm import Iovec
from smr.images.spans import Span, union
from smr.proto.errors import Code, SmrError

# include/uapi/linux/fs.h, Linux 6.7: struct pm_scan_arg and struct page_region.
_PAGEMAP_SCAN = 0xC0606610
_SCAN = struct.Struct("<12Q")
_REGION = struct.Struct("<3Q")
_FILE, _PRESENT, _SWAPPED, _ZERO_PAGE = 1 << 2, 1 << 3, 1 << 4, 1 << 5
_REGIONS = 4096
# Documentation/admin-guide/mm/pagemap.rst: a page that is there, and its frame.
_HAS_FRAME, _FRAME = 1 << 63, (1 << 55) - 1
_COMPARED = 512
# /proc/PID/stat, counted behind the name: start time.
_START_FIELD = 19


class Live:
    """Processes that hold still, by the pid that CRIU's images know them by. A context manager: it holds their memory open."""

    def __init__(self, pids: Mapping[int, int]) -> None:
        """`pids`: image pid -> host pid."""
        self.pids = dict(pids)
        self._stack = ExitStack()
        self._files: dict[int, int] = {}
        self._started: dict[int, str] = {}
        self._buffers = threading.local()

    def __enter__(self) -> Live:
        """Raises CHECKPOINT_FAILED for a process that is gone."""
        try:
            for pid, host_pid in self.pids.items():
                self._started[pid] = _started(host_pid)
                self._files[pid] = os.open(f"/proc/{host_pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
                self._stack.callback(os.close, self._files[pid])
        except OSError as error:
            self._stack.close()
            raise _gone(host_pid, error.strerror or "cannot be read") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.close()

    def read(self, pid: int, page: int, view: memoryview) -> None:
        """Fill `view` with pages from `page` on. Raises CHECKPOINT_FAILED where that cannot be, as when the process is gone."""
        address, size = page * PAGE_BYTES, len(view)
        done = max(0, _vm_read(self.pids[pid], address, view))
        while done < size:
            try:
                count = os.preadv(self._files[pid], [view[done:]], address + done)
            except OSError as error:
                raise self._unreadable(pid, address + done, error.strerror or "") from error
            if not count:
                raise self._unreadable(pid, address + done, "the process is gone")
            done += count

    def try_read(self, pid: int, page: int, view: memoryview) -> bool:
        """The same for plain memory; false where it cannot be read."""
        return _vm_read(self.pids[pid], page * PAGE_BYTES, view) == len(view)

    def check(self) -> None:
        """Raise CHECKPOINT_FAILED unless all are the processes that they were: numbers are used again."""
        for pid, host_pid in self.pids.items():
            try:
                same = _started(host_pid) == self._started[pid]
            except OSError:
                same = False
            if not same:
                raise _gone(host_pid, "it ended")

    def candidates(self) -> dict[int, list[Span]]:
        """By image pid, pages of plain private memory that CRIU will want, in a guess from /proc, each span within one VMA.

        VMAs that a process has in common with its parent are left out: pages there may be CRIU's to make common. Empty where the
        kernel has no PAGEMAP_SCAN (before 6.7).
        """
        areas = {pid: set(_plain_areas(host_pid)) for pid, host_pid in self.pids.items()}
        by_host = {host_pid: pid for pid, host_pid in self.pids.items()}
        shared: dict[int, set[Span]] = {pid: set() for pid in areas}
        for pid, host_pid in self.pids.items():
            parent = by_host.get(_parent(host_pid))
            if parent is not None:
                both = areas[pid] & areas[parent]
                shared[pid] |= both
                shared[parent] |= both
        return {pid: list(_populated(self.pids[pid], sorted(found - shared[pid]))) for pid, found in areas.items()}

    def equal(self, pid: int, other: int, begin: int, end: int) -> list[Span]:
        """Which of the pages [begin, end) have the same bytes in both; at most 512 of them. Any number of threads may ask."""
        pages = end - begin
        one, two = (_entries(self.pids[number], begin, pages) for number in (pid, other))
        if one == two and _all_have_frames(one):
            return [(begin, end)]
        same = [_same_frame(*entries) for entries in zip(one.cast("Q"), two.cast("Q"), strict=True)]
        if not all(same):
            views = [view[: pages * PAGE_BYTES] for view in self._two_buffers()]
            for number, view in zip((pid, other), views, strict=True):
                self.read(number, begin, view)
            for at in range(pages):
                if not same[at]:
                    left, right = (view[at * PAGE_BYTES : (at + 1) * PAGE_BYTES] for view in views)
                    same[at] = left == right
        return union((begin + at, begin + at + 1) for at in range(pages) if same[at])

    def _two_buffers(self) -> list[memoryview]:
        if not hasattr(self._buffers, "two"):
            self._buffers.two = [memoryview(bytearray(_COMPARED * PAGE_BYTES)) for _ in range(2)]
        found: list[memoryview] = self._buffers.two
        return found

    def _unreadable(self, pid: int, address: int, why: str) -> SmrError:
        return SmrError(
            f"the memory of process {self.pids[pid]} cannot be read at {address:#x}: {why}",
            hint="checkpoint again",
            code=Code.CHECKPOINT_FAILED,
        )


def _gone(host_pid: int, why: str) -> SmrError:
    return SmrError(
        f"process {host_pid} is gone in the middle of its checkpoint: {why}", hint="checkpoint again", code=Code.CHECKPOINT_FAILED
    )


def _fields(host_pid: int) -> list[str]:
    return Path(f"/proc/{host_pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def _started(host_pid: int) -> str:
    """When it began; of a process that ended and was not reaped, that."""
    fields = _fields(host_pid)
    return fields[_START_FIELD] if fields[0] not in "ZX" else fields[0]


def _parent(host_pid: int) -> int:
    return int(_fields(host_pid)[1])


def _plain_areas(host_pid: int) -> Iterator[Span]:
    """Private anonymous VMAs that can be read and written. What else would make a VMA CRIU's is asked of CRIU's images."""
    with suppress(OSError), Path(f"/proc/{host_pid}/maps").open(errors="replace") as lines:
        for line in lines:
            words = line.split(None, 5)
            name = words[5].strip() if len(words) > 5 else ""
            if words[1] == "rw-p" and words[4] == "0" and (not name or name.startswith(("[heap]", "[anon:"))):
                begin, _, end = words[0].partition("-")
                yield int(begin, 16) // PAGE_BYTES, int(end, 16) // PAGE_BYTES


def _populated(host_pid: int, areas: Sequence[Span]) -> Iterator[Span]:
    """What CRIU's own scan would find there: in memory or swapped out, not the page of zeros, not a file's."""
    try:
        fd = os.open(f"/proc/{host_pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    regions = ctypes.create_string_buffer(_REGIONS * _REGION.size)
    try:
        for begin, end in areas:
            at = begin * PAGE_BYTES
            while at < end * PAGE_BYTES:
                inverted = _ZERO_PAGE | _FILE
                fields = (at, end * PAGE_BYTES, 0, ctypes.addressof(regions), _REGIONS, 0, inverted, inverted)
                argument = bytearray(_SCAN.pack(_SCAN.size, 0, *fields, _PRESENT | _SWAPPED, _PRESENT))
                count = fcntl.ioctl(fd, _PAGEMAP_SCAN, argument)
                found = [_REGION.unpack_from(regions, number * _REGION.size)[:2] for number in range(count)]
                yield from union((first // PAGE_BYTES, last // PAGE_BYTES) for first, last in found)
                # Not walk_end, which after a last call that did not fill the buffer says an earlier place (seen on 6.18).
                at = found[-1][1] if count == _REGIONS else end * PAGE_BYTES
    except OSError:
        return  # an old kernel, or a process that ended: what is not read ahead is read later, or is said then
    finally:
        os.close(fd)


def _entries(host_pid: int, page: int, pages: int) -> memoryview:
    """What pagemap says of each page, 8 bytes a page; nothing, of pages past the end."""
    with Path(f"/proc/{host_pid}/pagemap").open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), pages * 8, page * 8)
    return memoryview(data.ljust(pages * 8, b"\0"))


def _all_have_frames(entries: memoryview) -> bool:
    """Frames read as 0 where this process may not know them."""
    words = entries.cast("Q")
    return min(words) >= _HAS_FRAME and bool(words[0] & _FRAME)


def _same_frame(one: int, two: int) -> bool:
    return one >= _HAS_FRAME and two >= _HAS_FRAME and one & _FRAME == two & _FRAME != 0


def _vm_read(host_pid: int, address: int, view: memoryview) -> int:
    """How many bytes were read; -1 for none."""
    local = Iovec(ctypes.addressof(ctypes.c_char.from_buffer(view)), len(view))
    remote = Iovec(address, len(view))
    while True:
        done = int(process_vm.readv(host_pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0))
        if done >= 0 or ctypes.get_errno() != errno.EINTR:
            return done
