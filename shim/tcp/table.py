"""Which TCP connections a tree of processes has, from /proc: sockets with a descriptor, and what the other end of each is.

An *inner* connection has both ends in the tree, or its other end was in this network namespace and has been closed: all that it
can still bring is in the socket itself. Every other connection is an *outer* one. So is one whose other end waits to be accepted:
nobody has a descriptor of that end, and CRIU does not save it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from smr.shim import network
from smr.shim.procs import PROC, Process

ESTABLISHED, SYN_SENT, SYN_RECEIVED, FIN_WAIT1, FIN_WAIT2, TIME_WAIT, CLOSE, CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING = range(1, 12)
CONNECTED = frozenset({ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING})
_MAPPED = "0000000000000000FFFF0000"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of /proc/net/tcp[6]. Ends are (address, port) in hexadecimal as the kernel prints them, IPv4 in IPv6 as IPv4."""

    local: tuple[str, str]
    remote: tuple[str, str]
    state: int
    inode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A connected socket: a descriptor of it in one of the processes, and whether it is an inner one."""

    process: Process
    fd: int
    inode: int
    state: int
    inner: bool


def find(pid: int, tree: Iterable[Process]) -> list[Found]:
    """The connected sockets of `tree`, whose network namespace is that of `pid`. Where there are none, no descriptor is read."""
    rows = [row for name in ("tcp", "tcp6") for row in parse(_text(pid, name))]
    if not any(row.inode and row.state in CONNECTED | {SYN_SENT} for row in rows):
        return []
    owners = descriptors(tree)
    ends = {(row.local, row.remote): row for row in rows if row.state != LISTEN}
    return [
        Found(process=owners[row.inode][0], fd=owners[row.inode][1], inode=row.inode, state=row.state, inner=inner)
        for row in rows
        if row.inode in owners and row.state in CONNECTED | {SYN_SENT}
        for inner in (_is_inner(row, ends.get((row.remote, row.local)), owners, pid),)
    ]


def _is_inner(row: Row, other: Row | None, owners: dict[int, tuple[Process, int]], pid: int) -> bool:
    if row.state == SYN_SENT:
        return False
    if other is not None and other.inode in owners:
        return other.state in CONNECTED
    # The other end was closed, and all that it sent is here, since its FIN is.
    closed = row.state == CLOSE_WAIT and (other is None or (other.inode == 0 and other.state not in {ESTABLISHED, CLOSE_WAIT}))
    return closed and _is_own(row.remote[0], pid)


def _is_own(address: str, pid: int) -> bool:
    parsed = network.address_of(address)
    return parsed.is_loopback or str(parsed) in network.addresses(pid)


def parse(text: str) -> Iterator[Row]:
    """The lines of one of the two files."""
    for line in text.splitlines()[1:]:
        words = line.split()
        yield Row(local=_end(words[1]), remote=_end(words[2]), state=int(words[3], 16), inode=int(words[9]))


def _end(text: str) -> tuple[str, str]:
    address, _, port = text.partition(":")
    return address.removeprefix(_MAPPED) if len(address) == 32 else address, port


def descriptors(tree: Iterable[Process]) -> dict[int, tuple[Process, int]]:
    """The sockets of a tree by inode, each with one descriptor of it."""
    found: dict[int, tuple[Process, int]] = {}
    for process in tree:
        folder = PROC / str(process.pid) / "fd"
        with contextlib.suppress(OSError):
            for entry in os.scandir(folder):
                with contextlib.suppress(OSError):
                    name = os.readlink(entry.path)  # noqa: PTH115  # a Path for each of thousands takes longer than all else
                    if name.startswith("socket:["):
                        found.setdefault(int(name[8:-1]), (process, int(entry.name)))
    return found


def _text(pid: int, name: str) -> str:
    try:
        return (PROC / str(pid) / "net" / name).read_text()
    except OSError:
        return ""
