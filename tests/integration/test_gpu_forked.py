"""Real forked children that hold a device give it up, and go on as if nothing had been; what is in the way is seen in real /proc.

The device is a node of our own for /dev/zero: its private mappings bear the node's path, as those of NVIDIA's devices do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from smr.proto.errors import Code, SmrError
from smr.shim import procs
from smr.shim.gpu import forked, inject, obstacles, processes, ptrace
from smr.shim.gpu.inject import Remote
from smr.shim.gpu.processes import Found, Held
from tests.integration.command import eventually, run

_SOURCE = Path(__file__).parents[1] / "fakes/waiter.c"
_X86 = platform.machine() == "x86_64"
_MAKEDEV_ZERO = os.makedev(1, 5)
# The system call that a waiting thread stands in: /proc/PID/syscall begins with it.
_CALLS = {"read": 0, "nanosleep": 230, "poll": 7, "futex": 202, "futex-timeout": 202, "sigsuspend": 130}
_RESTART_SYSCALL = 219


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A parent and its forked child; `program` is the parent's, whose stdin and stdout the child has too."""

    program: subprocess.Popen[bytes]
    pid: int
    device: Path

    @property
    def held(self) -> Held:
        """What the child holds of the device."""
        held = processes.holding(self.pid, device=self.is_device)
        assert held is not None
        return held

    @property
    def parent(self) -> int:
        """The process it was forked from."""
        return self.program.pid

    def is_device(self, path: str) -> bool:
        """Instead of NVIDIA's."""
        return path == str(self.device)

    def call(self) -> str:
        """The number of the system call that it waits in; "running"."""
        return Path(f"/proc/{self.pid}/syscall").read_text().split(maxsplit=1)[0]

    def state(self) -> str:
        """The letter of its state; empty when it is gone."""
        process = procs.describe(self.pid)
        return process.state if process else ""

    def end(self, byte: bytes = b"x") -> list[str]:
        """Give it the byte that it may wait for; all that it wrote, once it has ended well."""
        out, _ = self.program.communicate(byte, timeout=60)
        assert self.program.returncode == 0
        return out.decode().splitlines()


@pytest.fixture(scope="module")
def waiter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, compiled."""
    path = tmp_path_factory.mktemp("waiter") / "waiter"
    run(["gcc", "-Wall", "-Wextra", "-Werror", "-O2", "-pthread", "-o", path, _SOURCE])
    return path


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A device node that can be opened and mapped."""
    path = tmp_path / "nvidia0"
    try:
        os.mknod(path, 0o666 | 0o020000, _MAKEDEV_ZERO)
        path.open("rb").close()
    except OSError as error:
        pytest.skip(f"no device node can be made and opened here: {error}")
    return path


@pytest.fixture
def start(waiter: Path, device: Path) -> Iterator[Callable[[str], Worker]]:
    """Start a worker that waits in a way; all are killed at the end."""
    started: list[Worker] = []

    def begin(mode: str) -> Worker:
        program = subprocess.Popen([waiter, mode, device], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert program.stdout is not None
        assert select.select([program.stdout], [], [], 20)[0]
        child = int(program.stdout.readline().split()[1])
        worker = Worker(program=program, pid=child, device=device)
        started.append(worker)
        if mode in _CALLS and _X86:
            eventually(lambda: worker.call() == str(_CALLS[mode]), what=f"the child waits in {mode}")
        return worker

    yield begin
    for worker in started:
        for pid in (worker.pid, worker.parent):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        worker.program.wait()
        for stream in (worker.program.stdin, worker.program.stdout):
            with contextlib.suppress(OSError):
                assert stream is not None
                stream.close()


@pytest.fixture
def spun(start: Callable[[str], Worker]) -> Worker:
    """A worker that computes."""
    worker = start("spin")
    eventually(lambda: worker.state() == "R", what="the child computes")
    return worker


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("read", ["read 1 0", "byte x"]),
        ("nanosleep", ["nanosleep 0 0"]),
        ("poll", ["poll 0 0"]),
        ("futex", ["futex 0 0"]),
        ("futex-timeout", ["futex -1 110"]),
    ],
)
def test_waiting_child_gives_it_up_and_waits_on(start: Callable[[str], Worker], mode: str, said: list[str]) -> None:
    """Nothing is held afterwards, the parent holds all it had, and the child's wait ends as it would have: never with EINTR."""
    worker = start(mode)
    child, before = worker.held, processes.holding(worker.parent, device=worker.is_device)
    assert (len(child.descriptors), len(child.mappings)) == (2, 2)
    forked.release([child])
    assert processes.holding(worker.pid, device=worker.is_device) is None
    assert processes.holding(worker.parent, device=worker.is_device) == before
    assert worker.end() == said


