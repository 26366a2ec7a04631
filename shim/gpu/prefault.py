"""Memory for what the driver brings out of a GPU, made ready beside it by all processors.

The driver's checkpoint maps one large anonymous area in the process (MAP_POPULATE) and copies there. Half of its time is the
kernel's, which makes the area's pages in one thread (11.4 GB: 2.3 s of 3.9 s). They can be had from outside: process_vm_writev
with a source that cannot be read has the kernel make the target's pages, for writing, and then fail before a byte is written
(mm/process_vm_access.c: pin_user_pages_remote comes first; seen on 6.18). What the driver has written there stays. Eight threads
bring the whole from 4.8 s to 2.2 s. Huge pages would cost less still, but the area cannot be asked to take them: that waits for
the process's memory map, which is held while its pages are made.

It is an advantage and never a condition: whatever fails here is left, and the kernel makes the pages itself. No more than
`expected_bytes` are made, what the process has on its GPUs, so that an area that is only reserved costs nothing.
Runs in the helper (smr.shim.gpu.helper), for one process, beside the driver's call.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from smr.images import process_vm
from smr.images.process_vm import Iovec

# The kernel pins this many bytes of a target at a time (PVM_MAX_KMALLOC_PAGES), and stops at the first that it cannot fill.
STEP_BYTES = 4 << 20
_LEAST_BYTES = 64 << 20
_LOOK_S = 0.002
_MOST_THREADS = 8
# Below what may be mapped (vm.mmap_min_addr): nothing is ever there to be read.
_NOWHERE = 4096

Area = tuple[int, int]


class Prefault:
    """A context manager around the driver's checkpoint of process `pid`."""

    def __init__(self, pid: int, expected_bytes: int) -> None:
        self._pid = pid
        self._left = expected_bytes
        self._over = threading.Event()
        self._todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._seen: list[Area] = []
        self.made_bytes = 0
        self._counting = threading.Lock()

    def __enter__(self) -> Prefault:
        if self._left >= _LEAST_BYTES:
            self._seen = areas(self._pid)
            self._begin(self._watch)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _begin(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _watch(self) -> None:
        """Until the driver's call has ended, look for areas that it makes."""
        while not self._over.is_set() and self._left > 0:
            for area in new_areas(self._pid, self._seen):
                self._seen.append(area)
                self._take_on(area)
            self._over.wait(_LOOK_S)

    def _take_on(self, area: Area) -> None:
        start, end = area[0], min(area[1], area[0] + self._left)
        self._left -= end - start
        for address in range(start, end, STEP_BYTES):
            self._todo.put(address)
        for _ in range(min(_MOST_THREADS, len(os.sched_getaffinity(0)))):
            self._begin(lambda: self._work(end))

    def _work(self, end: int) -> None:
        while not self._over.is_set():
            try:
                address = self._todo.get_nowait()
            except queue.Empty:
                return
            if not self._touch(address, min(STEP_BYTES, end - address)):
                return

    def _touch(self, address: int, size_bytes: int) -> bool:
        """Have the kernel make these pages. False when the area, or the process, is not there any more."""
        source, target = Iovec(_NOWHERE, size_bytes), Iovec(address, size_bytes)
        process_vm.writev(self._pid, ctypes.byref(source), 1, ctypes.byref(target), 1, 0)
        if ctypes.get_errno() != errno.EFAULT:
            return False
        with self._counting:
            self.made_bytes += size_bytes
        return True


def areas(pid: int) -> list[Area]:
    """Large private anonymous writable mappings of a process; none when it is gone."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_bytes().splitlines():
            # "start-end rw-p offset device inode": a path would be a sixth word.
            words = line.split()
            if len(words) == 5 and words[1] == b"rw-p":
                start, _, end = words[0].partition(b"-")
                if int(end, 16) - int(start, 16) >= _LEAST_BYTES:
                    found.append((int(start, 16), int(end, 16)))
    return found


def new_areas(pid: int, known: Sequence[Area]) -> list[Area]:
    """Those that are no part of a known one."""
    return [area for area in areas(pid) if not any(start <= area[0] and area[1] <= end for start, end in known)]
