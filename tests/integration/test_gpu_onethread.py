"""One thread of a stopped process runs and nothing else of it; afterwards the process is as it was."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from smr.proto.errors import Code, SmrError
from smr.shim import procs
from smr.shim.gpu import ptrace
from smr.shim.gpu.onethread import OneThread, host_thread, mend
from tests.integration.command import eventually
from tests.integration.fake_cuda import FakeCuda, Target, compile_program

_USR2 = 1 << (signal.SIGUSR2 - 1)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_program(tmp_path_factory.mktemp("threads") / "threads")


@pytest.fixture
def cuda(tmp_path: Path, program: Path) -> FakeCuda:
    return FakeCuda(tmp_path, program)


@pytest.fixture(params=["main", "other"])
def target(cuda: FakeCuda, request: pytest.FixtureRequest) -> Iterator[Target]:
    """A stopped process whose restore thread is its first, or another."""
    with cuda.target(restore=request.param) as target:
        target.stop()
        yield target


def ask(target: Target) -> None:
    """Have the restore thread do something, as the driver would; returns when it has."""
    answer = target.folder / f"{target.pid}.answer"
    (target.folder / f"{target.pid}.ask").touch()
    eventually(answer.exists, what="the restore thread's answer")
    answer.unlink()


def send(target: Target, number: signal.Signals) -> None:
    """A signal for the restore thread alone."""
    assert ctypes.CDLL(None).tgkill(target.pid, target.restore_tid, int(number)) == 0


def test_only_that_thread_progresses(target: Target) -> None:
    """While it runs no other thread does anything; afterwards all are stopped, and SIGCONT continues all."""
    counts, restore = target.counts(), target.slot("restore")
    with OneThread(target.pid, target.restore_tid):
        ask(target)
        assert ptrace.tracer(target.restore_tid) == os.getpid()
    assert target.slot("restore") > restore
    assert target.counts() == counts
    assert target.stopped()
    after = target.slot("restore")
    time.sleep(0.05)
    assert (target.slot("restore"), target.counts()) == (after, counts)
    assert {target.field(tid, "TracerPid") for tid in target.threads()} == {"0"}
    target.goes_on()


def test_again_and_again(target: Target) -> None:
    """Restore and unlock follow each other: every time the process is left as it was."""
    counts = target.counts()
    for _ in range(50):
        restore = target.slot("restore")
        with OneThread(target.pid, target.restore_tid):
            eventually(lambda then=restore: target.slot("restore") > then)
        assert target.stopped()
    assert target.counts() == counts
    assert target.blocked(target.restore_tid) == _USR2
    target.goes_on()


def test_signals_wait(target: Target) -> None:
    """A signal that is pending for the thread, and one that comes meanwhile, are neither handled nor lost."""
    send(target, signal.SIGUSR1)
    with OneThread(target.pid, target.restore_tid):
        ask(target)
        os.kill(target.pid, signal.SIGUSR2)
        ask(target)
        assert target.slot("handled") == 0
    assert int(target.field(target.restore_tid, "SigPnd"), 16) == 1 << (signal.SIGUSR1 - 1)
    assert int(target.field(target.restore_tid, "ShdPnd"), 16) & _USR2
    assert target.blocked(target.restore_tid) == _USR2
    assert target.stopped()


def test_a_pending_signal_is_handled_when_the_process_goes_on(target: Target) -> None:
    """By the thread that it was for, once, and not before SIGCONT."""
    send(target, signal.SIGUSR1)
    with OneThread(target.pid, target.restore_tid):
        ask(target)
    assert target.slot("handled") == 0
    target.goes_on()
    eventually(lambda: target.slot("handled") == 1)
    assert target.slot("handled_by") == target.restore_tid


@pytest.mark.parametrize(("how", "mask"), [("plain", _USR2), ("blocking", None)])
def test_a_thread_that_it_starts_runs_and_is_stopped_with_it(target: Target, how: str, mask: int | None) -> None:
    """It has the mask that it would have had without us: its maker's, or all signals when its maker blocks them for it."""
    (target.folder / f"{target.pid}.spawns").write_text(how)
    counts = target.counts()
    with OneThread(target.pid, target.restore_tid):
        ask(target)
    spawned = target.slot("spawned_tid")
    assert spawned in target.threads()
    assert target.slot("spawned") >= 3
    assert target.stopped()
    assert target.counts() == counts
    assert target.blocked(target.restore_tid) == _USR2
    everything = (1 << 64) - 1
    glibc_keeps = 1 << 31 | 1 << 32 | 1 << (signal.SIGKILL - 1) | 1 << (signal.SIGSTOP - 1)
    assert target.blocked(spawned) == (everything & ~glibc_keeps if mask is None else mask)
    target.goes_on()
    then = target.slot("spawned")
    eventually(lambda: target.slot("spawned") > then)


def test_the_body_fails(target: Target) -> None:
    """Its own exception comes out, and the process is as before."""
    with pytest.raises(ZeroDivisionError), OneThread(target.pid, target.restore_tid):
        ask(target)
        raise ZeroDivisionError
    assert target.stopped()
    assert target.blocked(target.restore_tid) == _USR2
    target.goes_on()