def test_its_places_stay_taken(start: Callable[[str], Worker]) -> None:
    """Descriptors are of /dev/null with the same numbers and close-on-exec flags, mappings are memory that nothing may touch."""
    worker = start("read")
    child = worker.held
    forked.release([child])
    found = {one.number: one.path for one in processes.descriptors(worker.pid)}
    assert [found[one.number] for one in child.descriptors] == ["/dev/null", "/dev/null"]
    close_on_exec = [forked._close_on_exec(worker.pid, one.number, procs.PROC) for one in child.descriptors]
    assert close_on_exec == [os.O_CLOEXEC, 0]
    regions = list(processes.mappings(worker.pid))
    for one in child.mappings:
        assert any(r.start <= one.start and one.end <= r.end and r.permissions == "---p" and not r.path for r in regions)
    assert [one.number for one in processes.descriptors(worker.pid) if one.number not in (0, 1, 2)] == [
        one.number for one in child.descriptors
    ]


@pytest.mark.skipif(not _X86, reason="on arm64 the kernel rewinds a call before the stop")
@pytest.mark.parametrize("mode", ["nanosleep", "poll", "futex-timeout"])
def test_time_is_kept(start: Callable[[str], Worker], mode: str) -> None:
    """The kernel goes on with the wait's own deadline (restart_syscall), and not with the time it had at first."""
    worker = start(mode)
    with Remote(worker.pid) as remote:
        assert remote.call("getpid") == worker.pid
    eventually(lambda: worker.call() == str(_RESTART_SYSCALL), what="the wait goes on where it was")
    assert worker.end()[0].split()[2] in ("0", "110")


@pytest.mark.skipif(not _X86, reason="numbers of x86-64")
def test_signal_mask_of_a_wait_is_kept(start: Callable[[str], Worker]) -> None:
    """A thread in sigsuspend waits on with the mask of the call, and has its own one back afterwards."""
    worker = start("sigsuspend")
    forked.release([worker.held])
    eventually(lambda: worker.call() == str(_CALLS["sigsuspend"]))
    os.kill(worker.pid, signal.SIGUSR1)
    assert worker.end(b"") == ["sigsuspend -1 4", "blocked 1 ticks 1"]


def test_stopped_child_stays_stopped(start: Callable[[str], Worker]) -> None:
    """A child in a group stop makes the calls and is back in it; SIGCONT lets it go on."""
    worker = start("read")
    os.kill(worker.pid, signal.SIGSTOP)
    eventually(lambda: worker.state() == "T")
    forked.release([worker.held])
    assert processes.holding(worker.pid, device=worker.is_device) is None
    eventually(lambda: worker.state() == "T")
    os.kill(worker.pid, signal.SIGCONT)
    assert worker.end() == ["read 1 0", "byte x"]


def test_registers_are_kept(spun: Worker) -> None:
    """A child that computes is interrupted anywhere, many times, and its sums are right."""
    for _ in range(300):
        with Remote(spun.pid) as remote:
            assert remote.call("getpid") == spun.pid
    assert spun.end() == ["spin 1 0 1"]


