"""What a checkpoint or a restore asks of the driver, with a time limit on everything: the owner's end of smr.shim.gpu.helper.

    with open_session(config) as session:      # returns at once; CUDA initialises beside what the caller does
        session.lock(pids, 10)                 # raises, and then none is locked
        session.checkpoint(pids, 60)           # raises, and then all run
        ...
        session.release(pids, 60)              # from whatever state each is in

Invariants:
- `checkpoint` begins when all processes are locked, and not otherwise.
- After an error of `lock` or `checkpoint` no process is locked that the driver can still bring back; the error names the others.
  An error of `restore` or `unlock` leaves the processes as they are and names their states: the caller undoes, or releases.
- A call that does not return in time costs its helper: that one is told to end, then killed, and not waited for when it hangs in
  the kernel. What is left to do, a fresh one does.
- A helper that is killed leaves no thread of a process running or with its signals blocked: a fresh one sets their masks.
- A process is told apart from another that got its number since it was first named here.

A session is for one thread at a time. When its owner is killed the helper ends, and the processes stay as they are: who takes
over (smr.shim.guard) opens a session of its own and calls `release`. Standard library only.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from smr.proto.errors import Code, SmrError
from smr.shim import procs
from smr.shim.config import Config
from smr.shim.gpu import channel
from smr.shim.gpu.channel import Channel, HelperGoneError
from smr.shim.gpu.driver import NOT_READY, CudaState, GpuPair
from smr.shim.gpu.outcome import Outcome, Pending

READY_S = 60.0
STATE_S = 10.0

_MEND_S = 15.0
# The driver's own time limit of a lock comes first; then it says that nothing is locked.
_LOCK_GRACE_S = 2.0
# How long a call may go on after its process has ended.
_ENDED_S = 2.0
_LOOK_S = 0.1
_RETIRE_S = 1.0
_ROUNDS = 3
_OUT_OF_MEMORY = 2
_NOT_SUPPORTED = 801
# CUresults that speak of the node and not of the process asked about: deinitialised, stub, fabric, versions, unknown.
# 3 (not initialised) is what driver 580 says of a process without CUDA; that ours is initialised is known by then.
_NODE_ERRORS = frozenset({4, 34, 802, 803, 804, 999})


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverFacts:
    """The driver's release, such as 580.159.04 (empty when unknown), and its CUDA version: 1000 * major + 10 * minor."""

    driver: str
    cuda: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CallTime:
    """How long one call took for one process, failed ones too; `call`: state, lock, checkpoint, restore, unlock, mend."""

    pid: int
    call: str
    seconds: float


