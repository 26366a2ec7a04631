"""Waits for a state of a CUDA process as the driver sees it, then kills: `watch.py PID STATE TARGET`.

STATE is 1 (locked) or 2 (checkpointed); when PID has reached it, TARGET gets SIGKILL and the program ends with 0. TARGET is a
pid, or `helper`: SMR's process that makes the driver's calls. Ends with 3 when PID is gone, with 4 when there is no helper.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path


def helper() -> int:
    """Pid of SMR's helper program; 0 when there is none. Tests run one after the other, so there is one at most."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"smr.shim.gpu.helper" in (entry / "cmdline").read_bytes():
                return int(entry.name)
        except OSError:
            continue
    return 0


def main() -> int:
    """Wait and kill."""
    pid, wanted, target = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    cuda = ctypes.CDLL("libcuda.so.1")
    if cuda.cuInit(0):
        return 2
    print("watching", flush=True)
    state = ctypes.c_int(-1)
    while True:
        if cuda.cuCheckpointProcessGetState(pid, ctypes.byref(state)) == 0 and state.value >= wanted:
            break
        if not Path(f"/proc/{pid}").exists():
            return 3
        time.sleep(0.0005)
    victim = helper() if target == "helper" else int(target)
    if not victim:
        return 4
    os.kill(victim, signal.SIGKILL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
