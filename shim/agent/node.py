"""An agent that a pod runs on its node: in the node's mount namespace, but in a cgroup namespace of the pod's.

There /proc/PID/cgroup gives paths that do not exist in the node's /sys/fs/cgroup: a container's cgroup is not found when it is
checkpointed, and work cannot leave the pod's cgroup, so that the end of the pod would kill a checkpoint in the middle, and its
guard with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

_CLONE_NEWCGROUP = 0x02000000


def join_node(proc: Path = Path("/proc")) -> bool:
    """Enter the cgroup namespace of process 1 when its files are ours already; whether that was to be done, and could."""
    with contextlib.suppress(OSError):
        if not _same(proc, "mnt") or _same(proc, "cgroup"):
            return False
        fd = os.open(proc / "1/ns/cgroup", os.O_RDONLY | os.O_CLOEXEC)
        try:
            status: int = ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWCGROUP)
            return status == 0
        finally:
            os.close(fd)
    return False


def _same(proc: Path, kind: str) -> bool:
    return os.path.samestat((proc / "1/ns" / kind).stat(), (proc / "self/ns" / kind).stat())
