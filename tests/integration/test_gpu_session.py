"""A session against a fake driver: order, time limits, failures of every call at every process, deaths on every side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from smr.proto.errors import Code, SmrError
from smr.shim import procs
from smr.shim.config import Config
from smr.shim.gpu import driver
from smr.shim.gpu.driver import CudaState, GpuPair
from smr.shim.gpu.session import Session, open_session
from tests.integration.command import eventually
from tests.integration.fake_cuda import FakeCuda, Target, compile_driver, compile_program

RUNNING, LOCKED, CHECKPOINTED, FAILED = CudaState
_OLD = "GPU-00000000-0000-0000-0000-00000000000a"
_NEW = "GPU-00000000-0000-0000-0000-00000000000b"
_LONG_S = 60.0


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake driver, an old one, and the program of threads."""
    folder = tmp_path_factory.mktemp("fake")
    compile_driver(folder / "libcuda.so.1")
    compile_driver(folder / "old.so", "-DOLD_DRIVER")
    compile_program(folder / "threads")
    return folder


@pytest.fixture
def cuda(tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    monkeypatch.setenv("SMR_CUDA_LIBRARY", str(built / "libcuda.so.1"))
    monkeypatch.setenv("SMR_FAKE_CUDA", str(tmp_path))
    return FakeCuda(tmp_path, built / "threads")


@pytest.fixture
def session(cuda: FakeCuda) -> Iterator[Session]:
    with open_session(Config()) as session:
        yield session


@pytest.fixture
def targets(cuda: FakeCuda) -> Iterator[list[Target]]:
    """Three processes with CUDA that run."""
    with ExitStack() as stack:
        yield [stack.enter_context(cuda.target(workers=1)) for _ in range(3)]


def pids(targets: list[Target]) -> list[int]:
    return [target.pid for target in targets]


def states(cuda: FakeCuda, targets: list[Target]) -> list[int]:
    return [cuda.state(target.pid) for target in targets]


def test_the_whole_way(session: Session, cuda: FakeCuda, targets: list[Target]) -> None:
    """Ready, states, lock, checkpoint, restore, unlock; every call reports its seconds."""
    every = pids(targets)
    assert session.ready().cuda == 13000
    assert session.states([*every, os.getpid()]) == {**dict.fromkeys(every, RUNNING), os.getpid(): None}
    assert set(session.lock(every, _LONG_S)) == set(every)
    assert set(session.states(every).values()) == {LOCKED}
    session.checkpoint(every, _LONG_S)
    assert set(session.states(every).values()) == {CHECKPOINTED}
    session.restore(every, _LONG_S, [GpuPair(old=_OLD, new=_NEW)])
    session.unlock(every, _LONG_S)
    assert states(cuda, targets) == [0, 0, 0]
    assert (cuda.folder / f"{every[0]}.pairs").read_text() == f"{'0' * 31}a{'0' * 31}b"
    timed = {(one.call, one.pid) for one in session.times if one.seconds > 0}
    assert timed >= {(call, pid) for call in ("lock", "checkpoint", "restore", "unlock") for pid in every}


def test_all_are_locked_before_any_is_checkpointed(session: Session, cuda: FakeCuda, targets: list[Target]) -> None:
    """However long a lock takes; and the calls of one kind are under way at the same time."""
    for target in targets:
        cuda.fault("lock", target.pid, "wait 150")
        cuda.fault("checkpoint", target.pid, "wait 150")
    session.lock(pids(targets), _LONG_S)
    session.checkpoint(pids(targets), _LONG_S)
    calls = cuda.calls("lock", "checkpoint")
    assert [(call, what) for call, _, what in calls] == [
        (call, what) for call in ("lock", "checkpoint") for what in ("begin", "end") for _ in targets
    ]
    assert {pid for _, pid, _ in calls} == set(pids(targets))


def test_one_helper_does_it_all(session: Session, cuda: FakeCuda, targets: list[Target]) -> None:
    """CUDA is initialised once, whatever is asked."""
    session.lock(pids(targets), _LONG_S)
    session.checkpoint(pids(targets), _LONG_S)
    session.release(pids(targets), _LONG_S)
    assert cuda.calls("init") == [("init", 0, "begin"), ("init", 0, "end")]
    assert len({caller for *_, caller in cuda.log()}) == 1


def test_checkpoint_needs_all_locked(session: Session, cuda: FakeCuda, targets: list[Target]) -> None:
    """One that is not: none is checkpointed, all run, and the error names it."""
    session.lock(pids(targets)[:2], _LONG_S)
    with pytest.raises(SmrError, match=rf"cannot checkpoint process {targets[2].pid} \(threads\): it is RUNNING, not LOCKED"):
        session.checkpoint(pids(targets), _LONG_S)
    assert cuda.calls("checkpoint") == []
    assert states(cuda, targets) == [0, 0, 0]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("call", ["lock", "checkpoint"])
def test_a_failure_on_the_way_down_brings_all_back(
    session: Session, cuda: FakeCuda, targets: list[Target], call: str, place: int
) -> None:
    """The error has the process, the call, the driver's name and sentence, and says that nothing is left locked."""
    bad = targets[place].pid
    cuda.fault(call, bad, "fail 999")
    with pytest.raises(SmrError) as caught:
        session.lock(pids(targets), _LONG_S)
        session.checkpoint(pids(targets), _LONG_S)
    assert caught.value.code is Code.GPU_FAILED
    assert f"cannot {call} process {bad} (threads)" in caught.value.message
    assert "CUDA_ERROR_FAKE_999 (999): sentence of 999. nothing is left locked" in caught.value.message
    assert states(cuda, targets) == [0, 0, 0]
    assert all(target.counts() for target in targets)


@pytest.mark.parametrize("call", ["restore", "unlock"])
def test_a_failure_on_the_way_up_names_what_is_left(session: Session, cuda: FakeCuda, targets: list[Target], call: str) -> None:
    """The processes stay as they are; `release` brings them back once the driver does it."""
    for target in targets:
        cuda.set_state(target.pid, 2 if call == "restore" else 1)
    bad = targets[1].pid
    cuda.fault(call, bad, "once fail 2")
    with pytest.raises(SmrError) as caught:
        getattr(session, call)(pids(targets), _LONG_S)
    assert caught.value.code is (Code.GPU_MEMORY if call == "restore" else Code.GPU_FAILED)
    assert f"process {bad} (threads) is {'CHECKPOINTED' if call == 'restore' else 'LOCKED'}" in caught.value.message
    assert states(cuda, targets) == ([1, 2, 1] if call == "restore" else [0, 1, 0])
    session.release(pids(targets), _LONG_S)
    assert states(cuda, targets) == [0, 0, 0]


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("call", ["lock", "checkpoint"])
def test_a_call_that_never_returns(session: Session, cuda: FakeCuda, targets: list[Target], call: str, place: int) -> None:
    """Its helper is killed, a fresh one brings all back, and the error names process and call."""
    bad = targets[place].pid
    cuda.fault(call, bad, "once hang")
    before = session.helper
    with pytest.raises(SmrError, match=f"cannot {call} process {bad}.*did not return within") as caught:
        session.lock(pids(targets), 0.1)
        session.checkpoint(pids(targets), 0.5)
    assert caught.value.code is Code.TIMEOUT
    assert caught.value.message.endswith("nothing is left locked")
    assert states(cuda, targets) == [0, 0, 0]
    assert session.helper != before
    assert not procs.alive(before)
    session.lock(pids(targets), _LONG_S)


@pytest.mark.parametrize("call", ["restore", "unlock"])
def test_a_call_on_the_way_up_never_returns(session: Session, cuda: FakeCuda, targets: list[Target], call: str) -> None:
    """The error names the process and its state, and `release` with a fresh helper brings it back."""
    for target in targets:
        cuda.set_state(target.pid, 2 if call == "restore" else 1)
    bad = targets[1].pid
    cuda.fault(call, bad, "once hang")
    with pytest.raises(SmrError, match=f"cannot {call} process {bad}") as caught:
        getattr(session, call)(pids(targets), 0.5)
    assert caught.value.code is Code.TIMEOUT
    assert f"process {bad} (threads) is {'CHECKPOINTED' if call == 'restore' else 'LOCKED'}" in caught.value.message
    session.release(pids(targets), _LONG_S)
    assert states(cuda, targets) == [0, 0, 0]


def test_a_process_that_the_driver_never_answers_about(
    session: Session, cuda: FakeCuda, targets: list[Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are released, and the error says which one is not known."""
    monkeypatch.setattr("smr.shim.gpu.session.STATE_S", 0.5)
    bad = targets[0].pid
    session.lock(pids(targets), _LONG_S)
    cuda.fault("state", bad, "hang")
    with pytest.raises(SmrError, match=f"process {bad} \\(threads\\): the driver does not answer") as caught:
        session.release(pids(targets), _LONG_S)
    assert caught.value.code is Code.GPU_FAILED
    assert states(cuda, targets) == [1, 0, 0]
    with pytest.raises(SmrError, match="ask the driver about") as caught:
        session.states(pids(targets), 0.5)
    assert caught.value.code is Code.TIMEOUT


def test_a_call_that_takes_effect_after_its_helper_was_given_up(session: Session, cuda: FakeCuda, targets: list[Target]) -> None:
    """A lock that is done although the call does not return is found and taken back."""
    cuda.fault("lock", targets[1].pid, "once late 100")
    with pytest.raises(SmrError, match="did not return"):
        session.lock(pids(targets), 0.5)
    assert states(cuda, targets) == [0, 0, 0]


def test_a_lock_that_the_driver_gives_up(session: Session, cuda: FakeCuda, targets: list[Target]) -> None:
    """Work on the GPU that does not end: TIMEOUT, with the remedy."""
    cuda.fault("lock", targets[0].pid, "fail 600")
    with pytest.raises(SmrError) as caught:
        session.lock(pids(targets), _LONG_S)
    assert caught.value.code is Code.TIMEOUT
    assert "quiesce" in caught.value.hint
    assert states(cuda, targets) == [0, 0, 0]


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("state", [0, 1, 2])
def test_release_from_each_state(session: Session, cuda: FakeCuda, state: int, stopped: bool) -> None:
    """Processes run again, stopped ones as soon as they are continued; again is no error."""
    with cuda.target(state=state) as target, cuda.target() as other:
        if stopped:
            target.stop()
            other.stop()
        for _ in range(2):
            session.release([target.pid, other.pid], _LONG_S, stopped=stopped)
            assert [cuda.state(target.pid), cuda.state(other.pid)] == [0, 0]
        if stopped:
            assert target.stopped() and other.stopped()
            target.goes_on()


def test_release_names_a_process_that_cannot_come_back(session: Session, cuda: FakeCuda, targets: list[Target]) -> None:
    """The driver's FAILED; the others run."""
    cuda.set_state(targets[0].pid, 3)
    cuda.set_state(targets[1].pid, 2)
    with pytest.raises(SmrError, match=f"process {targets[0].pid} \\(threads\\) is FAILED"):
        session.release(pids(targets), _LONG_S)
    assert states(cuda, targets) == [3, 0, 0]


@pytest.mark.parametrize("restore", ["main", "other"])
def test_a_stopped_process_is_brought_back_stopped(session: Session, cuda: FakeCuda, restore: str) -> None:
    """Restore and unlock with nothing of it running but its restore thread."""
    with cuda.target(restore=restore, state=2) as target:
        target.stop()
        counts, blocked = target.counts(), target.blocked(target.restore_tid)
        session.restore([target.pid], _LONG_S, stopped=True)
        assert target.stopped()
        session.unlock([target.pid], _LONG_S, stopped=True)
        assert target.stopped()
        assert target.counts() == counts
        assert target.blocked(target.restore_tid) == blocked
        assert cuda.state(target.pid) == 0
        target.goes_on()


@pytest.mark.parametrize("ending", ["hang", "die"])
def test_a_stopped_process_whose_call_never_comes_back(session: Session, cuda: FakeCuda, ending: str) -> None:
    """A call that hangs, a helper that dies: the process is stopped with its own signal mask when the error is out."""
    with cuda.target(state=2) as target:
        target.stop()
        blocked = target.blocked(target.restore_tid)
        cuda.fault("restore", target.pid, f"once wait 50 {ending}")
        with pytest.raises(SmrError) as caught:
            session.restore([target.pid], 0.5, stopped=True)
        assert "is CHECKPOINTED" in caught.value.message
        eventually(target.stopped)
        assert target.blocked(target.restore_tid) == blocked
        session.release([target.pid], _LONG_S, stopped=True)
        target.goes_on()


@pytest.mark.parametrize("call", ["lock", "checkpoint"])
def test_a_process_dies_while_it_is_locked(session: Session, cuda: FakeCuda, targets: list[Target], call: str) -> None:
    """It is named, and the others run."""
    bad = targets[1]
    cuda.fault(call, bad.pid, "kill")
    with pytest.raises(SmrError, match=f"cannot {call} process {bad.pid} \\(threads\\): the process ended meanwhile") as caught:
        session.lock(pids(targets), _LONG_S)
        session.checkpoint(pids(targets), _LONG_S)
    assert caught.value.code is Code.GPU_FAILED
    assert [cuda.state(targets[0].pid), cuda.state(targets[2].pid)] == [0, 0]


def test_a_process_dies_and_the_call_hangs_for_it(session: Session, cuda: FakeCuda, targets: list[Target]) -> None:
    """That is noticed long before the time limit."""
    bad = targets[2]
    session.lock(pids(targets), _LONG_S)
    cuda.fault("checkpoint", bad.pid, "hang")
    subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {bad.pid}"]).wait()
    with pytest.raises(SmrError, match=f"process {bad.pid} \\(threads\\): the process ended meanwhile") as caught:
        session.checkpoint(pids(targets), 3600)
    assert caught.value.code is Code.GPU_FAILED
    assert [cuda.state(targets[0].pid), cuda.state(targets[1].pid)] == [0, 0]


def test_processes_that_end_are_no_matter_for_release(session: Session, cuda: FakeCuda) -> None:
    """Nothing of them is left to release."""
    with cuda.target(state=1) as target:
        pid = target.pid
        session.states([pid])
    session.release([pid], _LONG_S)
    assert session.states([pid]) == {pid: None}


@pytest.mark.parametrize("call", ["lock", "checkpoint"])
def test_the_helper_is_killed(session: Session, cuda: FakeCuda, targets: list[Target], call: str) -> None:
    """In the middle of a call: the error says so, and a fresh helper brings all back."""
    cuda.fault(call, targets[0].pid, "once die")
    with pytest.raises(SmrError, match=r"GPU helper.*was killed by signal 9") as caught:
        session.lock(pids(targets), _LONG_S)
        session.checkpoint(pids(targets), _LONG_S)
    assert caught.value.message.endswith("nothing is left locked")
    assert states(cuda, targets) == [0, 0, 0]


def test_an_idle_helper_is_killed(session: Session, cuda: FakeCuda, targets: list[Target]) -> None:
    """Nothing is lost: the next call starts another."""
    session.lock(pids(targets), _LONG_S)
    helper = session.helper
    os.kill(helper, signal.SIGKILL)
    eventually(lambda: not procs.alive(helper))
    session.checkpoint(pids(targets), _LONG_S)
    assert states(cuda, targets) == [2, 2, 2]


_OWNER = """
import os, sys
from smr.shim.config import Config
from smr.shim.gpu.session import open_session
session = open_session(Config())
session.ready()
if os.fork() == 0:
    # As a guard: it has the session's pipes, and outlives the owner.
    import time
    time.sleep(float(sys.argv[2]))
    os._exit(0)
print(session.helper, flush=True)
session.restore([int(sys.argv[1])], 600, stopped=True)
"""


def test_the_owner_is_killed(cuda: FakeCuda) -> None:
    """Its helper ends although a child has the pipes too, and leaves the process stopped and unblocked; release is for others."""
    with cuda.target(state=2) as target:
        target.stop()
        blocked = target.blocked(target.restore_tid)
        cuda.fault("restore", target.pid, "once hang")
        words = [sys.executable, "-c", _OWNER, str(target.pid), "30"]
        owner = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            assert owner.stdout is not None
            helper = int(owner.stdout.readline())
            eventually(lambda: cuda.calls("restore"), what="the call under way")
            assert not target.stopped()
            owner.kill()
            owner.wait()
            eventually(lambda: not procs.alive(helper), what="the helper's end")
        finally:
            os.killpg(owner.pid, signal.SIGKILL)
            owner.communicate()
        assert target.stopped()
        assert target.blocked(target.restore_tid) == blocked
        with open_session(Config()) as other:
            other.release([target.pid], _LONG_S, stopped=True)
        target.goes_on()


def test_close_ends_the_helper(cuda: FakeCuda) -> None:
    """Ready or not; again is no error."""
    for ready in (False, True):
        session = open_session(Config())
        helper = session.helper
        if ready:
            session.ready()
        assert procs.alive(helper)
        session.close()
        session.close()
        eventually(lambda pid=helper: not procs.alive(pid))


def test_the_helper_has_nothing_of_ours(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor, inheritable or not, and no variable that would hide GPUs from it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    read, write = os.pipe()
    os.set_inheritable(write, True)
    with open_session(Config()) as session:
        session.ready()
        helper = session.helper
        pipe = os.readlink(f"/proc/self/fd/{write}")
        assert pipe not in {os.readlink(f"/proc/{helper}/fd/{fd}") for fd in os.listdir(f"/proc/{helper}/fd")}
        assert b"CUDA_VISIBLE" not in Path(f"/proc/{helper}/environ").read_bytes()
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (100, Code.GPU_MISSING, "finds no GPU"),
        (803, Code.GPU_DRIVER, "different releases"),
        (999, Code.GPU_FAILED, "initialised"),
    ],
)
def test_cuda_does_not_initialise(cuda: FakeCuda, number: int, code: Code, words: str) -> None:
    """With the driver's reason, from ready and from every call."""
    cuda.fault("init", 0, f"fail {number}")
    with open_session(Config()) as session:
        for ask in (session.ready, lambda: session.lock([os.getpid()], 1)):
            with pytest.raises(SmrError, match=words) as caught:
                ask()
            assert caught.value.code is code


def test_cuda_never_initialises(cuda: FakeCuda) -> None:
    """TIMEOUT, and the helper is gone."""
    cuda.fault("init", 0, "hang")
    with open_session(Config()) as session:
        helper = session.helper
        with pytest.raises(SmrError, match=r"did not initialise within 0\.3 s") as caught:
            session.ready(0.3)
        assert caught.value.code is Code.TIMEOUT
        eventually(lambda: not procs.alive(helper))


def test_no_driver_and_an_old_one(cuda: FakeCuda, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU_MISSING with the loader's reason; GPU_DRIVER with what is needed."""
    cases: list[tuple[Path, Code, str]] = [
        (built / "none.so", Code.GPU_MISSING, "no NVIDIA driver on this node.*cannot open shared object file"),
        (built / "old.so", Code.GPU_DRIVER, "has no cuCheckpointProcessGetState: needed 570 or newer"),
    ]
    for library, code, words in cases:
        monkeypatch.setenv("SMR_CUDA_LIBRARY", str(library))
        with open_session(Config()) as session, pytest.raises(SmrError, match=words) as caught:
            session.ready()
        assert caught.value.code is code
        assert caught.value.hint


def test_an_amd_node_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error does not send its reader to install NVIDIA's driver."""
    device = tmp_path / "kfd"
    device.touch()
    monkeypatch.setattr(driver, "_AMD_DEVICE", device)
    monkeypatch.setattr(driver, "_RELEASE_FILES", ())
    with pytest.raises(SmrError, match=r"AMD GPU.*only NVIDIA GPUs") as caught:
        driver.open_driver("/nowhere/libcuda.so.1")
    assert caught.value.code is Code.GPU_MISSING


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("580.159.04\n", "580.159.04"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (r@b)  Thu\n", "570.86.15"),
        ("nothing of the kind\n", ""),
    ],
)
def test_the_driver_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, release: str) -> None:
    """From either of the kernel's files."""
    file = tmp_path / "version"
    file.write_text(text)
    monkeypatch.setattr(driver, "_RELEASE_FILES", (tmp_path / "none", file))
    assert driver.release() == release


def test_starting_a_session_returns_before_the_helper_runs(cuda: FakeCuda) -> None:
    """The caller goes on while CUDA initialises: nothing is waited for before `ready`."""
    cuda.fault("init", 0, "wait 300")
    with open_session(Config()) as session:
        assert cuda.calls("init") == []
        session.ready()
        assert cuda.calls("init") == [("init", 0, "begin"), ("init", 0, "end")]