def test_signals_meanwhile_are_not_lost_and_handlers_not_run_in_between(start: Callable[[str], Worker]) -> None:
    """A timer's signals every millisecond: they wait while the calls are made, and come afterwards."""
    worker = start("signals")
    for _ in range(300):
        with Remote(worker.pid) as remote:
            remote.call("getpid")
    forked.release([worker.held])
    assert worker.end() == ["spin 1 0 1", "ticked 1"]


def test_failed_call_gives_its_errno(spun: Worker) -> None:
    """An error of the call is an OSError with its number, and the process goes on."""
    with Remote(spun.pid) as remote, pytest.raises(OSError, match="close in process") as error:
        remote.call("close", 999)
    assert error.value.errno == 9
    assert spun.end() == ["spin 1 0 1"]


def test_thread_of_choice_makes_the_call(start: Callable[[str], Worker]) -> None:
    """The second thread, which waits for input, is interrupted; the first is left alone."""
    worker = start("futex")
    first, second = eventually(lambda: tasks if len(tasks := processes.tasks(worker.pid)) == 2 else None)
    with Remote(worker.pid, second) as remote:
        assert remote.call("getpid") == worker.pid
        assert ptrace.tracer(second) == os.getpid()
        assert ptrace.tracer(first) == 0
    assert worker.end() == ["futex 0 0"]


def test_many_children_at_once(start: Callable[[str], Worker]) -> None:
    """As many as a server has compile workers."""
    workers = [start("read") for _ in range(12)]
    forked.release([worker.held for worker in workers])
    assert [processes.holding(worker.pid, device=worker.is_device) for worker in workers] == [None] * 12
    assert [worker.end() for worker in workers] == [["read 1 0", "byte x"]] * 12


def test_child_that_ended_is_left_out(start: Callable[[str], Worker]) -> None:
    """Between the search and the dump a worker may end."""
    worker, other = start("read"), start("read")
    held = worker.held
    worker.end()
    forked.release([held, other.held])
    assert processes.holding(other.pid, device=other.is_device) is None


def test_vfork_child_is_refused(start: Callable[[str], Worker]) -> None:
    """A child that has its parent's memory would take the mappings from the parent: GPU_UNSUPPORTED, nothing changed."""
    worker = start("vfork")
    (child,) = eventually(lambda: processes.children(worker.parent))
    before = processes.holding(worker.parent, device=worker.is_device)
    held = processes.holding(child, device=worker.is_device)
    assert held is not None
    assert before is not None
    origin = Held(pid=child, command=held.command, mappings=held.mappings, inherited_from=worker.parent)
    with pytest.raises(SmrError, match="shares memory or descriptors") as error:
        forked.release([origin])
    assert error.value.code is Code.GPU_UNSUPPORTED
    assert processes.holding(worker.parent, device=worker.is_device) == before


