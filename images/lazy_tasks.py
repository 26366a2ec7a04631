"""The processes behind a lazy restore: how CRIU announces them, what /proc says about them, and how they are ended.

CRIU's protocol (criu/uffd.c, 4.1 to 4.3), on a stream socket "lazy-pages.socket" in its work directory: each task sends its pid
as an int and, with a byte, its userfaultfd; a zombie sends minus its pid and no descriptor; at the end the main process sends
0x52535446. The int carries the sender's credentials, and so its pid as it is seen here.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from smr.images import uffd
from smr.images.lazy_journal import Registration
from smr.images.lazy_state import Space
from smr.proto.errors import Code, SmrError

RESTORE_FINISHED = 0x52535446
_INT = struct.Struct("<i")
_CREDENTIALS = struct.Struct("<iII")
_SCM_CREDENTIALS = 2
_TIMEOUT_S = 30.0


class HangupError(Exception):
    """CRIU has closed the connection."""


def receive(connection: socket.socket) -> Registration | bool:
    """The next task; True at the end of the restore, False for a zombie. Raises HangupError; OSError if CRIU stalls."""
    connection.settimeout(_TIMEOUT_S)
    data, credentials, _ = _receive(connection, _INT.size)
    (pid,) = _INT.unpack(data)
    if pid == RESTORE_FINISHED:
        return True
    if pid < 0:
        return False
    _, _, fd = _receive(connection, 1)
    if fd < 0:
        raise SmrError(f"CRIU sent no userfaultfd for process {pid}", code=Code.CRIU_FAILED)
    os.set_blocking(fd, False)
    try:
        pidfd = os.pidfd_open(credentials)
    except OSError:
        pidfd = -1
    return Registration(pid, credentials, fd, pidfd)


def _receive(connection: socket.socket, size_bytes: int) -> tuple[bytes, int, int]:
    data, sender, fd = b"", 0, -1
    while len(data) < size_bytes:
        got, ancillary, _, _ = connection.recvmsg(size_bytes - len(data), 256)
        if not got:
            raise HangupError
        data += got
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, _SCM_CREDENTIALS):
                sender = _CREDENTIALS.unpack(content)[0]
            elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                (fd,) = _INT.unpack(content[: _INT.size])
    return data, sender, fd


def threads(pid: int) -> int:
    """How many threads a process has; 0 when it is gone."""
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return 0


def flagged(pid: int, flag: str) -> list[tuple[int, int]]:
    """The mappings of a process whose VmFlags have a flag of two letters: "wf" wipe on fork, "um" watched by a userfaultfd."""
    found: list[tuple[int, int]] = []
    span = (0, 0)
    try:
        with Path(f"/proc/{pid}/smaps").open(encoding="ascii", errors="replace") as smaps:
            for line in smaps:
                first = line.split(" ", 1)[0]
                if not first.endswith(":"):
                    start, _, end = first.partition("-")
                    span = int(start, 16), int(end, 16)
                elif first == "VmFlags:" and flag in line.split()[1:]:
                    found.append(span)
    except OSError:
        return []
    return found


def end_processes(spaces: Sequence[Space]) -> None:
    """SIGKILL to all processes of a restore and their descendants, until none is left that could read what it lacks."""
    pause_s = 0.001
    while any(not space.done and uffd.alive(space.fd) for space in spaces):
        for pidfd in {space.pidfd for space in spaces if space.pidfd >= 0}:
            with suppress(OSError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for pid in _related({space.host_pid for space in spaces if space.host_pid}):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(pause_s)
        pause_s = min(0.2, pause_s * 2)


def _related(roots: Iterable[int]) -> set[int]:
    """Descendants of processes, and all of their pid namespaces unless that is ours."""
    own = _namespace(os.getpid())
    inside = {_namespace(pid) for pid in roots} - {own, None}
    parents = {int(path.name): _parent(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    found = {pid for pid in parents if inside and _namespace(pid) in inside}
    known = {pid for pid in roots if pid in parents}
    while more := {pid for pid, parent in parents.items() if parent in known or parent in found} - found:
        found |= more
    return found - {os.getpid(), os.getppid()}


def _namespace(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return None


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except OSError:
        return 0
