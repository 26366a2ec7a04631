"""The driver's checkpoint calls for the stock side of bench.gpu: `python -m bench.gpu_calls`, with CUDA initialised.

It reads orders and writes answers, one JSON object a line:

    {"do": "checkpoint", "pids": [..]}   lock and checkpoint, all processes at once
    {"do": "restore", "pids": [..]}      restore and unlock
    {"lock_s": .., "checkpoint_s": ..} or {"restore_s": .., "unlock_s": ..} or {"error": ".."}

Nothing of SMR's: what is measured beside SMR must not be SMR. Structures are those of cuda.h (CUcheckpointLockArgs).
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

_LOCK_TIMEOUT_MS = 30_000


class _LockArgs(ctypes.Structure):
    _fields_ = (("timeout_ms", ctypes.c_uint), ("reserved0", ctypes.c_uint), ("reserved1", ctypes.c_uint64 * 7))


class Calls:
    """A process that makes the calls, so that none of its time is CUDA's initialisation."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, do: str, pids: Sequence[int]) -> dict[str, float]:
        """Order and answer. RuntimeError when a call fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, "pids": list(pids)}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "the process ended"}')
        if "error" in answer:
            raise RuntimeError(f"CUDA {do} of {list(pids)}: {answer['error']}")
        return {key: float(value) for key, value in answer.items()}


@contextmanager
def calls() -> Iterator[Calls]:
    """Start the process; it has CUDA initialised when the block begins."""
    argv = [sys.executable, "-m", "bench.gpu_calls"]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, cwd=Path(__file__).parents[1], stdin=pipe, stdout=pipe, text=True) as process:
        made = Calls(process)
        made("restore", [])
        try:
            yield made
        finally:
            assert process.stdin is not None
            process.stdin.close()


def main() -> None:
    """Be that process."""
    cuda = ctypes.CDLL("libcuda.so.1")
    if status := cuda.cuInit(0):
        raise SystemExit(f"cuInit answers {status}")
    lock = _LockArgs(timeout_ms=_LOCK_TIMEOUT_MS)
    steps: dict[str, tuple[tuple[str, Callable[[int], int]], ...]] = {
        "checkpoint": (
            ("lock", lambda pid: int(cuda.cuCheckpointProcessLock(pid, ctypes.byref(lock)))),
            ("checkpoint", lambda pid: int(cuda.cuCheckpointProcessCheckpoint(pid, None))),
        ),
        "restore": (
            ("restore", lambda pid: int(cuda.cuCheckpointProcessRestore(pid, None))),
            ("unlock", lambda pid: int(cuda.cuCheckpointProcessUnlock(pid, None))),
        ),
    }
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(_work(steps[order["do"]], order["pids"])), flush=True)


def _work(steps: Sequence[tuple[str, Callable[[int], int]]], pids: Sequence[int]) -> dict[str, object]:
    answer: dict[str, object] = {}
    for name, call in steps:
        begin = time.perf_counter()
        with ThreadPoolExecutor(max_workers=len(pids) or 1) as pool:
            statuses = list(pool.map(call, pids))
        answer[f"{name}_s"] = time.perf_counter() - begin
        if any(statuses):
            return {"error": f"{name} answers {statuses}"}
    return answer


if __name__ == "__main__":
    main()
