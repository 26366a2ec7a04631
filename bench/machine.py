"""The machine a benchmark ran on, so that its numbers can be judged and repeated."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def describe(programs: Mapping[str, Sequence[str]]) -> dict[str, object]:
    """Processor, memory, kernel, cgroups, this repository's commit, and the first line that each program says of its version."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cgroup": "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1",
        "python": platform.python_version(),
        "commit": _said(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]),
        "load": round(os.getloadavg()[0], 2),
        **{name: _said(argv) for name, argv in programs.items()},
    }


def _field(path: str, key: str) -> str:
    for line in Path(path).read_text().splitlines():
        if line.startswith(key):
            return line.partition(":")[2].strip()
    return ""


def _said(argv: Sequence[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=20)
    except OSError as error:
        return f"not there: {error.strerror}"
    return (done.stdout.strip() or done.stderr.strip() or "?").splitlines()[0]
