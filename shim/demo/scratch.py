"""The demo's folder on disk, and its way out: whatever ends the demo, what it made is taken back first.

Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt once, wherever the demo stands, and are ignored from then on, so that
containers, mounts and daemons are ended in order by the contexts that own them. The folder goes last.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from smr.shim.run import run

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def scratch(parent: Path = Path("/var/tmp")) -> Iterator[Path]:
    """A folder under `parent` that is gone at the end."""
    with _signals_unwind():
        base = Path(tempfile.mkdtemp(prefix="smr-demo-", dir=parent))
        try:
            yield base
        finally:
            _remove(base)


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    before = {number: signal.signal(number, _interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _remove(base: Path) -> None:
    """Remove the folder, but never through a mount: one that is left (an engine that failed) is detached before."""
    for point in mounts_below(base):
        run(["umount", "--lazy", point], timeout_s=30, check=False)
    if not mounts_below(base):
        shutil.rmtree(base, ignore_errors=True)


def mounts_below(base: Path) -> list[str]:
    """Mount points under `base`, the newest first."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in reversed(points) if point.startswith(f"{base}/")]
