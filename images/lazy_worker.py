"""The process that serves a lazy restore: one thread that reads messages and answers faults, some that fill behind.

Nothing is filled before CRIU says that all tasks are restored: until then mappings are still being made, and only the page that
a fault asks for can be relied on. A fault gets the pages around it at once, and the rest of its chunk goes first in the filling.

What a copy may answer, and what it means, is in smr.images.uffd. A page that has no mapping is given up only when the answer is
ENOENT twice within one passage of the gate: had the mapping gone by a change that has an event still to be read, the second
answer would be EAGAIN. Without an event it can be gone only in a forked child (MADV_DONTFORK); in a restored task it means that
the table does not fit the process, which must not run on.

Two limits are the kernel's. It says nothing of guard regions (MADV_GUARD_INSTALL) that are put over missing pages and removed
again. And events of two threads may be queued in another order than their changes were made, when a mapping is moved by mremap to
where another thread has unmapped one at that moment: where that could be, the restore fails rather than guesses.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from enum import Enum, auto

from smr.images import uffd
from smr.images.lazy_journal import Journal
from smr.images.lazy_layout import Piece
from smr.images.lazy_source import Source
from smr.images.lazy_state import Space, State
from smr.images.lazy_tasks import HangupError, flagged, receive, threads
from smr.images.pagetable import PAGE_BYTES
from smr.images.uffd import Event, Message
from smr.proto.errors import Code, SmrError

# What a fault gets at once, and how many zeros where nothing is missing. 200 random pages of 1 GiB, on 2 cores, while it fills:
# 0.14 s with 16 KiB, 0.08 with 64, 0.09 with 256, 0.24 with 2 MiB.
FAULT_BYTES = 64 << 10
# One call of the filling: how long a fault may have to wait for the gate.
COPY_BYTES = 1 << 20
_TICK_MS = 20
_RETRY_MS = 1
_PAUSE_S = 0.0005


class Leave(Enum):
    """Why a worker's loop ended: all is delivered, its keeper is dead, or the journal is full."""

    DONE = auto()
    ORPHAN = auto()
    FULL = auto()


