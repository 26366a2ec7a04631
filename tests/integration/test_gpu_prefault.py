"""Memory that is made ready in another process while that process writes there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from smr.shim.gpu.prefault import Prefault, areas
from tests.integration.command import eventually

MIB = 1 << 20
SIZE = 96 * MIB
# Maps an area on request, writes into part of it, and says whether what it finds is what it wrote, and zeros elsewhere.
PROGRAM = f"""
import mmap, sys, threading, time
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
def line(text):
    print(text, flush=True)
    return sys.stdin.readline()
line("up")
area = mmap.mmap(-1, {SIZE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
block = bytes(range(256)) * 4096
for number in range(0, 96, 2):
    area[number * {MIB} : number * {MIB} + len(block)] = block
line("written")
even = all(area[number * {MIB} : (number + 1) * {MIB}] == block for number in range(0, 96, 2))
odd = all(not any(area[number * {MIB} : (number + 1) * {MIB}]) for number in range(1, 96, 2))
line(f"{{even}} {{odd}}")
"""


class Writer:
    """The program, line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid

    def hear(self) -> str:
        """Its next line."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def say(self) -> None:
        """Let it go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def mapped(self) -> dict[str, int]:
        """Sizes of its large area in KiB, by name of /proc/PID/smaps, parts added up."""
        found: dict[str, int] = {}
        ours = False
        for line in Path(f"/proc/{self.pid}/smaps").read_text().splitlines():
            words = line.split()
            if "-" in words[0] and not words[0].endswith(":"):
                start, _, end = words[0].partition("-")
                ours = any(first <= int(start, 16) and int(end, 16) <= last for first, last in self.span)
            elif ours and words[-1] == "kB":
                found[words[0]] = found.get(words[0], 0) + int(words[1])
        return found

    @property
    def span(self) -> list[tuple[int, int]]:
        """Its large areas."""
        return areas(self.pid)


@contextmanager
def writer() -> Iterator[Writer]:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            yield Writer(process)
        finally:
            process.kill()


def test_pages_are_made_and_nothing_is_written() -> None:
    """All of a new area is in memory although its owner wrote every second MiB; it finds its bytes there, and zeros between."""
    with writer() as one:
        assert one.hear() == "up"
        with Prefault(one.pid, SIZE) as prefault:
            one.say()
            assert one.hear() == "written"
            eventually(lambda: one.mapped().get("Rss:") == SIZE >> 10, what="all of it is in memory")
        assert prefault.made_bytes >= SIZE
        one.say()
        assert one.hear() == "True True"


def test_no_more_than_is_expected_is_made() -> None:
    """An area that is larger than what the driver has to bring is left as it is behind that."""
    with writer() as one:
        one.hear()
        with Prefault(one.pid, SIZE - 16 * MIB) as prefault:
            one.say()
            one.hear()
            eventually(lambda: prefault.made_bytes >= SIZE - 16 * MIB, what="what is expected is made")
        # Of the last 16 MiB the owner wrote every second MiB; a huge page holds two.
        assert prefault.made_bytes == SIZE - 16 * MIB


def test_areas_that_were_there_are_left_alone() -> None:
    """Only what is mapped while it watches is the driver's."""
    with writer() as one:
        one.hear()
        one.say()
        assert one.hear() == "written"
        before = one.mapped()["Rss:"]
        with Prefault(one.pid, SIZE) as prefault:
            one.say()
            assert one.hear() == "True True"
        assert prefault.made_bytes == 0
        assert before < SIZE >> 10


@pytest.mark.parametrize("expected_bytes", [0, MIB])
def test_a_little_is_not_worth_it(expected_bytes: int) -> None:
    """Nothing is started for a process with little on its GPU."""
    with writer() as one:
        one.hear()
        with Prefault(one.pid, expected_bytes) as prefault:
            one.say()
            assert one.hear() == "written"
        assert prefault.made_bytes == 0


def test_a_process_that_ends_meanwhile_is_no_error() -> None:
    """The block ends as it would have without."""
    with writer() as one:
        one.hear()
        with Prefault(one.pid, SIZE):
            one.say()
            one.process.kill()
            one.process.wait()
        assert areas(one.pid) == []
