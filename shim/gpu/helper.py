"""The program that makes the driver's calls: `python -I -m smr.shim.gpu.helper OWNER_PID`; its other end is smr.shim.gpu.session.

A process of its own because a call of the driver may never return, and because CUDA takes 0.2 s to initialise, which so goes on
beside the owner's other work. Lines of JSON on stdin and stdout:

    <- {"ready": {"driver": "580.159.04", "cuda": 13000}}  or  {"refused": {"code", "message", "hint"}}, and then it ends
    -> {"id": 1, "call": "lock", "pids": [7, 9], "timeout_s": 10, "stopped": false, "pairs": [["GPU-old", "GPU-new"]]}
    <- {"id": 1, "pid": 7, "tid": 8, "mask": 0}            before thread 8's signals are blocked (smr.shim.gpu.onethread)
    <- {"id": 1, "pid": 7, "seconds": 0.1, "value": 0}     or, in place of the value, {"error": ..., "number": CUresult or 0}
                                                           a checkpoint may have "expected_bytes": {"7": 8589934592},
                                                           a restore "gates": {"7": [[START, END]]}
    -> {"id": 2, "call": "mend", "threads": [[7, 8, 0]]}   process, thread, signal mask
    -> {"call": "end"}

Each process of a request has a thread of its own, and a request does not wait for those before it. It ends with its owner, at
the end of stdin or when told, whatever hangs; before that it stops and lets go of every thread that it has running. It brings
no process back by itself: only the owner, or who takes over from it, knows whether CRIU is at work on them.
Standard library only.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

from smr.proto.errors import SmrError
from smr.shim.gpu.driver import CudaError, Driver, GpuPair, open_driver, release
from smr.shim.gpu.onethread import OneThread, host_thread, mend
from smr.shim.gpu.prefault import Prefault

_END_S = 5.0


class Helper:
    """The requests under way, and the threads of other processes that run because of them."""

    def __init__(self, replies: int) -> None:
        self._replies = replies
        self._writing = threading.Lock()
        self._running: set[OneThread] = set()

    def reply(self, **members: object) -> None:
        """One line. An owner that is gone is seen by others."""
        with self._writing, contextlib.suppress(OSError):
            os.write(self._replies, json.dumps(members).encode() + b"\n")

    def initialise(self) -> Driver:
        """Load the driver and initialise CUDA, and say so; ends the program when that fails."""
        try:
            driver = open_driver()
            driver.init()
            self.reply(ready={"driver": release(), "cuda": driver.version()})
        except SmrError as error:
            self.reply(refused={"code": error.code.value, "message": error.message, "hint": error.hint})
            self.end()
        return driver

    def serve(self, driver: Driver) -> NoReturn:
        """Requests until the end of stdin."""
        for line in sys.stdin:
            request = json.loads(line)
            if request["call"] == "end":
                break
            if request["call"] == "mend":
                for pid, tid, mask in request["threads"]:
                    self._begin(request["id"], pid, functools.partial(mend, pid, tid, mask))
                continue
            for pid in request["pids"]:
                self._begin(request["id"], pid, functools.partial(self._call, driver, pid, request))
        self.end()

    def end(self) -> NoReturn:
        """Stop what runs, and end, whatever hangs."""
        ending = [threading.Thread(target=one.end, daemon=True) for one in tuple(self._running)]
        for thread in ending:
            thread.start()
        for thread in ending:
            thread.join(_END_S)
        os._exit(0)

    def watch(self, owner: int) -> None:
        """End with the owner. A forked child of it may keep the pipe open, so its process is watched as well."""
        poll = select.poll()
        poll.register(0, 0)
        with contextlib.suppress(ProcessLookupError):
            poll.register(os.pidfd_open(owner), select.POLLIN)
            # Its number may have been used again before it was opened.
            if os.getppid() == owner:
                poll.poll()
        self.end()

    def _begin(self, request: int, pid: int, work: Callable[[], int | None]) -> None:
        threading.Thread(target=self._answer, args=(request, pid, work), daemon=True).start()

    def _answer(self, request: int, pid: int, work: Callable[[], int | None]) -> None:
        began = time.monotonic()
        try:
            found: Mapping[str, object] = {"value": work() or 0}
        except SmrError as error:
            found = {"error": error.message, "number": error.number if isinstance(error, CudaError) else 0}
            found = {**found, "notes": getattr(error, "__notes__", [])}
        self.reply(id=request, pid=pid, seconds=time.monotonic() - began, **found)

    def _call(self, driver: Driver, pid: int, request: Mapping[str, object]) -> int | None:
        pairs = [GpuPair(old=old, new=new) for old, new in _pairs(request)]
        calls: Mapping[str, Callable[[], int | None]] = {
            "state": lambda: int(driver.get_state(pid)),
            "lock": lambda: driver.lock(pid, float(str(request["timeout_s"]))),
            "checkpoint": lambda: _checkpoint(driver, pid, request),
            "restore": lambda: driver.restore(pid, pairs),
            "unlock": lambda: driver.unlock(pid),
        }
        work = calls[str(request["call"])]
        if not request.get("stopped"):
            return work()
        tid = host_thread(pid, driver.restore_thread(pid))
        one = OneThread(
            pid,
            tid,
            on_mask=lambda tid, mask: self.reply(id=request["id"], pid=pid, tid=tid, mask=mask),
            gates=_gates(request, pid),
        )
        self._running.add(one)
        try:
            with one:
                return work()
        finally:
            self._running.discard(one)


def _checkpoint(driver: Driver, pid: int, request: Mapping[str, object]) -> None:
    """The call, with memory made ready for what it brings, when it is told how much that is."""
    expected = request.get("expected_bytes")
    size_bytes = int(expected.get(str(pid), 0)) if isinstance(expected, dict) else 0
    if not size_bytes or request.get("stopped"):
        return driver.checkpoint(pid)
    with Prefault(pid, size_bytes):
        return driver.checkpoint(pid)


def _gates(request: Mapping[str, object], pid: int) -> list[tuple[int, int]]:
    gates = request.get("gates")
    return [(int(start), int(end)) for start, end in gates.get(str(pid), [])] if isinstance(gates, dict) else []


def _pairs(request: Mapping[str, object]) -> list[tuple[str, str]]:
    pairs = request.get("pairs")
    return [(str(old), str(new)) for old, new in pairs] if isinstance(pairs, list) else []


def main() -> NoReturn:
    """Initialise, then serve. What the driver's library prints goes to stderr: stdout is the replies'."""
    helper = Helper(os.dup(1))
    os.dup2(2, 1)
    threading.Thread(target=helper.watch, args=(int(sys.argv[1]),), daemon=True).start()
    helper.serve(helper.initialise())


if __name__ == "__main__":
    main()
