"""The processes of a lazy restore: what each still lacks, and what their events do to that.

A space is one address space, of a task that CRIU restored or of a child that it forked since. It has two layouts: `missing` is
what has not been delivered; `known` leaves deliveries out of account, and is what a successor can find again from the journal.
So an event has to be kept if it changes `known`. A successor takes for missing what may have been delivered; then the page is
there, and the kernel refuses it, unless the process has dropped it since, which is an event that was kept.

Deliveries and events of a space exclude each other through its gate. An event is read, and so the process let go on, only while
no copy to the space is decided or under way, and what it says is applied before the next. Until it is read the kernel refuses
copies. So no copy that was decided before a change can land after it: not after a MADV_DONTNEED, which zaps after the reading.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager

from smr.images.lazy_journal import Journal, Registration
from smr.images.lazy_layout import Layout, Piece
from smr.images.pagetable import PAGE_BYTES, PageTable
from smr.images.uffd import Event, Message


class Gate:
    """Many may deliver, or one may read events; who wants to read comes first."""

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._delivering = 0
        self._waiting = 0
        self._reading = False

    @contextmanager
    def delivering(self) -> Iterator[None]:
        """One of many."""
        with self._condition:
            while self._reading or self._waiting:
                self._condition.wait()
            self._delivering += 1
        try:
            yield
        finally:
            with self._condition:
                self._delivering -= 1
                if not self._delivering:
                    self._condition.notify_all()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The only one."""
        with self._condition:
            self._waiting += 1
            while self._reading or self._delivering:
                self._condition.wait()
            self._waiting -= 1
            self._reading = True
        try:
            yield
        finally:
            with self._condition:
                self._reading = False
                self._condition.notify_all()


class Space:
    """One address space. `root`: of a task that CRIU restored, whose runs are those of `pid` in the table."""

    def __init__(self, index: int, task: Registration, known: Layout, missing: Layout, *, root: bool) -> None:
        self.index = index
        self.pid = task.pid
        self.host_pid = task.host_pid
        self.pidfd = task.pidfd
        self.fd = task.fd
        self.root = root
        self.known = known
        self.missing = missing
        self.gate = Gate()
        self.cursor = 0
        self._lock = threading.Lock()
        self.gone = False

    @property
    def done(self) -> bool:
        """Nothing is left to deliver."""
        return self.gone or not self.missing

    def at(self, address: int) -> Piece | None:
        """What is missing at an address."""
        with self._lock:
            return self.missing.at(address)

    def following(self, address: int) -> Piece | None:
        """What is missing next."""
        with self._lock:
            return self.missing.following(address)

    def still(self, wanted: Piece) -> list[Piece]:
        """What is missing of a piece that was."""
        with self._lock:
            return self.missing.still(wanted)

    def delivered(self, start: int, end: int) -> None:
        """It is there now."""
        with self._lock:
            self.missing.remove(start, end)

    def change(self, message: Message) -> bool:
        """What an event other than FORK does; False when it need not be kept. The caller holds the gate for reading."""
        with self._lock:
            changed = False
            for layout in (self.missing, self.known):
                if message.event is Event.REMAP:
                    changed = layout.move(message.first, message.second, message.third)
                else:
                    changed = layout.remove(message.first, message.second)
            return changed

    def forked(self, index: int, fd: int) -> Space:
        """The space of a child."""
        with self._lock:
            task = Registration(self.pid, 0, fd, -1)
            return Space(index, task, self.known.copy(), self.missing.copy(), root=False)


class State:
    """All spaces, by their numbers."""

    def __init__(self, table: PageTable) -> None:
        self.table = table
        self.spaces: list[Space] = []
        self._runs = dict(table.by_process())
        self._first = {}
        begin = 0
        for pid, runs in self._runs.items():
            self._first[pid] = begin
            begin += len(runs)

    def register(self, task: Registration) -> Space:
        """A task that CRIU restores."""
        chunks = self.table.chunks
        runs = self._runs.get(task.pid, ())
        layout = Layout(Piece(run.address, run.address + chunks[run.chunk].pages * PAGE_BYTES, run.chunk, 0) for run in runs)
        space = Space(len(self.spaces), task, layout, layout.copy(), root=True)
        self.spaces.append(space)
        return space

    def apply(self, index: int, message: Message) -> bool:
        """What an event does; False when it need not be kept."""
        space = self.spaces[index]
        if message.event is not Event.FORK:
            return space.change(message)
        self.spaces.append(space.forked(len(self.spaces), message.first))
        return True

    def replay(self, journal: Journal) -> None:
        """What a predecessor knew."""
        for record in journal.replay():
            if isinstance(record, Registration):
                self.register(record)
            else:
                self.apply(*record)
        roots = {space.pid: space for space in self.spaces if space.root}
        for number in journal.delivered():
            run = self.table.runs[number]
            piece = Piece(run.address, run.address + self.table.pages(run) * PAGE_BYTES, run.chunk, 0)
            for left in roots[run.pid].still(piece):
                if not left.moved:
                    roots[run.pid].delivered(left.start, left.end)

    def settle(self) -> None:
        """Make what is missing all that is known: for a journal that begins anew."""
        for space in self.spaces:
            space.known = space.missing.copy()
            space.gate = Gate()

    def run_of(self, space: Space, piece: Piece) -> int | None:
        """The number of the run that a piece is, if it is a whole one where the table puts it."""
        if not space.root or piece.moved or piece.skip:
            return None
        runs = self._runs[space.pid]
        index = bisect_left(runs, piece.start, key=lambda run: run.address)
        if index == len(runs) or runs[index].address != piece.start or runs[index].chunk != piece.chunk:
            return None
        whole = piece.end - piece.start == self.table.pages(runs[index]) * PAGE_BYTES
        return self._first[space.pid] + index if whole else None
