"""A GPU driver and processes that use it, neither of them real: tests/fakes/libcuda.c and threads.c, compiled here."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.integration.command import eventually, run

FAKES = Path(__file__).parents[1] / "fakes"
_FLAGS = ["-O1", "-Wall", "-Wextra", "-Werror"]
_SLOTS = {"ready": 0, "restore_tid": 1, "restore": 2, "handled": 3, "handled_by": 4, "spawned_tid": 5, "spawned": 6}
_WORKER = 7


def compile_driver(out: Path, *flags: str) -> Path:
    """The fake libcuda.so.1; with -DOLD_DRIVER one without checkpoint calls."""
    run(["cc", *_FLAGS, *flags, "-shared", "-fPIC", "-o", out, FAKES / "libcuda.c"])
    return out


def compile_program(out: Path) -> Path:
    """The program of several threads."""
    run(["cc", *_FLAGS, "-pthread", "-o", out, FAKES / "threads.c"])
    return out


@dataclass
class Target:
    """One running threads.c. `restore_tid` is its restore thread; `counts` tells what each of its threads has done."""

    process: subprocess.Popen[bytes]
    folder: Path
    workers: int
    _map: mmap.mmap = field(init=False)

    def __post_init__(self) -> None:
        file = self.folder / f"{self.pid}.counts"
        eventually(lambda: file.stat().st_size == 512, what="the program's counters")
        with file.open("r+b") as stream:
            self._map = mmap.mmap(stream.fileno(), 512)
        eventually(lambda: self.slot("ready") and self.slot("restore_tid") and all(self.counts()), what="all threads")

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def restore_tid(self) -> int:
        return self.slot("restore_tid")

    def slot(self, name: str) -> int:
        return struct.unpack_from("<Q", self._map, 8 * _SLOTS[name])[0]

    def counts(self) -> list[int]:
        """What the threads other than the restore thread have done."""
        others = self.workers + (self.restore_tid != self.pid)
        return list(struct.unpack_from(f"<{others}Q", self._map, 8 * _WORKER))

    def states(self) -> dict[int, str]:
        """The state letter of every thread."""
        return {tid: self.field(tid, "State")[0] for tid in self.threads()}

    def threads(self) -> list[int]:
        return sorted(int(task.name) for task in Path(f"/proc/{self.pid}/task").iterdir())

    def field(self, tid: int, name: str) -> str:
        """A line of a thread's status."""
        lines = Path(f"/proc/{self.pid}/task/{tid}/status").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:"))

    def blocked(self, tid: int) -> int:
        return int(self.field(tid, "SigBlk"), 16)

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        eventually(self.stopped, what="all threads stopped")

    def stopped(self) -> bool:
        return set(self.states().values()) == {"T"}

    def goes_on(self) -> None:
        """After SIGCONT every thread makes progress."""
        os.kill(self.pid, signal.SIGCONT)
        before, restore = self.counts(), self.slot("restore")
        eventually(lambda: all(now > then for now, then in zip(self.counts(), before, strict=True)), what="the threads")
        eventually(lambda: self.slot("restore") > restore, what="the restore thread")


@dataclass(frozen=True)
class FakeCuda:
    """The fake driver's folder, and the programs."""

    folder: Path
    program: Path

    @contextlib.contextmanager
    def target(self, *, workers: int = 3, restore: str = "other", state: int = 0, asks: bool = True) -> Iterator[Target]:
        """A process with CUDA, `restore`: main or other thread; killed in the end."""
        process = subprocess.Popen([self.program, self.folder, str(workers), restore])
        try:
            target = Target(process, self.folder, workers)
            (self.folder / f"{target.pid}.thread").write_text(str(target.restore_tid))
            if asks:
                (self.folder / f"{target.pid}.asks").touch()
            self.set_state(target.pid, state)
            yield target
        finally:
            process.kill()
            process.wait()

    def set_state(self, pid: int, state: int) -> None:
        (self.folder / f"{pid}.state").write_text(str(state))

    def state(self, pid: int) -> int:
        return int((self.folder / f"{pid}.state").read_text())

    def fault(self, call: str, pid: int, words: str) -> None:
        """What the next `call` of this process is to do: see libcuda.c."""
        (self.folder / f"fault.{call}.{pid}").write_text(words)

    def log(self) -> list[tuple[str, int, str, int, int]]:
        """Call, process, "begin" or "end", nanoseconds, caller: in order."""
        file = self.folder / "log"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(call, int(pid), what, int(at), int(caller)) for call, pid, what, at, caller in map(str.split, lines)]

    def calls(self, *names: str) -> list[tuple[str, int, str]]:
        """The log without times, of some calls."""
        return [(call, pid, what) for call, pid, what, _, _ in self.log() if call in names]
