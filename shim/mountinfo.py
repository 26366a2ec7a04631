"""/proc/self/mountinfo, parsed (proc_pid_mountinfo(5))."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class MountEntry:
    """One mount: where, of which type, with which options of its file system."""

    point: str
    type: str
    options: str


def entries(text: str | None = None) -> list[MountEntry]:
    """Mounts of this mount namespace, in the order they were made."""
    found = []
    for line in (_own() if text is None else text).split("\n"):
        if not line:
            continue
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        found.append(MountEntry(point=unescape(before.split(" ")[4]), type=kind, options=options))
    return found


def _own() -> str:
    # Paths are bytes: a name that is no UTF-8 must not end a restore.
    return Path("/proc/self/mountinfo").read_text(errors="surrogateescape")


def points() -> list[str]:
    """Mount points, in the order they were made."""
    return [entry.point for entry in entries()]


def unescape(text: str) -> str:
    """Space, tab, newline and backslash stand as octal escapes."""
    raw = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), os.fsencode(text))
    return os.fsdecode(raw)
