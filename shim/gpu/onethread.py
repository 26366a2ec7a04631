"""Let one thread of a stopped process run, and nothing else of it.

The driver's checkpoint, restore and unlock need one thread of the process, which the driver names. `OneThread` lets that thread
run while the process stands in its group stop (state T, as SIGSTOP or CRIU's --leave-stopped leave it):

    seize -> it reports its group stop -> block its signals -> continue ... interrupt -> its own mask -> let go: group stop again

Invariants:
- The signals are blocked so that the thread runs none of the process's handlers and does not die of a signal that was sent to
  it while it was stopped; they stay pending. SIGKILL ends the process as ever.
- Threads that it starts meanwhile are seized as well, run, and are stopped with it at the end. They inherit the blocked signals;
  which of them are ours is told by one signal that our mask leaves out (`_marker`): who blocks all signals on purpose blocks
  that one as well.
- All of ptrace is done by one thread of ours, which `OneThread` starts; the body of the `with` runs in the caller's.
- At the end the process is as it was: every thread in state T, masks and pending signals as before. Somebody else's SIGCONT
  meanwhile ends the group stop; then the threads are let go running.

When this program is killed, the kernel lets go of the threads and they go back into the group stop, but with the signals
blocked (seen on 6.18). So `on_mask` is told thread and mask before the mask is changed, for whoever outlives us: `mend` sets it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from smr.proto.errors import Code, SmrError
from smr.shim.gpu import ptrace
from smr.shim.gpu.ptrace import Event, Option, Status, ThreadGoneError

# The kernel never blocks SIGKILL and SIGSTOP, and a mask that is read back does not have them.
_ALL = ((1 << 64) - 1) & ~(1 << (signal.SIGKILL - 1)) & ~(1 << (signal.SIGSTOP - 1))
# glibc's own (cancellation, setuid of all threads): a thread that blocked them could hang its process.
_INTERNAL = (1 << 31) | (1 << 32)
_REALTIME = range(64, 33, -1)
_STOP_S = 10.0
_SETTLE_S = 1.0
_IDLE_S = 0.001
_BUSY_S = 0.00005
_BUSY_ROUNDS = 100
_GATE_S = 0.0002


class OneThread:
    """Use as a context manager around the driver's call. Raises on entry when the process is not stopped, or is traced.

    `gates`: memory that somebody else is about to put in place (smr.shim.gpu.gate); a thread that touches it before waits.

    `ended` is the kernel's word when the thread ended meanwhile. Leaving raises SmrError GPU_FAILED when a thread could not be
    stopped again (it hangs in the kernel); an exception of the body is not replaced, it gets that as a note.
    """

    def __init__(
        self,
        pid: int,
        tid: int,
        *,
        on_mask: Callable[[int, int], None] | None = None,
        gates: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._gates = gates
        self._pid = pid
        self._tid = tid
        self._on_mask = on_mask
        self._mask = 0
        self._blocked = _ALL
        self._running: set[int] = set()
        self._failure: SmrError | None = None
        self._up = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._trace, name=f"trace-{tid}", daemon=True)
        self.ended = ""

    def __enter__(self) -> OneThread:
        if (state := _state(self._pid, self._tid)) not in "Tt":
            found = "gone" if state == "?" else f"in state {state}"
            message = f"thread {self._tid} of process {self._pid} is {found}: needed a stopped process (T)"
            raise SmrError(message, code=Code.GPU_FAILED, pid=self._pid)
        self._thread.start()
        self._up.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.end()
        if self._failure is not None and value is None:
            raise self._failure
        if self._failure is not None and value is not None:
            value.add_note(str(self._failure))

    def end(self) -> None:
        """Stop what runs and let go. May be called from any thread, and again."""
        self._over.set()
        self._thread.join()

    def _trace(self) -> None:
        """All of ptrace: start, follow, end."""
        try:
            self._begin()
        except SmrError as error:
            self._failure = error
            return
        finally:
            self._up.set()
        for step in (self._follow, self._stop_all):
            try:
                step()
            except SmrError as error:
                self._failure = error

    def _begin(self) -> None:
        ptrace.seize(self._tid, Option.CLONE)
        try:
            status = ptrace.wait(self._tid, _STOP_S)
            if status.ended:
                raise ThreadGoneError(f"process {self._pid} ended: {status}", code=Code.GPU_FAILED, pid=self._pid)
            self._mask = ptrace.signal_mask(self._tid)
            self._blocked = _ALL & ~_INTERNAL & ~_marker(self._tid)
            if self._gates:
                # A fault of a thread that blocks the signal makes the kernel reset the process's handler.
                self._blocked &= ~(1 << (signal.SIGSEGV - 1))
            if self._on_mask is not None:
                self._on_mask(self._tid, self._mask)
            ptrace.set_signal_mask(self._tid, self._blocked)
            ptrace.cont(self._tid)
        except SmrError:
            # The thread of ours ends now, and with it the kernel's hold: the thread goes back into the group stop.
            with contextlib.suppress(SmrError):
                ptrace.set_signal_mask(self._tid, self._mask)
            raise
        self._running.add(self._tid)

    def _follow(self) -> None:
        """Until the end is asked for: what stops goes on, what is new runs too."""
        idle = 0
        while self._running and not self._over.is_set():
            seen = [status for tid in tuple(self._running) if (status := self._poll(tid)) is not None]
            for status in seen:
                self._go_on(status)
            idle = 0 if seen else idle + 1
            self._over.wait(_BUSY_S if idle < _BUSY_ROUNDS else _IDLE_S)

    def _poll(self, tid: int) -> Status | None:
        try:
            status = ptrace.poll(tid)
        except ThreadGoneError as error:
            self._gone(tid, error.message)
            return None
        if status is not None and status.ended:
            self._gone(tid, str(status))
            return None
        return status

    def _gone(self, tid: int, why: str) -> None:
        self._running.discard(tid)
        if tid == self._tid:
            self.ended = why

    def _go_on(self, status: Status) -> None:
        try:
            self._welcome(status)
            ptrace.cont(status.tid, 0 if status.event or self._at_gate(status) else status.signal)
        except ThreadGoneError as error:
            # Killed between its stop and now: its end is the next that it reports.
            if ptrace.state_words(status.tid) == "gone":
                self._gone(status.tid, error.message)

    def _at_gate(self, status: Status) -> bool:
        """Whether the thread came to memory that is not there yet: it tries again a moment later."""
        if not self._gates or status.event or status.signal != signal.SIGSEGV:
            return False
        address = ptrace.fault_address(status.tid)
        if not any(start <= address < end for start, end in self._gates):
            return False
        self._over.wait(_GATE_S)
        return True

    def _welcome(self, status: Status) -> None:
        """A thread that is new: the kernel has seized it, and its first report comes by itself."""
        if status.event == Event.CLONE:
            self._running.add(ptrace.event_message(status.tid))

    def _stop_all(self) -> None:
        late = []
        while self._running:
            tid = next(iter(self._running))
            try:
                self._stop(tid)
            except ThreadGoneError as error:
                self._gone(tid, error.message)
            except SmrError as error:
                late.append(error)
            self._running.discard(tid)
        if late:
            message = f"process {self._pid}: {late[0].message}; it goes on with its signals blocked"
            raise SmrError(message, hint="see 'dmesg', lines with NVRM", code=Code.GPU_FAILED, pid=self._pid)

    def _stop(self, tid: int) -> None:
        """Bring one thread back to how it was."""
        ptrace.interrupt(tid)
        status = ptrace.wait(tid, _STOP_S)
        while not status.ended and status.event != Event.STOP:
            self._welcome(status)
            if status.event == Event.NONE:
                break
            ptrace.cont(tid)
            status = ptrace.wait(tid, _STOP_S)
        if status.ended:
            self._gone(tid, str(status))
            return
        if tid == self._tid or ptrace.signal_mask(tid) == self._blocked:
            ptrace.set_signal_mask(tid, self._mask)
        # A signal that the mask could not keep (32 and 33) is delivered as it would have been.
        ptrace.detach(tid, 0 if status.event or self._at_gate(status) else status.signal)
        if status.group_stop:
            _until_stopped(self._pid, tid)


def mend(pid: int, tid: int, mask: int) -> None:
    """Give a thread its signal mask back, which a killed program left blocked. Nothing to do for one that is gone."""
    with contextlib.suppress(ThreadGoneError):
        ptrace.seize(tid)
        ptrace.interrupt(tid)
        status = ptrace.wait(tid, _STOP_S)
        if not status.ended:
            ptrace.set_signal_mask(tid, mask)
            ptrace.detach(tid, 0 if status.event else status.signal)
        if status.group_stop:
            _until_stopped(pid, tid)


def host_thread(pid: int, tid: int) -> int:
    """The thread that the driver means by `tid`: of our pid namespace, or else of the process's. Raises SmrError GPU_FAILED."""
    tasks = Path(f"/proc/{pid}/task")
    if (tasks / str(tid)).exists():
        return tid
    with contextlib.suppress(OSError):
        for task in tasks.iterdir():
            with contextlib.suppress(OSError):
                if _inner(task) == tid:
                    return int(task.name)
    raise SmrError(f"process {pid} has no thread {tid}, which the driver names", code=Code.GPU_FAILED, pid=pid)


