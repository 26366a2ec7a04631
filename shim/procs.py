"""Processes as /proc shows them: trees, container pids, leftovers."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
CAP_SYS_RESOURCE = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process: host pid, pid in its innermost namespace, state letter of /proc/PID/stat."""

    pid: int
    ns_pid: int
    state: str


def tree(root_pid: int) -> list[Process]:
    """`root_pid` and all its descendants, parents first. Processes that end meanwhile are left out."""
    found: list[Process] = []
    todo = [root_pid]
    while todo:
        pid = todo.pop(0)
        process = describe(pid)
        if process is None:
            continue
        found.append(process)
        todo += children(pid)
    return found


def children(pid: int) -> list[int]:
    """Children of all threads of `pid`."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in (PROC / str(pid) / "task").iterdir():
            with contextlib.suppress(OSError):
                found += [int(word) for word in (task / "children").read_text().split()]
    return found


def parent(pid: int) -> int:
    """The parent's pid; 0 when the process is gone, or has none here."""
    try:
        return int((PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def thread_at_page_start(pid: int) -> int:
    """A thread whose stack pointer is a multiple of the page size; 0 when there is none. Only threads that wait can be told."""
    with contextlib.suppress(OSError):
        for task in (PROC / str(pid) / "task").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                # Documentation/filesystems/proc.rst: the last two words are the stack pointer and where it is; or "running".
                if int((task / "syscall").read_text().split()[-2], 16) % os.sysconf("SC_PAGE_SIZE") == 0:
                    return int(task.name)
    return 0


def describe(pid: int) -> Process | None:
    """State of one process, or None when it is gone."""
    try:
        lines = (PROC / str(pid) / "status").read_text(errors="replace").splitlines()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    ns_pids = values.get("NSpid", str(pid)).split()
    return Process(pid=pid, ns_pid=int(ns_pids[-1]), state=values.get("State", "?").split()[0])


def all_pids() -> list[int]:
    """Every process of this pid namespace."""
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]


def with_environment(entry: str) -> list[int]:
    """Processes that were started with a variable: "NAME=value"."""
    wanted = entry.encode()
    found = []
    for pid in all_pids():
        with contextlib.suppress(OSError):
            if wanted in (PROC / str(pid) / "environ").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def holding(*folders: Path) -> list[int]:
    """Processes with an open file, the current directory or an argument in one of `folders`; not this one.

    An argument counts because a runtime that has just begun has opened nothing yet.
    """
    prefixes = tuple(f"{folder}/" for folder in folders)
    return [pid for pid in all_pids() if pid != os.getpid() and any(f"{path}/".startswith(prefixes) for path in _paths(pid))]


def _paths(pid: int) -> Iterable[str]:
    with contextlib.suppress(OSError):
        yield from os.fsdecode((PROC / str(pid) / "cmdline").read_bytes()).split("\0")
    with contextlib.suppress(OSError):
        yield str((PROC / str(pid) / "cwd").readlink())
    with contextlib.suppress(OSError):
        for fd in (PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                yield str(fd.readlink())


def kill_all(find: Callable[[], Iterable[int]], *, timeout_s: float = 10.0) -> list[int]:
    """SIGKILL what `find` returns until it returns nothing; what is left after `timeout_s` is returned.

    `find` is asked again each round, because a process may fork while it is being killed.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        left = [pid for pid in find() if (process := describe(pid)) is not None and process.state != "Z"]
        if not left or time.monotonic() > deadline:
            return left
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether `pid` exists and is no zombie."""
    process = describe(pid) if pid > 0 else None
    return process is not None and process.state not in "ZX"


def same(pid: int, started_s: float) -> bool:
    """Whether `pid` is still the process that began at `started_s`, and no zombie: numbers are used again."""
    return alive(pid) and started(pid) == started_s


def started(pid: int) -> float:
    """When a process began, in seconds since boot; 0.0 when it is gone."""
    return start_ticks(pid) / os.sysconf("SC_CLK_TCK")


def start_ticks(pid: int) -> int:
    """The same in clock ticks, field 22 of /proc/PID/stat."""
    try:
        text = (PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[19])


def kill_pending(pid: int) -> bool:
    """Whether a SIGKILL waits for a process to run again."""
    try:
        lines = (PROC / str(pid) / "status").read_text(errors="replace").splitlines()
    except OSError:
        return False
    bit = 1 << (signal.SIGKILL - 1)
    return any(int(line.split()[1], 16) & bit for line in lines if line.startswith(("SigPnd:", "ShdPnd:")))


def named(command: str) -> list[int]:
    """Processes whose command name is `command`, zombies left out."""
    found = []
    for pid in all_pids():
        with contextlib.suppress(OSError):
            words = (PROC / str(pid) / "stat").read_text(errors="replace")
            if f"({command})" in words and words.rpartition(")")[2].split()[0] not in "ZX":
                found.append(pid)
    return found


def has_capability(number: int) -> bool:
    """Whether this process has a capability in effect (capability.h)."""
    lines = (PROC / "self/status").read_text().splitlines()
    bits = next(line.split()[1] for line in lines if line.startswith("CapEff"))
    return bool(int(bits, 16) >> number & 1)
