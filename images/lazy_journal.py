"""What outlives a server that is killed: memory that its processes share, with the events that were read and what was done.

    header    u64 records, finished, ending, handed_on, copied_bytes, faults, deaths, connection; at 256 the reason
    records   u32 kind, u32 space, u64 0, 32s message       `records` of them, and the one that is being read
    runs      u8, 1 when the whole run was delivered where the table puts it, by its number in the table

The kernel writes an event straight into the record after the last, so that whoever comes next finds it there if the reader was
killed at once. A record counts when `records` says so; the one after the last is handled (again) by who finds it. Faults are read
there too and never count: who waits for one asks again. A fork's descriptor is in the record and in the table of descriptors
that the processes share.

One process writes, and in it one thread but for `delivered`, the counters, and `end`.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from smr.images import uffd
from smr.images.uffd import Event, Message, build_message, parse_message

CAPACITY = 1 << 15
# Room besides, for what follows from the last event.
_RESERVE = 1024
_HEADER_BYTES = 4096
_REASON = (256, 1024)
_RECORD = struct.Struct("<IIQ32s")
_LONG = struct.Struct("<Q")
_REGISTRATION = struct.Struct("<iiii16x")
_EMPTY, _EVENT, _REGISTERED = 0, 1, 2


class Ending(IntEnum):
    """How the work ended."""

    RUNNING = 0
    DONE = 1
    FAILED = 2


class Registration(NamedTuple):
    """A task that CRIU announced: its pid in the image and here, and descriptors: its userfaultfd, its pidfd or -1."""

    pid: int
    host_pid: int
    fd: int
    pidfd: int


class Journal:
    """The memory. Made before the processes that share it."""

    def __init__(self, runs: int, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self._runs_at = _HEADER_BYTES + (capacity + _RESERVE) * _RECORD.size
        self._runs = runs
        self._memory = mmap.mmap(-1, self._runs_at + runs, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        uffd.keep_resident(self._memory)
        self._address = uffd.address_of(self._memory)

    def _get(self, field: int) -> int:
        value: int = _LONG.unpack_from(self._memory, field * _LONG.size)[0]
        return value

    def _set(self, field: int, value: int) -> None:
        _LONG.pack_into(self._memory, field * _LONG.size, value)

    @property
    def records(self) -> int:
        """How many there are."""
        return self._get(0)

    @property
    def full(self) -> bool:
        """Whether there is no room for another record."""
        return self.records >= self.capacity

    @property
    def finished(self) -> bool:
        """Whether CRIU said that all tasks are restored."""
        return bool(self._get(1))

    def finish(self) -> None:
        """CRIU said so."""
        self._set(1, 1)

    @property
    def ending(self) -> Ending:
        """How the work ended."""
        return Ending(self._get(2))

    @property
    def reason(self) -> str:
        """Why it failed."""
        return bytes(self._memory[_REASON[0] : _REASON[1]]).rstrip(b"\0").decode(errors="replace")

    def end(self, ending: Ending, reason: str = "") -> None:
        """The work has ended; the first reason stays."""
        if self.ending is Ending.RUNNING:
            data = reason.encode()[: _REASON[1] - _REASON[0]]
            self._memory[_REASON[0] : _REASON[0] + len(data)] = data
            self._set(2, ending)

    @property
    def handed_on(self) -> bool:
        """Whether another keeper is in charge, with a journal of its own."""
        return bool(self._get(3))

    def hand_on(self) -> None:
        """Another keeper is in charge."""
        self._set(3, 1)

    @property
    def copied_bytes(self) -> int:
        """Bytes delivered; a hint only, as several threads count."""
        return self._get(4)

    @property
    def faults(self) -> int:
        """Faults answered."""
        return self._get(5)

    @property
    def deaths(self) -> int:
        """Processes of the server that were killed."""
        return self._get(6)

    @property
    def connected(self) -> int:
        """The descriptor of CRIU's connection and 1, or 0."""
        return self._get(7)

    def connect(self, value: int) -> None:
        """Keep it."""
        self._set(7, value)

    def count(self, *, copied_bytes: int = 0, faults: int = 0, deaths: int = 0) -> None:
        """Add to the counters."""
        for field, more in ((4, copied_bytes), (5, faults), (6, deaths)):
            if more:
                self._set(field, self._get(field) + more)

    def inherit(self, other: Journal) -> None:
        """Take over header and counters of a journal whose records are not needed any more; not that it was handed on."""
        for field in (1, 4, 5, 6, 7):
            self._set(field, other._get(field))

    def prepare(self, space: int) -> int:
        """The address to read a message of a space to."""
        at = _HEADER_BYTES + self.records * _RECORD.size
        _RECORD.pack_into(self._memory, at, _EMPTY, space, 0, b"")
        _RECORD.pack_into(self._memory, at, _EVENT, space, 0, b"")
        return self._address + at + 16

    def message(self) -> Message:
        """The one that was read there."""
        at = _HEADER_BYTES + self.records * _RECORD.size + 16
        return parse_message(self._memory[at : at + uffd.MESSAGE_BYTES])

    def commit(self, extra: Sequence[tuple[int, Message]] = ()) -> None:
        """It counts, and with it, at once, events that nobody sent but that follow from it. ValueError for too many."""
        if len(extra) >= _RESERVE - 1:
            raise ValueError(f"{len(extra)} events follow from one")
        number = self.records + 1
        for space, message in extra:
            data = build_message(message)
            _RECORD.pack_into(self._memory, _HEADER_BYTES + number * _RECORD.size, _EVENT, space, 0, data)
            number += 1
        self._set(0, number)

    def register(self, task: Registration) -> None:
        """Add a task."""
        at = _HEADER_BYTES + self.records * _RECORD.size
        _RECORD.pack_into(self._memory, at, _REGISTERED, 0, 0, _REGISTRATION.pack(*task))
        self.commit()

    def replay(self) -> Iterator[Registration | tuple[int, Message]]:
        """All that counts, in order: tasks, and events with their space."""
        for number in range(self.records):
            kind, space, _, data = _RECORD.unpack_from(self._memory, _HEADER_BYTES + number * _RECORD.size)
            yield Registration(*_REGISTRATION.unpack(data)) if kind == _REGISTERED else (space, parse_message(data))

    def leftover(self) -> tuple[int, Message] | None:
        """An event that was read and does not count: its reader was killed, or it changed nothing."""
        kind, space, _, data = _RECORD.unpack_from(self._memory, _HEADER_BYTES + self.records * _RECORD.size)
        if kind != _EVENT or (message := parse_message(data)).event in (Event.NONE, Event.PAGEFAULT):
            return None
        return space, message

    def deliver(self, run: int) -> None:
        """A run is where the table puts it."""
        self._memory[self._runs_at + run] = 1

    def delivered(self) -> Iterator[int]:
        """Numbers of such runs."""
        data = self._memory[self._runs_at : self._runs_at + self._runs]
        at = data.find(1)
        while at >= 0:
            yield at
            at = data.find(1, at + 1)