def _inner(task: Path) -> int:
    lines = (task / "status").read_text(errors="replace").splitlines()
    return next((int(line.split()[-1]) for line in lines if line.startswith("NSpid:")), 0)


def _marker(tid: int) -> int:
    """A signal's bit that nobody uses: neither pending nor handled; 0 when there is none."""
    used = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{tid}/status").read_text(errors="replace").splitlines():
            if line.startswith(("SigPnd:", "ShdPnd:", "SigBlk:", "SigCgt:")):
                used |= int(line.split()[1], 16)
    return next((1 << (number - 1) for number in _REALTIME if not used >> (number - 1) & 1), 0)


def _state(pid: int, tid: int) -> str:
    """The state letter of /proc/PID/task/TID/stat; "?" when it is gone."""
    try:
        text = Path(f"/proc/{pid}/task/{tid}/stat").read_text(errors="replace")
    except OSError:
        return "?"
    return text.rpartition(")")[2].split()[0]


def _until_stopped(pid: int, tid: int) -> None:
    """The kernel brings a thread that was let go back into the group stop a moment later, when it next runs."""
    deadline = time.monotonic() + _SETTLE_S
    while _state(pid, tid) not in "TtZX?" and time.monotonic() < deadline and _stopped_otherwise(pid, tid):
        time.sleep(_BUSY_S)


def _stopped_otherwise(pid: int, tid: int) -> bool:
    """Whether the process is still in its group stop, as its other threads show; a single thread tells nothing: then yes."""
    with contextlib.suppress(OSError):
        others = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir() if int(task.name) != tid]
        return not others or any(_state(pid, other) in "Tt" for other in others)
    return False
