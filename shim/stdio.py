"""stdin, stdout and stderr of a container across a checkpoint: the new container's take the place of the old one's.

Runtimes see to the usual case, pipes that an engine's monitor reads, and to terminals. What is left:

    at a checkpoint   a file or FIFO outside of the container, as podman's log driver `passthrough` gives: CRIU is told that it
                      is external
    at a restore      pipes where a file, socket or terminal is now; a file, FIFO or /dev/null where anything is now: CRIU's
                      images are edited so that it takes what the new container has (smr.images.stdio_files)

What had been written before the checkpoint and is still in a pipe belongs to the old container, whose monitor reads it: CRIU
dumps the contents of pipes that a process of the tree can read, and puts none into one that it is given.

A terminal keeps the size of the checkpoint until the engine sets its own, or has that of the spec (`process.consoleSize`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
import termios
from collections.abc import Iterable
from pathlib import Path

from smr.proto.checkpoint import CheckpointConfig, Stdio
from smr.proto.oci import Spec

_FDS = (0, 1, 2)
_NULL = (1, 3)


def dump_externals(pid: int) -> dict[str, str]:
    """CRIU's option for files and FIFOs that the first process has as stdio and that lie on no mount of its own."""
    keys = dict.fromkeys(key for fd in _FDS if (key := _outside(pid, fd)))
    return {"external": "\n".join(keys)} if keys else {}


def merged(*options: dict[str, str]) -> dict[str, str]:
    """Options of CRIU, where of each name there may be several lines."""
    found: dict[str, str] = {}
    for one in options:
        for name, value in one.items():
            found[name] = f"{found[name]}\n{value}" if name in found and name in {"external", "inherit-fd"} else value
    return found


def _outside(pid: int, fd: int) -> str:
    """The name that CRIU has for it: file[MOUNT:INODE], hexadecimal; "" for what is not outside."""
    try:
        status = os.stat(f"/proc/{pid}/fd/{fd}")  # noqa: PTH116  # follows the link of /proc
        path = os.readlink(f"/proc/{pid}/fd/{fd}")  # noqa: PTH115
        facts = Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
        mounts = Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape")
    except OSError:
        return ""
    if not path.startswith("/") or not (stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode)):
        return ""
    mount = next((line.split()[1] for line in facts.splitlines() if line.startswith("mnt_id:")), "")
    if not mount or any(line.startswith(f"{mount} ") for line in mounts.split("\n")):
        return ""
    return f"file[{int(mount):x}:{status.st_ino:x}]"


def fit(config: CheckpointConfig, spec: Spec, folder: Path) -> dict[str, str]:
    """CRIU's options for this process's stdio, which becomes the container's; edits the images in `folder` where they need it."""
    if spec.terminal:
        return {}  # it is the runtime's own, and the container's comes by the console socket
    changed = [one for one in config.stdio if one.fd in _FDS and _needs(one)]
    if not changed:
        return {}
    from smr.images.stdio_files import name_of, reroute

    reroute(folder, changed)
    return {"inherit-fd": "\n".join(f"fd[{one.fd}]:{name_of(one.fd)}" for one in _first(changed))}


def _first(stdio: Iterable[Stdio]) -> list[Stdio]:
    """One for each file: stdout and stderr may be the same."""
    first: dict[int, Stdio] = {}
    for one in stdio:
        first.setdefault(one.file, one)
    return list(first.values())


def _needs(one: Stdio) -> bool:
    try:
        status = os.fstat(one.fd)
    except OSError:
        return False
    if one.kind == "pipe":
        return not stat.S_ISFIFO(status.st_mode) and not _is_null(status)
    return one.kind == "outside" or (one.kind == "null" and not _is_null(status))


def _is_null(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and (os.major(status.st_rdev), os.minor(status.st_rdev)) == _NULL


def size_terminal(pid: int, spec: Spec) -> None:
    """Give the terminal of the stopped process `pid` the size of the spec, where that has one."""
    process = spec.document.get("process")
    size = process.get("consoleSize") if spec.terminal and isinstance(process, dict) else None
    height, width = (size.get(key) for key in ("height", "width")) if isinstance(size, dict) else (0, 0)
    if not (isinstance(height, int) and isinstance(width, int) and 0 < height < 1 << 16 and 0 < width < 1 << 16):
        return
    # A process that has closed its terminal needs no size.
    with contextlib.suppress(OSError):
        fd = os.open(f"/proc/{pid}/fd/0", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        finally:
            os.close(fd)
