"""Packets of saved connections are dropped on this node from the end of their source (`--stop`) until they are restored.

An engine sets the new container's network up before it calls its runtime. A packet that comes in between finds nobody and is
answered with a reset; and one always comes, because it has been waiting for somebody to answer for the address. So where
connections are to outlive their container, their packets alone are dropped, by their addresses and ports as the container
sees them. Whatever else is sent to the address is left alone, also when another container has it.

One table of nftables in the namespace of the node, `inet smr`, with a set for each family, is there while it has an element. An
element ends by itself after `TIMEOUT_S`, when any TCP has given up: what is never restored leaves nothing for good. A node
without nft has no such lock, and another node has none of this one's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from smr.images.connections import Connection, plain
from smr.proto.errors import SmrError
from smr.shim.run import run

TIMEOUT_S = 1000
# Behind any address translation, on their way to a container, and to a socket of the node's own namespace.
_TABLE = f"""add table inet smr
add set inet smr held4 {{ type ipv4_addr . inet_service . ipv4_addr . inet_service; timeout {TIMEOUT_S}s; }}
add set inet smr held6 {{ type ipv6_addr . inet_service . ipv6_addr . inet_service; timeout {TIMEOUT_S}s; }}
add chain inet smr out {{ type filter hook postrouting priority 300; }}
add chain inet smr in {{ type filter hook input priority 300; }}
flush chain inet smr out
flush chain inet smr in
""" + "".join(
    f"add rule inet smr {chain} {family} saddr . tcp sport . {family} daddr . tcp dport @{name} drop\n"
    for chain in ("out", "in")
    for family, name in (("ip", "held4"), ("ip6", "held6"))
)


def lock(connections: Iterable[Connection], folder: Path) -> str:
    """Drop packets to these; returns why that cannot be, or "". `folder` is SMR's own, for the lock's own lock."""
    wanted = _elements(connections)
    if not wanted:
        return ""
    if shutil.which("nft") is None:
        return "this node has no nft"
    try:
        with _alone(folder):
            _nft(_TABLE + "".join(f"add {elements}" for elements in _sets(wanted).values()))
    except SmrError as error:
        return error.message
    return ""


def unlock(connections: Iterable[Connection], folder: Path) -> None:
    """Let them through, and take the table away when nothing is left in it. No error where nothing was locked."""
    wanted = _elements(connections)
    if not wanted or shutil.which("nft") is None:
        return
    with _alone(folder), contextlib.suppress(SmrError):
        if "table inet smr\n" not in _nft("list tables\n"):
            return
        # One that was never there, or whose time was up, cannot be deleted; one that was just added can.
        _nft("".join(f"{verb} {elements}" for verb in ("add", "delete") for elements in _sets(wanted).values()))
        if "elements = " not in _nft("list table inet smr\n"):
            _nft("delete table inet smr\n")


def _sets(wanted: dict[str, Sequence[str]]) -> dict[str, str]:
    """What follows a verb, by set."""
    return {name: f"element inet smr {name} {{ {', '.join(sorted(set(some)))} }}\n" for name, some in wanted.items()}


def _elements(connections: Iterable[Connection]) -> dict[str, Sequence[str]]:
    """Elements by set, as packets of the other end have their addresses and ports."""
    found: dict[str, list[str]] = {}
    for one in connections:
        local, remote = plain(one.local)[0], plain(one.remote)[0]
        name = "held6" if ":" in local else "held4"
        found.setdefault(name, []).append(f"{remote} . {one.remote[1]} . {local} . {one.local[1]}")
    return dict(found)


def _nft(script: str) -> str:
    return run(["nft", "-f", "-"], input_text=script, timeout_s=20).stdout


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The table to ourselves; a flock of the directory leaves no file."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