class Worker:
    """One attempt at the work. `run` is of the thread that made it."""

    def __init__(
        self, state: State, journal: Journal, source: Source, listener: socket.socket, *, threads: int, rest_s: float = 0.0
    ) -> None:
        self._state = state
        self._journal = journal
        self._source = source
        self._listener = listener
        self._connection: socket.socket | None = None
        self._poll = select.poll()
        self._by_fd: dict[int, Space] = {}
        self._waiting: list[tuple[Space, int]] = []
        self._hot: deque[tuple[Space, Piece]] = deque()
        self._claimed: set[tuple[int, int]] = set()
        self._claiming = threading.Lock()
        self._turn = 0
        self._failure: BaseException | None = None
        self._stop = False
        self._rest_s = rest_s
        self._fillers = [threading.Thread(target=self._guarded, args=(self._fill,), daemon=True) for _ in range(threads)]

    def run(self, keeper: int, deadline: float) -> Leave:
        """Serve until all is done. `keeper`: the parent's pid; `deadline`: when CRIU must have connected. Raises SmrError."""
        self._resume(keeper)
        try:
            while True:
                if self._failure is not None:
                    raise self._failure
                if os.getppid() != keeper:
                    return Leave.ORPHAN
                if self._journal.full:
                    return Leave.FULL
                if self._journal.finished and all(space.done for space in self._state.spaces):
                    return Leave.DONE
                if self._connection is None and not self._journal.finished and time.monotonic() > deadline:
                    raise SmrError("CRIU did not connect to the server of pages in time", code=Code.TIMEOUT)
                self._step()
        finally:
            self._stop = True
            for filler in self._fillers:
                if filler.ident is not None:
                    filler.join()
            if self._connection is not None:
                self._connection.detach()

    def _resume(self, keeper: int) -> None:
        self._state.replay(self._journal)
        for space in self._state.spaces:
            self._watch(space)
        leftover = self._journal.leftover()
        if leftover is not None and os.getppid() == keeper:
            self._event(self._state.spaces[leftover[0]], leftover[1])
        for space in self._state.spaces:
            uffd.wake(space.fd)
        if self._journal.connected:
            self._connect(socket.socket(fileno=self._journal.connected - 1))
        elif not self._journal.finished:
            self._poll.register(self._listener.fileno(), select.POLLIN)
        if self._journal.finished:
            self._begin()

    def _begin(self) -> None:
        for filler in self._fillers:
            filler.start()

    def _connect(self, connection: socket.socket) -> None:
        self._connection = connection
        self._journal.connect(connection.fileno() + 1)
        self._poll.register(connection.fileno(), select.POLLIN)

    def _watch(self, space: Space) -> None:
        self._by_fd[space.fd] = space
        self._poll.register(space.fd, select.POLLIN)

    def _step(self) -> None:
        for fd, _ in self._poll.poll(_RETRY_MS if self._waiting else _TICK_MS):
            if fd in self._by_fd:
                self._read(self._by_fd[fd])
            elif self._connection is not None and fd == self._connection.fileno():
                self._hear(self._connection)
            elif fd == self._listener.fileno():
                self._poll.unregister(fd)
                self._connect(self._listener.accept()[0])
            if self._journal.full:
                return
        waiting, self._waiting = self._waiting, []
        for space, address in waiting:
            self._fault(space, address)

    def _hear(self, connection: socket.socket) -> None:
        try:
            heard = receive(connection)
        except (HangupError, OSError) as error:
            raise SmrError("CRIU has ended before the restore was finished", code=Code.RESTORE_FAILED) from error
        if heard is True:
            self._journal.finish()
            self._journal.connect(0)
            self._poll.unregister(connection.fileno())
            self._connection = None
            connection.close()
            self._begin()
        elif heard is not False:
            self._journal.register(heard)
            self._watch(self._state.register(heard))

    def _read(self, space: Space) -> None:
        """All messages of a space, but no more than the journal has room for."""
        while not self._journal.full:
            with space.gate.reading():
                if not uffd.read_message(space.fd, self._journal.prepare(space.index)):
                    break
                message = self._journal.message()
                if message.event is not Event.PAGEFAULT:
                    self._event(space, message)
                    continue
            self._journal.count(faults=1)
            self._fault(space, message.second & -PAGE_BYTES)

    def _event(self, space: Space, message: Message) -> None:
        more: list[tuple[int, Message]] = []
        if message.event is Event.FORK:
            child = len(self._state.spaces)
            wiped = flagged(space.host_pid, "wf") if space.host_pid and space.known else []
            more = [(child, Message(Event.UNMAP, start, end, 0)) for start, end in wiped if space.known.within(start, end)]
        elif message.event is Event.UNMAP:
            self._refuse_to_guess(space, message)
        if self._state.apply(space.index, message):
            self._journal.commit(more)
            for index, extra in more:
                self._state.apply(index, extra)
            if message.event is Event.FORK:
                self._watch(self._state.spaces[child])

    def _refuse_to_guess(self, space: Space, message: Message) -> None:
        start, end = message.first, message.second
        if not any(piece.moved for piece in space.missing.within(start, end)) or threads(space.host_pid) < 2:
            return
        if any(low < end and high > start for low, high in flagged(space.host_pid, "um")):
            raise SmrError(
                f"process {space.pid} moved and unmapped memory at {start:#x} at once: cannot tell which came first",
                hint="restore with smr.pages=fill",
                code=Code.RESTORE_FAILED,
            )

    def _fault(self, space: Space, address: int) -> None:
        piece = space.at(address)
        if piece is None:
            answered = self._zero(space, address)
        else:
            block = self._around(piece, address)
            with self._source.at(block) as chunk:
                answered = self._deliver(space, block, chunk)
            if answered and block != piece and self._journal.finished:
                self._hot.append((space, piece))
                space.cursor = piece.end
        if not answered:
            self._waiting.append((space, address))

    def _around(self, piece: Piece, address: int) -> Piece:
        if not self._journal.finished:
            return piece.part(address, address + PAGE_BYTES)
        if not self._source.raw(piece.chunk):
            return piece
        start = address & -FAULT_BYTES
        return piece.part(start, start + FAULT_BYTES)

    def _zero(self, space: Space, address: int) -> bool:
        """Zeros where nothing is missing; False to be asked again."""
        size = PAGE_BYTES
        if self._journal.finished:
            nearest = space.following(address)
            end = min((address & -FAULT_BYTES) + FAULT_BYTES, nearest.start if nearest else address + FAULT_BYTES)
            size = end - address
        done, code = uffd.zero(space.fd, address, size)
        if code == errno.ENOENT and size > PAGE_BYTES:
            done, code = uffd.zero(space.fd, address, PAGE_BYTES)
        if code == errno.EAGAIN and not done and uffd.alive(space.fd):
            return False
        if code in (errno.EEXIST, errno.ENOENT):
            uffd.wake(space.fd, address, PAGE_BYTES)
        elif code == errno.ESRCH or (code == errno.EAGAIN and not done):
            space.gone = True
        elif code not in (0, errno.EAGAIN):
            raise _refused(space, address, code)
        return True

    def _deliver(self, space: Space, wanted: Piece, chunk: int) -> bool:
        """Copy what is still missing of a piece, whose chunk is at an address of ours; False to be asked again."""
        if space.gone:
            return True
        for start in range(wanted.start, wanted.end, COPY_BYTES):
            with space.gate.delivering():
                for piece in space.still(wanted.part(start, start + COPY_BYTES)):
                    if not self._copy(space, piece, chunk + piece.skip - piece.start):
                        return False
        if not space.still(wanted) and (run := self._state.run_of(space, wanted)) is not None and not space.gone:
            self._journal.deliver(run)
        return True

    def _copy(self, space: Space, piece: Piece, offset: int) -> bool:
        """Copy a piece that is missing; its bytes are at its address plus `offset`. The caller is delivering."""
        at, step, asked = piece.start, piece.end - piece.start, -1
        while at < piece.end:
            done, code = uffd.copy(space.fd, at, at + offset, min(step, piece.end - at))
            if done:
                space.delivered(at, at + done)
                self._journal.count(copied_bytes=done)
                at += done
                step *= 2
            elif code == errno.EEXIST:
                uffd.wake(space.fd, at, PAGE_BYTES)
                space.delivered(at, at + PAGE_BYTES)
                at += PAGE_BYTES
            elif code == errno.ENOENT and step > PAGE_BYTES:
                step = max(PAGE_BYTES, step // 2 & -PAGE_BYTES)
            elif code == errno.ENOENT and asked < at:
                asked = at
            elif code == errno.ENOENT and self._journal.finished and not space.root:
                space.delivered(at, at + PAGE_BYTES)
                at += PAGE_BYTES
            elif code == errno.ESRCH or (code == errno.EAGAIN and not uffd.alive(space.fd)):
                space.gone = True
                return True
            elif code == errno.EAGAIN or (code == errno.ENOENT and not self._journal.finished):
                return False
            else:
                raise _refused(space, at, code)
        return True

    def _next(self) -> tuple[Space, Piece] | None:
        with self._claiming:
            while self._hot:
                space, hot = self._hot.popleft()
                if not space.done and space.still(hot):
                    return space, hot
            spaces = [space for space in self._state.spaces if not space.done]
            for number in range(len(spaces)):
                space = spaces[(self._turn + number) % len(spaces)]
                piece = space.following(space.cursor)
                if piece is None:
                    space.cursor = 0
                    piece = space.following(0)
                if piece is None or (space.index, piece.start) in self._claimed:
                    space.cursor = piece.end if piece else 0
                    continue
                space.cursor = piece.end
                self._turn += number + 1
                self._claimed.add((space.index, piece.start))
                return space, piece
            return None

    def _fill(self) -> None:
        while not self._stop and self._failure is None:
            found = self._next()
            if found is None:
                time.sleep(_PAUSE_S)
                continue
            space, piece = found
            for left in space.still(piece):
                with self._source.at(left) as chunk:
                    if not self._deliver(space, left, chunk):
                        time.sleep(_PAUSE_S)
            self._claimed.discard((space.index, piece.start))
            if self._rest_s:
                time.sleep(self._rest_s)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  whatever it is, the loop raises it
            self._failure = error


def _refused(space: Space, address: int, code: int) -> SmrError:
    if code == errno.ENOMEM:
        return SmrError(
            f"no memory for page {address:#x} of process {space.pid}",
            hint="raise the container's memory limit",
            code=Code.RESTORE_FAILED,
        )
    what = "has no memory that CRIU registered" if code == errno.ENOENT else f"takes no page: {os.strerror(code)}"
    return SmrError(f"process {space.pid} {what} at {address:#x}", hint="restore with smr.pages=fill", code=Code.RESTORE_FAILED)
