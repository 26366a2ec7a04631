"""Memory that one thread of a stopped process reads while it is being filled."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from smr.images.spans import Span
from smr.proto.errors import SmrError
from smr.shim.gpu.gate import Gate, empty
from smr.shim.gpu.onethread import OneThread
from tests.integration.command import eventually

MIB = 1 << 20
SIZE = 80 * MIB
CHUNK = 2 * MIB
# A thread that hashes an area when it is told to; the first thread only counts. The area does not begin at a huge page's border.
PROGRAM = f"""
import ctypes, hashlib, mmap, os, sys, threading, time
area = mmap.mmap(-1, {SIZE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
start = ctypes.addressof(ctypes.c_char.from_buffer(area))
told, tell = int(sys.argv[1]), int(sys.argv[2])
def read():
    os.read(told, 1)
    with memoryview(area) as view:
        os.write(tell, hashlib.sha1(view).hexdigest().encode())
    os.read(told, 1)
thread = threading.Thread(target=read)
thread.start()
print(start, thread.native_id, flush=True)
thread.join()
with memoryview(area) as view:
    print(hashlib.sha1(view).hexdigest(), flush=True)
"""


class Reader:
    """The program, stopped before its thread has read anything."""

    def __init__(self, process: subprocess.Popen[str], told: int, tell: int) -> None:
        assert process.stdout is not None
        self.process, self.pid, self._told, self._tell = process, process.pid, told, tell
        start, tid = process.stdout.readline().split()
        self.area: Span = (int(start), int(start) + SIZE)
        self.tid = int(tid)
        os.kill(self.pid, signal.SIGSTOP)
        eventually(lambda: set(self.states()) == {"T"}, what="the program is stopped")

    def states(self) -> list[str]:
        """State letters of its threads."""
        stats = (task / "stat" for task in Path(f"/proc/{self.pid}/task").iterdir())
        return [stat.read_text().rpartition(")")[2].split()[0] for stat in stats]

    def go(self) -> None:
        """Let the thread pass its next read of the pipe."""
        os.write(self._told, b".")

    def digest(self) -> str:
        """What the thread has read."""
        return os.read(self._tell, 40).decode()

    def end(self) -> str:
        """Continue all of it; what the first thread finds in the same memory."""
        os.kill(self.pid, signal.SIGCONT)
        self.go()
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def put(self, address: int, data: bytes) -> None:
        """Write into its memory, from outside."""
        with Path(f"/proc/{self.pid}/mem").open("r+b", buffering=0) as memory:
            memory.seek(address)
            memory.write(data)

    def maps(self) -> list[str]:
        """Its private anonymous mappings, those that touch joined, without their flags."""
        joined: list[list[int]] = []
        for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines():
            words = line.split()
            if len(words) == 5 and words[1] in ("rw-p", "---p"):
                start, end = (int(word, 16) for word in words[0].split("-"))
                if joined and joined[-1][1] == start and words[1] == "rw-p":
                    joined[-1][1] = end
                else:
                    joined.append([start, end])
        return [f"{start:x}-{end:x}" for start, end in joined]


@contextmanager
def reader() -> Iterator[Reader]:
    told, tell = os.pipe(), os.pipe()
    argv = [sys.executable, "-c", PROGRAM, str(told[0]), str(tell[1])]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, pass_fds=(told[0], tell[1]))
    with process:
        try:
            yield Reader(process, told[1], tell[0])
        finally:
            process.kill()
            for fd in (*told, *tell):
                os.close(fd)


def chunks(one: Reader, *, holes: bool) -> list[tuple[int, bytes]]:
    """What is filled: every second chunk is left zero with `holes`."""
    found = []
    for number, address in enumerate(range(one.area[0], one.area[1], CHUNK)):
        if not (holes and number % 2):
            found.append((address, bytes([number % 255 + 1]) * min(CHUNK, one.area[1] - address)))
    return found


def expected(one: Reader, parts: list[tuple[int, bytes]]) -> str:
    """The digest of the area."""
    memory = bytearray(SIZE)
    for address, data in parts:
        memory[address - one.area[0] : address - one.area[0] + len(data)] = data
    return hashlib.sha1(memory).hexdigest()


def spans(parts: list[tuple[int, bytes]]) -> list[Span]:
    """Where they belong."""
    return [(address, address + len(data)) for address, data in parts]


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("order", ["ascending", "shuffled", "last first"])
def test_the_thread_reads_what_is_filled_behind_it(order: str, holes: bool) -> None:
    """It begins before the first page is there, and never reads anything but what is put there in the end."""
    with reader() as one:
        parts = chunks(one, holes=holes)
        before = one.maps()
        assert empty(one.pid, one.area)
        todo = list(parts)
        if order == "shuffled":
            random.Random(1).shuffle(todo)
        if order == "last first":
            todo.reverse()
        with OneThread(one.pid, one.tid, gates=[one.area]):
            with Gate(one.pid, [one.area], spans(parts)) as gate:
                one.go()
                for address, data in todo:
                    place = gate.away(address)
                    assert place is not None
                    one.put(place, data)
                    gate.delivered([(place, place + len(data))])
            assert one.digest() == expected(one, parts)
        assert one.maps() == before
        assert one.end() == expected(one, parts)


def test_a_touch_before_the_first_page_waits() -> None:
    """The thread stands at the gate and has told nothing until it is filled; it does not end of the fault."""
    with reader() as one:
        parts = chunks(one, holes=False)
        with OneThread(one.pid, one.tid, gates=[one.area]), Gate(one.pid, [one.area], spans(parts)) as gate:
            one.go()
            heard: list[str] = []
            listener = threading.Thread(target=lambda: heard.append(one.digest()))
            listener.start()
            time.sleep(0.2)
            assert not heard
            assert one.process.poll() is None
            for address, data in parts:
                place = gate.away(address)
                assert place is not None
                one.put(place, data)
                gate.delivered([(place, place + len(data))])
            gate.__exit__(None, None, None)
            listener.join()
            assert heard == [expected(one, parts)]


def test_spans_of_several_runs_are_counted_whole() -> None:
    """What is delivered may be more than one run at a time."""
    with reader() as one:
        parts = chunks(one, holes=False)
        with OneThread(one.pid, one.tid, gates=[one.area]):
            with Gate(one.pid, [one.area], spans(parts)) as gate:
                one.go()
                for first, second in zip(parts[::2], parts[1::2], strict=True):
                    place = gate.away(first[0])
                    assert place is not None
                    one.put(place, first[1] + second[1])
                    gate.delivered([(place, place + 2 * CHUNK)])
            assert one.digest() == expected(one, parts)


def test_memory_with_a_page_in_it_is_not_empty() -> None:
    """A page that is there already, such as one that CRIU has put there, keeps the gate from being used."""
    with reader() as one:
        one.put(one.area[0] + 40 * MIB, b"x")
        assert not empty(one.pid, one.area)
        assert not empty(one.pid, (one.area[0], one.area[1] + 4096 * 1024))


def test_a_process_that_is_killed_is_an_error_that_names_it() -> None:
    """The gate's end says so, and nothing hangs."""
    with reader() as one:
        parts = chunks(one, holes=False)
        with pytest.raises(SmrError, match=str(one.pid)), Gate(one.pid, [one.area], spans(parts)) as gate:
            one.process.kill()
            one.process.wait()
            gate.delivered([(gate.away(parts[0][0]) or 0, (gate.away(parts[0][0]) or 0) + SIZE)])


def test_addresses_elsewhere_have_no_place() -> None:
    """Only pages of the areas are kept away."""
    with reader() as one, Gate(one.pid, [one.area], []) as gate:
        assert gate.away(one.area[0] - 1) is None
        assert gate.away(one.area[1]) is None
        assert gate.away(one.area[1] - 1) is not None


def test_a_fault_elsewhere_is_the_process_s_own() -> None:
    """A thread that touches memory outside the gates gets its signal as ever."""
    with reader() as one:
        gate = Gate(one.pid, [one.area], spans(chunks(one, holes=False)))
        with OneThread(one.pid, one.tid, gates=[(4096, 8192)]), pytest.raises(SmrError, match=r"gone|ended"), gate:
            one.go()
            eventually(lambda: one.process.poll() == -signal.SIGSEGV, what="the process died of its fault")