class Session:
    """See the module. `times` has every call so far, in the order in which they ended."""

    def __init__(self) -> None:
        self._channel: Channel | None = Channel()
        self._refused: SmrError | None = None
        self._requests = 0
        self._seen: dict[int, tuple[int, str]] = {}
        self._masks: dict[tuple[int, int], int] = {}
        self.times: list[CallTime] = []

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def helper(self) -> int:
        """The helper's pid; 0 when there is none. After a call that hung it is another."""
        return self._channel.pid if self._channel is not None else 0

    def close(self) -> None:
        """End the helper, at once. May be called again."""
        if self._channel is not None:
            self._channel.close()
        self._channel = None

    def abort(self) -> None:
        """Have a call end that another thread waits for: its helper is killed, and the call fails."""
        if self._channel is not None:
            self._channel.kill()

    def ready(self, timeout_s: float = READY_S) -> DriverFacts:
        """Wait until CUDA is initialised.

        Raises SmrError GPU_MISSING (no driver library, no GPU), GPU_DRIVER (older than 570), TIMEOUT, or GPU_FAILED.
        """
        if self._refused is not None:
            raise self._refused
        if self._channel is None or not self._channel.alive:
            self._restart()
        assert self._channel is not None
        try:
            self._channel.ready(timeout_s)
        except SmrError as error:
            self._retire()
            self._refused = error if error.code in (Code.GPU_MISSING, Code.GPU_DRIVER) else None
            raise
        return DriverFacts(driver=self._channel.driver, cuda=self._channel.cuda)

    def states(self, pids: Iterable[int], timeout_s: float = STATE_S) -> dict[int, CudaState | None]:
        """The state of each process; None: no CUDA in it, or it has ended.

        Raises SmrError TIMEOUT when one does not answer, GPU_FAILED when the driver itself does not work.
        """
        found: dict[int, CudaState | None] = {}
        outcomes = self._call("state", list(pids), timeout_s)
        bad = [one for one in outcomes.values() if one.lost or one.number in _NODE_ERRORS]
        if bad:
            raise self._error("ask the driver about", bad, "")
        for pid, one in outcomes.items():
            found[pid] = None if one.error else CudaState(one.value)
        return found

    def lock(self, pids: Iterable[int], timeout_s: float) -> dict[int, float]:
        """No CUDA call of these processes begins any more, and those under way have ended: all of them, or none.

        Returns seconds by process. Raises SmrError TIMEOUT or GPU_FAILED.
        """
        todo = list(pids)
        outcomes = self._call("lock", todo, timeout_s + _LOCK_GRACE_S, driver_s=timeout_s)
        return self._all_or_back("lock", todo, outcomes, timeout_s, stopped=False)

    def checkpoint(
        self, pids: Iterable[int], timeout_s: float, stopped: bool = False, expected_bytes: Mapping[int, int] | None = None
    ) -> dict[int, float]:
        """Bring the GPU memory of locked processes into their own memory, all in parallel: all of them, or all run again.

        `stopped`: the processes are stopped (state T) and stay so; else they must be able to run. `expected_bytes`: how much
        each has on its GPUs; memory is made ready for so much (smr.shim.gpu.prefault). Raises as `lock`.
        """
        todo = list(pids)
        outcomes = self._call("state", todo, STATE_S)
        if all(not one.error and one.value == CudaState.LOCKED for one in outcomes.values()):
            more = {"expected_bytes": dict(expected_bytes or {})}
            outcomes = self._call("checkpoint", todo, timeout_s, stopped=stopped, more=more)
        else:
            outcomes = {pid: _not_locked(one) for pid, one in outcomes.items()}
        return self._all_or_back("checkpoint", todo, outcomes, timeout_s, stopped=stopped)

    def restore(
        self,
        pids: Iterable[int],
        timeout_s: float,
        pairs: Sequence[GpuPair] = (),
        stopped: bool = False,
        gates: Mapping[int, Sequence[tuple[int, int]]] | None = None,
    ) -> dict[int, float]:
        """Bring the GPU memory of checkpointed processes back, all in parallel; they are locked then.

        `pairs`: empty, or one for each GPU of the checkpoint. `gates`: memory of a process that is not there yet and will be
        (smr.shim.gpu.gate), with `stopped` only. Raises SmrError GPU_MEMORY, TIMEOUT or GPU_FAILED.
        """
        todo = list(pids)
        more = {"gates": {pid: [list(one) for one in found] for pid, found in (gates or {}).items()}}
        outcomes = self._call("restore", todo, timeout_s, stopped=stopped, pairs=pairs, more=more)
        return self._all_or_error("restore", todo, outcomes)

    def unlock(self, pids: Iterable[int], timeout_s: float, stopped: bool = False) -> dict[int, float]:
        """CUDA calls of locked processes go on; with `stopped` as soon as they are continued. Raises TIMEOUT or GPU_FAILED."""
        todo = list(pids)
        return self._all_or_error("unlock", todo, self._call("unlock", todo, timeout_s, stopped=stopped))

    def release(self, pids: Iterable[int], timeout_s: float, stopped: bool = False) -> None:
        """Whatever state each process is in, back to running: restore, unlock. Nothing to do for those that have ended.

        Raises SmrError GPU_FAILED that names the processes that are not, when all was tried with all of them.
        """
        left = self._back(list(pids), timeout_s, stopped)
        if left:
            message = f"not all processes are back from the GPU checkpoint: {'; '.join(left)}"
            raise SmrError(message, hint="see 'dmesg', lines with NVRM; end the container", code=Code.GPU_FAILED)

    def _all_or_back(
        self, call: str, pids: Sequence[int], outcomes: Mapping[int, Outcome], timeout_s: float, *, stopped: bool
    ) -> dict[int, float]:
        failed = [one for one in outcomes.values() if one.error]
        if not failed:
            return {pid: one.seconds for pid, one in outcomes.items()}
        left = self._back(pids, timeout_s, stopped)
        raise self._error(call, failed, "; ".join(left) or "nothing is left locked")

    def _all_or_error(self, call: str, pids: Sequence[int], outcomes: Mapping[int, Outcome]) -> dict[int, float]:
        failed = [one for one in outcomes.values() if one.error]
        if not failed:
            return {pid: one.seconds for pid, one in outcomes.items()}
        raise self._error(call, failed, "; ".join(self._left(pids)))

    def _back(self, pids: Sequence[int], timeout_s: float, stopped: bool) -> list[str]:
        """Restore and unlock, up to three times: a call whose helper was killed may end later. What is left then, in words."""
        dumb: set[int] = set()
        for _ in range(_ROUNDS):
            states = self._states(pids, dumb)
            if not any(state in (CudaState.LOCKED, CudaState.CHECKPOINTED) for state in states.values()):
                break
            locked = [pid for pid, state in states.items() if state == CudaState.LOCKED]
            if todo := [pid for pid, state in states.items() if state == CudaState.CHECKPOINTED]:
                outcomes = self._tried("restore", todo, timeout_s, stopped)
                locked += [pid for pid, one in outcomes.items() if not one.error]
            if locked:
                self._tried("unlock", locked, timeout_s, stopped)
        return self._left(pids, dumb)

    def _tried(self, call: str, pids: Sequence[int], timeout_s: float, stopped: bool) -> Mapping[int, Outcome]:
        try:
            return self._call(call, pids, timeout_s, stopped=stopped)
        except SmrError as error:
            return {pid: Outcome(pid=pid, error=error.message, lost=True) for pid in pids}

    def _states(self, pids: Sequence[int], dumb: set[int]) -> dict[int, CudaState]:
        """The states of those that have one; `dumb` takes up those about which the driver does not answer."""
        asked = [pid for pid in pids if pid not in dumb and self._same(pid)]
        outcomes = self._tried("state", asked, STATE_S, stopped=False)
        dumb.update(pid for pid, one in outcomes.items() if one.lost and self._same(pid))
        return {pid: CudaState(one.value) for pid, one in outcomes.items() if not one.error}

    def _left(self, pids: Sequence[int], dumb: set[int] | None = None) -> list[str]:
        """The processes that do not run, in words."""
        silent = set() if dumb is None else dumb
        states = self._states(pids, silent)
        words = [f"process {self._name(pid)} is {state.name}" for pid, state in states.items() if state != CudaState.RUNNING]
        words += [f"process {self._name(pid)}: the driver does not answer" for pid in sorted(silent)]
        blocked = sorted({pid for pid, _ in self._masks if self._same(pid)})
        return words + [f"process {self._name(pid)} has its signals blocked" for pid in blocked]

    def _call(
        self,
        call: str,
        pids: Sequence[int],
        timeout_s: float,
        *,
        driver_s: float = 0.0,
        stopped: bool = False,
        pairs: Sequence[GpuPair] = (),
        more: Mapping[str, object] | None = None,
    ) -> dict[int, Outcome]:
        """One call for all processes at once. Every process has an outcome; raises only when there is no helper to be had."""
        if not pids:
            return {}
        for pid in pids:
            self._seen.setdefault(pid, (procs.start_ticks(pid), channel.name(pid)))
        self.ready()
        self._mend()
        words = [[pair.old, pair.new] for pair in pairs]
        members = {"pids": list(pids), "timeout_s": driver_s, "stopped": stopped, "pairs": words}
        return self._ask(call, pids, timeout_s, {**members, **(more or {})})

    def _mend(self) -> None:
        """Give the threads that a killed helper left with blocked signals their masks back."""
        if not self._masks:
            return
        threads = [[pid, tid, mask] for (pid, tid), mask in self._masks.items()]
        self._ask("mend", sorted({pid for pid, _ in self._masks}), _MEND_S, {"threads": threads})
        self.ready()

    def _ask(self, call: str, pids: Sequence[int], timeout_s: float, members: Mapping[str, object]) -> dict[int, Outcome]:
        assert self._channel is not None
        self._requests += 1
        pending = Pending(request=self._requests, call=call, waiting=set(pids))
        deadline = time.monotonic() + timeout_s
        try:
            self._channel.send({"id": pending.request, "call": call, **members})
            while pending.waiting and time.monotonic() < deadline:
                reply = self._channel.receive(min(deadline, time.monotonic() + _LOOK_S))
                if reply is None:
                    self._bury(pending)
                elif reply.get("id") == pending.request:
                    self._take(pending, reply)
            reason, late = f"it did not return within {timeout_s:g} s", True
        except HelperGoneError as error:
            reason, late = error.message, False
        for pid in tuple(pending.waiting):
            self._settle(pending, Outcome(pid=pid, seconds=timeout_s, error=reason, lost=True, late=late))
        if any(one.lost for one in pending.done.values()):
            self._retire()
        return {pid: pending.done[pid] for pid in pids}

    def _take(self, pending: Pending, reply: Mapping[str, object]) -> None:
        pid = int(str(reply["pid"]))
        if "mask" in reply:
            self._masks[pid, int(str(reply["tid"]))] = int(str(reply["mask"]))
            return
        seconds = float(str(reply["seconds"]))
        error = str(reply.get("error", ""))
        # OneThread's error, or its note on the driver's, says that the thread could not be brought back.
        if not reply.get("notes") and "signals blocked" not in error:
            self._masks = {key: mask for key, mask in self._masks.items() if key[0] != pid}
        self._settle(
            pending,
            Outcome(
                pid=pid,
                value=int(str(reply.get("value", 0))),
                seconds=seconds,
                error=error,
                number=int(str(reply.get("number", 0))),
            ),
        )

    def _bury(self, pending: Pending) -> None:
        """A call about a process that has ended may never return: give it a moment, not its whole time."""
        now = time.monotonic()
        for pid in tuple(pending.waiting):
            if not self._same(pid) and now - pending.ended.setdefault(pid, now) > _ENDED_S:
                self._settle(pending, Outcome(pid=pid, error="it did not return", lost=True))

    def _settle(self, pending: Pending, outcome: Outcome) -> None:
        pending.waiting.discard(outcome.pid)
        pending.done[outcome.pid] = outcome
        self.times.append(CallTime(pid=outcome.pid, call=pending.call, seconds=outcome.seconds))

    def _restart(self) -> None:
        self.close()
        self._channel = Channel()

    def _retire(self) -> None:
        """This helper has calls that hang: a fresh one does the rest."""
        if self._channel is not None:
            self._channel.close(patience_s=_RETIRE_S)
        self._channel = None

    def _same(self, pid: int) -> bool:
        """Whether this is still the process that was first named."""
        ticks = self._seen.get(pid, (0, ""))[0]
        return procs.alive(pid) and (not ticks or procs.start_ticks(pid) == ticks)

    def _name(self, pid: int) -> str:
        return self._seen.get(pid, (0, str(pid)))[1]

    def _error(self, call: str, failed: Sequence[Outcome], left: str) -> SmrError:
        """One error of all failed outcomes; the first decides the code."""
        words = [f"process {self._name(one.pid)}: {self._why(one)}" for one in failed]
        first = failed[0]
        code, hint = Code.GPU_FAILED, "see 'dmesg', lines with NVRM"
        if first.number == _OUT_OF_MEMORY and call == "restore":
            code, hint = Code.GPU_MEMORY, "'nvidia-smi' shows what uses the GPU: end it, or choose another with smr.gpu.map"
        elif first.number == NOT_READY and call == "lock":
            code, hint = Code.TIMEOUT, "work on the GPU does not end: quiesce the server first (smr.quiesce), or try again"
        elif first.late and self._same(first.pid):
            code = Code.TIMEOUT
        elif first.number == _NOT_SUPPORTED:
            hint = "it may hold peer-to-peer or shared memory (NCCL, CUDA IPC); 'dmesg', lines with NVRM, has more"
        message = f"cannot {call} {'; '.join(words)}" + (f". {left}" if left else "")
        return SmrError(message, hint=hint, code=code, pid=first.pid, call=call, left=left)

    def _why(self, one: Outcome) -> str:
        if not self._same(one.pid):
            return f"the process ended meanwhile ({one.error})"
        return one.error


def _not_locked(one: Outcome) -> Outcome:
    found = one.error or f"it is {CudaState(one.value).name}, not LOCKED"
    return Outcome(pid=one.pid, error="" if not one.error and one.value == CudaState.LOCKED else found, number=one.number)


def open_session(config: Config) -> Session:
    """Start a helper and return at once. Raises SmrError GPU_FAILED when it cannot be started."""
    return Session()
