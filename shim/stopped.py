"""Processes of a container that are stopped (SIGSTOP) when it is checkpointed, where the freezer is cgroup v1's.

CRIU attaches to the tasks of a frozen cgroup. For one that is stopped the kernel's attach waits until it has moved from stopped
to traced, which a frozen task never does on v1: both hang, uninterruptibly, until somebody thaws (kernel/ptrace.c,
JOBCTL_TRAPPING). So a stopped task is continued once it is frozen, where it runs nothing, and stopped again before the thaw; the
image's config says that it was stopped, and `start` of a restore leaves it so. The freezer of v2 has no such wait.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable

from smr.shim import cgroups, procs
from smr.shim.procs import Process


def in_the_way(pid: int) -> tuple[Process, ...]:
    """The stopped processes of the tree of `pid` that a dump would wait for."""
    if cgroups.version() == "v2":
        return ()
    return tuple(process for process in procs.tree(pid) if process.state == "T")


def send(processes: Iterable[Process], number: signal.Signals) -> None:
    """SIGCONT or SIGSTOP to each that exists; only while all are frozen."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
