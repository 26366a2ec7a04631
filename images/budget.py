"""How many restores of a node fill memory at a time, and whether there is memory for one more.

    RUN/fills/lock      flock: held while tickets are made, read or changed, never while waiting
    RUN/fills/NUMBER    a ticket: one fill, waiting or admitted; flocked by its holder. Numbers grow, so they are the order

A ticket is 24 bytes: u64 state (0 waiting, 1 admitted), u64 bytes to populate, u64 bytes populated so far. It counts while its
flock is held, so a fill that is killed gives its place back at once, and its file goes with the next one's visit.

Admitted are those in front, at most `Limits.fills` at a time, each for which there is memory: what is available (page cache
counts, pinned images do not), less what the admitted ones have still to populate. Who waits for memory lets others pass for whom
there is enough: it would hold up the node for one container that may never fit. Nobody waits for ever.

Why two at a time: one alone leaves the memory idle while it starts and ends. Ten at once, each with all processors, took about as
long together or longer, and each came to its end when the last did; by twos the middle one had ended in half of that time.

A process that is forked while a slot is held, and does not exec, holds the slot as well.
Standard library only.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from smr.images.files import locked, try_lock
from smr.images.pagecache import meminfo, node_available_bytes
from smr.proto.errors import Code, SmrError

_TICKET = struct.Struct("=QQQ")
_WAITING, _ADMITTED = 0, 1
_POLL_S = 0.01
_POLL_MOST_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`fills`: how many at a time; `wait_s`: how long one waits for its turn and for memory."""

    fills: int = 2
    wait_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ticket:
    number: int
    state: int
    total_bytes: int
    done_bytes: int

    @property
    def pending_bytes(self) -> int:
        """What it has still to populate."""
        return max(0, self.total_bytes - self.done_bytes) if self.state == _ADMITTED else 0


class Slot:
    """The right to fill. `threads` is this fill's part of the machine's processors."""

    def __init__(self, fd: int, total_bytes: int, threads: int) -> None:
        self._fd = fd
        self._total_bytes = total_bytes
        self.threads = threads

    def populated(self, done_bytes: int) -> None:
        """Say how much is done, now and then: what is populated is no longer available, and would count twice."""
        os.pwrite(self._fd, _TICKET.pack(_ADMITTED, self._total_bytes, done_bytes), 0)


@contextmanager
def fill_slot(
    run_dir: Path, size_bytes: int, limits: Limits | None = None, *, available: Callable[[], int] = node_available_bytes
) -> Iterator[Slot]:
    """Wait for a place to populate `size_bytes` of memory, and hold it for as long as the block lasts.

    Raises MEMORY_LIMIT when there is not that much memory in time (at once when the machine has less), TIMEOUT when others keep
    the places. Limits of cgroups are not looked at: ours does not pay, and the container's is for who knows the container.
    `available` is for tests.
    """
    limits = limits or Limits()
    _check_machine(size_bytes)
    folder = run_dir / "fills"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    number, fd = _take(folder, size_bytes)
    try:
        active = _wait(folder, number, fd, size_bytes, limits, available)
        yield Slot(fd, size_bytes, max(1, len(os.sched_getaffinity(0)) // active))
    finally:
        with suppress(OSError):
            (folder / str(number)).unlink()
        os.close(fd)


def pending_bytes(run_dir: Path) -> int:
    """What the admitted fills of this node have still to populate."""
    folder = run_dir / "fills"
    if not folder.is_dir():
        return 0
    with locked(folder / "lock"):
        return sum(ticket.pending_bytes for ticket in _tickets(folder))


def _check_machine(size_bytes: int) -> None:
    total = meminfo()["MemTotal"]
    if size_bytes > total:
        raise _memory(size_bytes, f"found {total} bytes in the machine")


def _take(folder: Path, size_bytes: int) -> tuple[int, int]:
    """A ticket behind all others. It is locked before anyone can see it, since the folder's lock is held."""
    with locked(folder / "lock"):
        number = max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0) + 1
        fd = os.open(folder / str(number), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.pwrite(fd, _TICKET.pack(_WAITING, size_bytes, 0), 0)
        return number, fd


def _tickets(folder: Path, own: int = 0) -> list[_Ticket]:
    """Those of living holders, in order; the others are removed. The folder's lock is held."""
    found = []
    for number in sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()):
        path = folder / str(number)
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its holder has just ended
        try:
            if number != own and try_lock(fd, fcntl.LOCK_SH):
                path.unlink(missing_ok=True)
                continue
            data = os.pread(fd, _TICKET.size, 0)
        finally:
            os.close(fd)
        if len(data) == _TICKET.size:
            state, total, done = _TICKET.unpack(data)
            found.append(_Ticket(number=number, state=state, total_bytes=total, done_bytes=done))
    return found


def _wait(folder: Path, number: int, fd: int, size_bytes: int, limits: Limits, available: Callable[[], int]) -> int:
    """Wait for the turn; returns how many fills are admitted then, this one included."""
    deadline = time.monotonic() + limits.wait_s
    while True:
        with locked(folder / "lock"):
            tickets = _tickets(folder, number)
            admitted = [ticket for ticket in tickets if ticket.state == _ADMITTED]
            room = available() - sum(ticket.pending_bytes for ticket in admitted)
            fitting = [ticket for ticket in tickets if ticket.state == _WAITING and ticket.number < number]
            ahead = sum(ticket.total_bytes <= room for ticket in fitting)
            turn = len(admitted) + ahead < max(1, limits.fills)
            if turn and size_bytes <= room:
                os.pwrite(fd, _TICKET.pack(_ADMITTED, size_bytes, 0), 0)
                return len(admitted) + 1
        if time.monotonic() > deadline:
            if size_bytes > room:
                raise _memory(size_bytes, f"found {max(0, room)} bytes available beside {len(admitted)} other restores")
            raise SmrError(
                f"{len(admitted) + ahead} other restores kept this one waiting for {limits.wait_s:g} s",
                hint="raise fills or fill_wait_s in /etc/smr/smr.toml, or start fewer containers at once",
                code=Code.TIMEOUT,
            )
        # Who is next looks often; a long queue does not keep the lock busy.
        time.sleep(min(_POLL_MOST_S, _POLL_S * (1 + ahead)))


def _memory(size_bytes: int, found: str) -> SmrError:
    return SmrError(
        f"not enough memory for a restore: needed {size_bytes} bytes, {found}",
        hint="end other containers, 'smr unpin' images, or restore on a node with more memory",
        code=Code.MEMORY_LIMIT,
        needed_bytes=size_bytes,
    )