def test_fork_is_found_in_the_real_tree(start: Callable[[str], Worker], monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent opened the device itself, the child inherited it."""
    worker = start("read")
    monkeypatch.setattr(processes, "is_device", worker.is_device)
    monkeypatch.setattr(processes.holding, "__defaults__", (procs.PROC, worker.is_device))
    found = processes.find(worker.parent)
    assert found.pids == (worker.parent,)
    assert [(one.pid, one.inherited_from) for one in found.forked] == [(worker.pid, worker.parent)]


@contextlib.contextmanager
def debugger(pid: int) -> Iterator[int]:
    """A process that has attached to `pid`."""
    code = f"import ctypes; print(ctypes.CDLL(None).ptrace(0x4206, {pid}, 0, 0), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"0\n"
        yield program.pid
        program.kill()


def test_traced_child_is_refused_with_the_remedy(start: Callable[[str], Worker]) -> None:
    """A debugger on the worker: the message says what it holds, the hint how to do without forked workers."""
    worker = start("read")
    with debugger(worker.pid) as tracer, pytest.raises(SmrError, match=f"process {tracer} traces it") as error:
        forked.release([worker.held])
    assert error.value.code is Code.GPU_UNSUPPORTED
    assert f"process {worker.pid}" in error.value.message
    assert str(worker.device) in error.value.message
    assert "TORCHINDUCTOR_COMPILE_THREADS=1" in error.value.hint
    assert worker.end() == ["read 1 0", "byte x"]


def test_debugger_is_an_obstacle(start: Callable[[str], Worker]) -> None:
    """The real TracerPid of a process of the tree."""
    worker = start("read")
    found = Found(tree=(worker.parent, worker.pid))
    assert obstacles.look(found) == []
    with debugger(worker.pid) as tracer:
        (obstacle,) = obstacles.look(found)
    assert (obstacle.name, obstacle.pid) == ("debugger", worker.pid)
    assert obstacle.found == f"TracerPid {tracer} of thread {worker.pid}"


def test_io_uring_is_an_obstacle() -> None:
    """A real ring in /proc/PID/fd."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(425, 4, ctypes.create_string_buffer(120))
    if fd < 0:
        pytest.skip(f"no io_uring here: {os.strerror(ctypes.get_errno())}")
    try:
        (obstacle,) = obstacles.look(Found(tree=(os.getpid(),)))
    finally:
        os.close(fd)
    assert (obstacle.name, obstacle.pid, obstacle.certain) == ("io_uring", os.getpid(), True)
    assert obstacles.look(Found(tree=(os.getpid(),))) == []


@dataclass(frozen=True, slots=True, kw_only=True)
class Freezer:
    """A cgroup of our own that can be frozen; of either version."""

    path: Path
    v2: bool

    def set(self, *, frozen: bool) -> None:
        """Freeze or thaw; returns when the kernel says that it is done."""
        if self.v2:
            (self.path / "cgroup.freeze").write_text(str(int(frozen)))
            eventually(lambda: f"frozen {int(frozen)}" in (self.path / "cgroup.events").read_text())
        else:
            word = "FROZEN" if frozen else "THAWED"
            (self.path / "freezer.state").write_text(word)
            eventually(lambda: (self.path / "freezer.state").read_text().strip() == word)


@pytest.fixture(params=["v2", "v1"])
def freezer(request: pytest.FixtureRequest) -> Iterator[Freezer]:
    """Skips where the machine has no such hierarchy."""
    v2 = request.param == "v2"
    tops = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")] if v2 else [Path("/sys/fs/cgroup/freezer")]
    top = next((one for one in tops if (one / ("cgroup.controllers" if v2 else "tasks")).exists()), None)
    if top is None:
        pytest.skip(f"no hierarchy of cgroups {request.param} that freezes")
    freezer = Freezer(path=top / f"smr-test-{os.getpid()}-{time.monotonic_ns()}", v2=v2)
    try:
        freezer.path.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    yield freezer
    freezer.set(frozen=False)
    for pid in (freezer.path / "cgroup.procs").read_text().split():
        (top / "cgroup.procs").write_text(pid)
    freezer.path.rmdir()


def test_frozen_child_is_refused_and_goes_on_after_the_thaw(
    start: Callable[[str], Worker], freezer: Freezer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of a frozen process runs, our calls neither: an error that says so, and the worker is as it was."""
    monkeypatch.setattr(inject, "_STOP_S", 0.3)
    worker = start("read")
    (freezer.path / "cgroup.procs").write_text(str(worker.pid))
    freezer.set(frozen=True)
    with pytest.raises(SmrError, match="its cgroup is frozen") as error:
        forked.release([worker.held])
    assert error.value.code is Code.GPU_UNSUPPORTED
    freezer.set(frozen=False)
    assert len(worker.held.descriptors) == 2
    assert worker.end() == ["read 1 0", "byte x"]
