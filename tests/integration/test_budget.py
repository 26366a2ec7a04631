"""Slots of fills across real processes: how many at a time, in which order, with what memory, and what a killed one leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from smr.images.budget import Limits, fill_slot, pending_bytes
from smr.images.pagecache import meminfo
from smr.proto.errors import Code, SmrError
from tests.integration.command import eventually

MIB = 1 << 20
# Says "in" when it is admitted, and ends when its standard input does.
HOLDER = """
import sys
from pathlib import Path
from smr.images.budget import Limits, fill_slot
from smr.proto.errors import SmrError
run, size, fills, wait_s, available = Path(sys.argv[1]), *map(float, sys.argv[2:])
try:
    with fill_slot(run, int(size), Limits(fills=int(fills), wait_s=wait_s), available=lambda: int(available)) as slot:
        print("in", slot.threads, flush=True)
        for line in sys.stdin:
            slot.populated(int(line))
            print("done", flush=True)
except SmrError as error:
    print(error.code, flush=True)
"""


class Holder:
    """A process that asks for a slot."""

    def __init__(
        self, stack: ExitStack, run_dir: Path, size: int = MIB, *, fills: int = 2, wait_s: float = 60, available: int = 1 << 40
    ) -> None:
        argv = [sys.executable, "-c", HOLDER, *map(str, (run_dir, size, fills, wait_s, available))]
        pipe = subprocess.PIPE
        self.process = stack.enter_context(subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True))
        stack.callback(self.process.kill)

    def line(self) -> str:
        """The next thing it says."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def populated(self, count: int) -> None:
        """It says how far it is."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        assert self.line() == "done"

    def end(self) -> None:
        """It gives its slot back."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Ends the processes of a test."""
    with ExitStack() as stack:
        yield stack


def tickets(run_dir: Path) -> int:
    """How many have asked and are not done."""
    return sum(path.name.isdigit() for path in (run_dir / "fills").glob("*"))


def waiting(run_dir: Path, count: int) -> Callable[[], bool]:
    """Whether so many have their ticket."""
    return lambda: tickets(run_dir) == count


def test_as_many_at_a_time_as_the_limit_says_in_order(tmp_path: Path, stack: ExitStack) -> None:
    """The next one begins when one ends, and it is the one that came first."""
    holders = []
    for number in range(5):
        holders.append(Holder(stack, tmp_path))
        eventually(waiting(tmp_path, number + 1))
    order = []
    for holder in holders[:2]:
        assert holder.line().startswith("in")
    for number in range(2, 5):
        assert pending_bytes(tmp_path) == 2 * MIB
        holders[number - 2].end()
        order.append(holders[number].line().split()[0])
    assert order == ["in"] * 3
    for holder in holders[3:]:
        holder.end()
    assert (tickets(tmp_path), pending_bytes(tmp_path)) == (0, 0)


def test_killed_holder_gives_its_slot_back(tmp_path: Path, stack: ExitStack) -> None:
    """One that waits, and one that fills: kill -9 leaves neither a slot nor memory taken."""
    first, second = Holder(stack, tmp_path, fills=1), None
    assert first.line().startswith("in")
    second = Holder(stack, tmp_path, fills=1)
    eventually(waiting(tmp_path, 2))
    third = Holder(stack, tmp_path, fills=1)
    eventually(waiting(tmp_path, 3))
    os.kill(second.process.pid, signal.SIGKILL)
    os.kill(first.process.pid, signal.SIGKILL)
    assert third.line().startswith("in")
    assert pending_bytes(tmp_path) == MIB
    assert tickets(tmp_path) == 1


def test_memory_that_others_will_populate_is_taken(tmp_path: Path, stack: ExitStack) -> None:
    """Of 100 MiB two fills of 60 cannot be; when the first has populated its own, what is available says the rest."""
    first = Holder(stack, tmp_path, 60 * MIB, available=100 * MIB)
    assert first.line().startswith("in")
    second = Holder(stack, tmp_path, 60 * MIB, available=100 * MIB)
    eventually(waiting(tmp_path, 2))
    assert pending_bytes(tmp_path) == 60 * MIB
    first.populated(10 * MIB)
    assert pending_bytes(tmp_path) == 50 * MIB
    first.populated(20 * MIB)
    assert second.line().startswith("in")
    assert pending_bytes(tmp_path) == 100 * MIB


def test_memory_that_does_not_come_is_an_error(tmp_path: Path, stack: ExitStack) -> None:
    """After the time that a restore waits; the message has what was needed and what was found."""
    first = Holder(stack, tmp_path, 60 * MIB)
    assert first.line().startswith("in")
    with pytest.raises(SmrError, match=f"needed {60 * MIB} bytes, found {40 * MIB} bytes available beside 1 other") as caught:
        enter(tmp_path, 60 * MIB, Limits(wait_s=0.05), 100 * MIB)
    assert caught.value.code is Code.MEMORY_LIMIT
    assert tickets(tmp_path) == 1


def test_more_than_the_machine_has_is_refused_at_once(tmp_path: Path) -> None:
    """Waiting would not help: an hour is allowed here."""
    with pytest.raises(SmrError, match="in the machine") as caught:
        enter(tmp_path, meminfo()["MemTotal"] + 1, Limits(wait_s=3600), 1 << 60)
    assert caught.value.code is Code.MEMORY_LIMIT


def test_one_that_waits_for_memory_lets_others_pass(tmp_path: Path, stack: ExitStack) -> None:
    """The large one may never fit; the small one behind it does."""
    large = Holder(stack, tmp_path, 200 * MIB, available=100 * MIB, wait_s=60)
    eventually(waiting(tmp_path, 1))
    small = Holder(stack, tmp_path, MIB, fills=1, available=100 * MIB)
    assert small.line().startswith("in")
    assert large.process.poll() is None


def test_turn_that_does_not_come_is_a_timeout(tmp_path: Path, stack: ExitStack) -> None:
    """With memory enough, it is the others that kept the places."""
    first = Holder(stack, tmp_path, fills=1)
    assert first.line().startswith("in")
    assert Holder(stack, tmp_path, fills=1, wait_s=0.1).line() == "timeout"


def test_processors_are_shared_out(tmp_path: Path, stack: ExitStack) -> None:
    """A fill that is alone gets all of them, the second half; never none."""
    processors = len(os.sched_getaffinity(0))
    assert [Holder(stack, tmp_path, fills=3).line() for _ in range(3)] == [
        f"in {max(1, processors // active)}" for active in (1, 2, 3)
    ]


def test_ticket_that_was_cut_is_no_fill(tmp_path: Path) -> None:
    """What a full disk or a killed process left there counts for nothing, and goes."""
    (tmp_path / "fills").mkdir()
    (tmp_path / "fills/7").write_bytes(b"xx")
    assert enter(tmp_path, MIB, Limits(fills=1, wait_s=5), 1 << 40) >= 1
    assert tickets(tmp_path) == 0


def enter(run_dir: Path, size: int, limits: Limits, available: int) -> int:
    """Take a slot and give it back; the threads that came with it."""
    with fill_slot(run_dir, size, limits, available=lambda: available) as slot:
        return slot.threads
