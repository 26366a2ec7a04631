"""Memory that the driver's restore reads while it is still being filled: kept away from it until it is there.

What the driver took out of a GPU lies in areas of the process that nothing else uses, and it copies them back in one thread,
at a third of the speed at which they are filled. So the driver begins as soon as all other memory is there:

    close    the area's place is mapped without any access, and memory of the same size is mapped elsewhere in the process
    fill     the pages go elsewhere
    open     as far as everything from the area's start is there, mremap(2) moves the page tables to their place
    touch    the driver's thread came before that: the kernel stops it for its tracer, which lets it try again (OneThread)

There is no moment in which it could read what is not there: a page is in its place, whole, or touching it is a fault. Only that
thread runs; the system calls are made in the process's first thread, which is stopped (smr.shim.gpu.inject). In the end the
mappings are what they were. A driver that has the kernel touch the memory gets an error from it, and the restore fails.

The thread of ours that makes the system calls is the gate's; `delivered` may be called from any other.
"""

from __future__ import annotations

import queue
import threading
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from smr.images.spans import Span
from smr.proto.errors import Code, SmrError
from smr.shim.gpu.inject import Remote

HUGE_BYTES = 2 << 20
# So much at a time is put in place: each time the driver's thread waits for the process's memory map.
_STEP_BYTES = 128 << 20
_READ_WRITE, _NO_ACCESS = 3, 0
_PRIVATE_ANONYMOUS, _FIXED, _NORESERVE = 0x22, 0x10, 0x4000
_MOVE = 1 | 2
_MADV_HUGEPAGE = 14


@dataclass(slots=True, kw_only=True)
class _Area:
    """Its place [start, end), where its pages are meanwhile, and up to where it is open. `missing`: runs that are not there."""

    start: int
    end: int
    away: int = 0
    mapped: Span = (0, 0)
    opened: int = 0
    missing: Sequence[Span] = ()
    next: int = 0
    there: dict[int, int] = field(default_factory=dict)

    def note(self, span: Span) -> None:
        """Pages were delivered, at the place where they are meanwhile."""
        self.there[span[0] - self.away + self.start] = span[1] - self.away + self.start

    def ready(self) -> int:
        """Up to where everything is there."""
        while self.next < len(self.missing):
            end = self.there.pop(self.missing[self.next][0], 0)
            if not end:
                return self.missing[self.next][0]
            # A span that was delivered is one or more runs, whole ones.
            while self.next < len(self.missing) and self.missing[self.next][0] < end:
                self.next += 1
        return self.end


class Gate:
    """The areas of one process, as a context manager: closed on entry, wholly open at the end unless the block failed.

    `areas` are [start, end) on page borders, private anonymous memory without a page in it; `runs` the spans of them that are
    filled, sorted. Raises GPU_FAILED when the process cannot be worked with.
    """

    def __init__(self, pid: int, areas: Sequence[Span], runs: Sequence[Span]) -> None:
        self.pid = pid
        starts = [run[0] for run in runs]
        self._areas = [
            _Area(start=start, end=end, opened=start, missing=runs[bisect_left(starts, start) : bisect_left(starts, end)])
            for start, end in areas
        ]
        self._done: queue.SimpleQueue[Sequence[Span] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name=f"smr-gate-{pid}", daemon=True)

    def __enter__(self) -> Gate:
        self._thread.start()
        self._closed.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._done.put(None)
        self._thread.join()
        if value is None and self._failure is not None:
            raise self._failure

    def away(self, address: int) -> int | None:
        """Where a page of an area is filled; None for one of no area."""
        for area in self._areas:
            if area.start <= address < area.end:
                return address - area.start + area.away
        return None

    def delivered(self, spans: Sequence[Span]) -> None:
        """These are filled, where `away` said."""
        self._done.put(spans)

    def _work(self) -> None:
        try:
            with Remote(self.pid) as remote:
                for area in self._areas:
                    _close(remote, area)
                self._closed.set()
                while (spans := self._done.get()) is not None:
                    self._note(spans)
                    for area in self._areas:
                        _open(remote, area, least_bytes=_STEP_BYTES)
                for area in self._areas:
                    self._finish(remote, area)
        except (SmrError, OSError) as error:
            self._failure = _failed(self.pid, error)
        finally:
            self._closed.set()

    def _note(self, spans: Sequence[Span]) -> None:
        for span in spans:
            for area in self._areas:
                if area.away <= span[0] < area.away + area.end - area.start:
                    area.note(span)

    def _finish(self, remote: Remote, area: _Area) -> None:
        _open(remote, area, least_bytes=1)
        if area.opened < area.end:
            return  # the block failed, and the process is going to be killed
        first, last = area.mapped
        for start, end in ((first, area.away), (area.away + area.end - area.start, last)):
            if start < end:
                remote.call("munmap", start, end - start)


def empty(pid: int, area: Span) -> bool:
    """Whether a process has [start, end) mapped as one private anonymous writable area with no page in it."""
    ours = False
    for line in Path(f"/proc/{pid}/smaps").read_text(errors="replace").splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            if ours:
                return False
            start, _, end = words[0].partition("-")
            ours = int(start, 16) <= area[0] and area[1] <= int(end, 16) and words[1] == "rw-p" and words[4] == "0"
        elif ours and words[0] in ("Rss:", "Swap:"):
            if words[1] != "0":
                return False
        elif ours and words[0] == "VmFlags:":
            return True
    return False


def _close(remote: Remote, area: _Area) -> None:
    size = area.end - area.start
    first = remote.call("mmap", 0, size + HUGE_BYTES, _READ_WRITE, _PRIVATE_ANONYMOUS, -1 & (1 << 64) - 1, 0)
    # Huge pages move as a whole where both places are the same distance from a border.
    area.away = first + (area.start - first) % HUGE_BYTES
    area.mapped = (first, first + size + HUGE_BYTES)
    remote.call("madvise", area.away, size, _MADV_HUGEPAGE)
    remote.call("mmap", area.start, size, _NO_ACCESS, _PRIVATE_ANONYMOUS | _FIXED | _NORESERVE, -1 & (1 << 64) - 1, 0)


def _open(remote: Remote, area: _Area, *, least_bytes: int) -> None:
    ready = area.ready()
    if ready < area.end:
        ready -= ready % HUGE_BYTES
    if ready <= area.opened or (ready < area.end and ready - area.opened < least_bytes):
        return
    size = ready - area.opened
    remote.call("mremap", area.away + area.opened - area.start, size, size, _MOVE, area.opened)
    area.opened = ready


def _failed(pid: int, error: Exception) -> SmrError:
    if isinstance(error, SmrError):
        return error
    return SmrError(f"the memory of process {pid} cannot be kept from the driver: {error}", code=Code.GPU_FAILED, pid=pid)