def test_the_process_is_killed_meanwhile(target: Target) -> None:
    """No error of ours, no zombie that only we keep, and the kernel's word about the end."""
    with OneThread(target.pid, target.restore_tid) as one:
        ask(target)
        target.process.kill()
        eventually(lambda: one.ended)
    # We are its parent as well as its tracer, so either may have been told of its end.
    target.process.wait(10)
    assert str(target.restore_tid) in one.ended
    assert not Path(f"/proc/{target.pid}").exists()


def test_somebody_continues_the_process_meanwhile(target: Target) -> None:
    """Then it goes on, all of it, and is left so, with its mask."""
    counts = target.counts()
    with OneThread(target.pid, target.restore_tid):
        ask(target)
        os.kill(target.pid, signal.SIGCONT)
        eventually(lambda: all(now > then for now, then in zip(target.counts(), counts, strict=True)))
    assert target.blocked(target.restore_tid) == _USR2
    restore = target.slot("restore")
    eventually(lambda: target.slot("restore") > restore)


def test_a_second_stop_signal_meanwhile(target: Target) -> None:
    """The thread goes on and the process is stopped afterwards."""
    with OneThread(target.pid, target.restore_tid):
        os.kill(target.pid, signal.SIGSTOP)
        ask(target)
        os.kill(target.pid, signal.SIGTSTP)
        ask(target)
    eventually(target.stopped)
    target.goes_on()


def test_a_process_that_runs_is_refused(cuda: FakeCuda) -> None:
    """And nothing is done to it."""
    with cuda.target() as target:
        with pytest.raises(SmrError, match="needed a stopped process") as caught, OneThread(target.pid, target.restore_tid):
            pass
        assert caught.value.code is Code.GPU_FAILED
        assert target.field(target.restore_tid, "TracerPid") == "0"
        target.goes_on()


def test_a_process_that_is_traced_is_refused(target: Target) -> None:
    """The error names who traces it; the process stays stopped."""
    words = "import sys, time; from smr.shim.gpu import ptrace; ptrace.seize(int(sys.argv[1])); print(flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", words, str(target.restore_tid)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(SmrError, match=f"process {other.pid} traces it") as caught:
            OneThread(target.pid, target.restore_tid).__enter__()
        assert caught.value.code is Code.GPU_UNSUPPORTED
    finally:
        other.kill()
        other.communicate()


_HELD = """
import sys, time
from smr.shim.gpu.onethread import OneThread
def told(tid, mask): print(tid, mask, flush=True)
with OneThread(int(sys.argv[1]), int(sys.argv[2]), on_mask=told):
    print("runs", flush=True)
    time.sleep(600)
"""


def test_killed_tracer(target: Target) -> None:
    """When the program is killed the kernel stops the thread again, its signals blocked; what `on_mask` told mends that."""
    words = [sys.executable, "-c", _HELD, str(target.pid), str(target.restore_tid)]
    program = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    tid, mask = map(int, program.stdout.readline().split())
    assert program.stdout.readline() == "runs\n"
    assert (tid, mask) == (target.restore_tid, _USR2)
    ask(target)
    counts = target.counts()
    program.kill()
    program.communicate()
    eventually(target.stopped)
    assert target.blocked(tid) != mask
    mend(target.pid, tid, mask)
    assert target.stopped()
    assert target.blocked(tid) == mask
    assert target.counts() == counts
    target.goes_on()


def test_mending_what_runs_or_is_gone(cuda: FakeCuda) -> None:
    """A process that runs meanwhile goes on with the mask; one that has ended is no error."""
    with cuda.target() as target:
        mend(target.pid, target.restore_tid, 1 << (signal.SIGUSR1 - 1))
        assert target.blocked(target.restore_tid) == 1 << (signal.SIGUSR1 - 1)
        assert not target.stopped()
        target.stop()
        target.goes_on()
    mend(target.pid, target.restore_tid, 0)


def test_a_thread_of_a_container() -> None:
    """The driver's thread id is taken as ours, or else as one of the container's own pid namespace."""
    outer = subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child", "sleep", "600"])
    try:
        inner = eventually(lambda: procs.children(outer.pid))[0]
        assert host_thread(inner, inner) == inner
        assert host_thread(inner, 1) == inner
        with pytest.raises(SmrError, match=f"process {inner} has no thread 2, which the driver names"):
            host_thread(inner, 2)
    finally:
        outer.kill()
        outer.wait()


def test_ptrace_says_what_it_found(target: Target) -> None:
    """A thread that is not ours, one that is gone, one that does not stop."""
    with pytest.raises(ptrace.ThreadGoneError, match="not held stopped by this thread"):
        ptrace.cont(target.pid)
    with pytest.raises(ptrace.ThreadGoneError, match="never seized"):
        ptrace.poll(1)
    ptrace.seize(target.restore_tid)
    assert ptrace.wait(target.restore_tid, 10).group_stop
    ptrace.cont(target.restore_tid)
    with pytest.raises(SmrError, match=r"did not stop within 0\.05 s") as caught:
        ptrace.wait(target.restore_tid, 0.05)
    assert caught.value.code is Code.TIMEOUT
    ptrace.interrupt(target.restore_tid)
    assert ptrace.wait(target.restore_tid, 10).group_stop
    ptrace.detach(target.restore_tid)
    eventually(target.stopped)
