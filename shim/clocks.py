"""The clocks that a container has seen: after a restore they go on from there, whatever machine or boot it is.

CRIU writes what CLOCK_MONOTONIC and CLOCK_BOOTTIME showed into timens-N.img and puts the restored tree into a time namespace
whose offsets make both go on from that (criu/timens.c). So neither goes back, nor do they show the time between: timers and
sleeps have what was left of them. A kernel without time namespaces (CONFIG_TIME_NS, Linux 5.6) shows its own clocks, and where
these are behind, programs would see time go back: such a restore is refused.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from smr.proto.errors import Code, SmrError

_CLOCKS = {"monotonic": time.CLOCK_MONOTONIC, "boottime": time.CLOCK_BOOTTIME}


def of_dump(folder: Path) -> dict[str, float]:
    """Clock to seconds, from the dump in `folder`; empty where its kernel had no time namespaces. Raises IMAGE_CORRUPT."""
    from smr.images.criu_files import read_message
    from smr.proto.criu import identity_pb2

    path = next((file for file in sorted(folder.glob("timens-*.img")) if file.stat().st_size > 8), None)
    if path is None:
        return {}
    entry = read_message(path, identity_pb2.TimensEntry)
    return {name: at.tv_sec + at.tv_nsec / 1e9 for name, at in (("monotonic", entry.monotonic), ("boottime", entry.boottime))}


def check(seen: Mapping[str, float], namespace: Path = Path("/proc/self/ns/time")) -> None:
    """Raise UNSUPPORTED when a clock of the checkpoint would go back on this node."""
    if namespace.exists():
        return
    for name, seconds in seen.items():
        now = time.clock_gettime(_CLOCKS[name]) if name in _CLOCKS else seconds
        if now < seconds:
            raise SmrError(
                f"CLOCK_{name.upper()} would go back, from {seconds:.0f} s to {now:.0f} s: this kernel has no time namespaces",
                hint="restore on a kernel with CONFIG_TIME_NS (Linux 5.6 and newer), or on a node that booted earlier",
                code=Code.UNSUPPORTED,
            )
