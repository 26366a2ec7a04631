"""Checkpoint: the TCP connections of a frozen tree, read after CRIU's dump, and the source's own kept whole.

    take      which connections there are. Inner ones are saved in every mode, outer ones with `established` and `auto`: those are
              deaf from then on, so that nothing arrives that is not in the image
    release   the source hears again; nothing was sent or lost meanwhile, what came is sent once more by the other end
    outlive   (--stop) outer connections are kept, deaf and mute, until the source's network is gone: whoever closed them, or
              answered for an address where they are not known, would reset them at the other end

Until `release` or the end, sockets are in a state that their process could not live with. So the guard of a checkpoint calls
`rescue`, which finds them again, when the process in charge was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from smr.images.connections import Connection, plain, write_connections
from smr.proto.annotations import Tcp
from smr.proto.checkpoint import Connections
from smr.proto.errors import Code, SmrError
from smr.shim import network, procs
from smr.shim.tcp import lock, repair, table
from smr.shim.tcp.table import CONNECTED

# An engine takes a container's network down when its processes have ended, in a process of its own.
_NETWORK_GONE_S = 10.0
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


@dataclass(slots=True)
class Capture:
    """See the module. `found` are the connections as they are to be in the image; `warnings` are the user's to know."""

    pid: int
    mode: Tcp
    found: list[Connection] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _deaf: list[socket.socket] = field(default_factory=list)
    _namespace: int = -1
    _folder: Path = Path()

    def take(self) -> None:
        """Find and save. The tree must be frozen, and CRIU's dump be done: it would take our filters for the container's."""
        for one in table.find(self.pid, procs.tree(self.pid)):
            try:
                self.found.append(self._save(one))
            except OSError as error:
                self._refuse(one, error)
        self._drop_halves()

    def _refuse(self, one: table.Found, error: OSError) -> None:
        """Raise where the user relies on this connection; else it is reset where the image is restored, as others are."""
        what = f"a TCP connection of process {one.process.ns_pid} (descriptor {one.fd}) cannot be saved: {error.strerror}"
        if self.mode is Tcp.ESTABLISHED and not one.inner:
            hint = "it needs Linux 5.6, CAP_NET_ADMIN and a socket without a filter of its own; or use --tcp auto"
            raise SmrError(what, hint=hint, code=Code.CHECKPOINT_FAILED) from error
        self.warnings.append(f"{what}; it will end at a restore")

    def _drop_halves(self) -> None:
        """An inner connection of which one end is lost is lost at both."""
        lost = {(plain(one.remote), plain(one.local)) for one in self.found if one.inner and one.stream is None and one.remote[1]}
        self.found = [
            replace(one, stream=None) if one.inner and (plain(one.local), plain(one.remote)) in lost else one
            for one in self.found
        ]

    def _save(self, one: table.Found) -> Connection:
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(repair.borrow(one.process.pid, one.fd))
            connection = _described(one, sock)
            # An attempt to connect is not a connection yet; it fails at once in the restored container, and is made again.
            if one.state not in CONNECTED or not connection.remote[1] or (self.mode is Tcp.CLOSE and not one.inner):
                return connection
            try:
                if not one.inner:
                    repair.deafen(sock)
                    self._deaf.append(sock)
                    stack.pop_all()  # it stays open until `release`
                with repair.in_repair(sock):
                    state, stream = repair.read(sock)
            except OSError as error:
                self._refuse(one, error)
                return connection
            return replace(connection, state=state, stream=stream) if state in CONNECTED else connection

    def write(self, folder: Path) -> Connections:
        """Put the connections beside CRIU's images; returns what the config says of them."""
        if self.found:
            write_connections(folder, self.found)
        return Connections(
            inner=sum(1 for one in self.found if one.inner),
            outer=sum(1 for one in self.found if not one.inner),
            saved=sum(1 for one in self.found if one.stream is not None and not one.inner),
            addresses=tuple(sorted({one.local[0] for one in self.found if one.stream is not None and not one.inner})),
        )

    def release(self) -> None:
        """The source's connections as they were; once."""
        if self._namespace >= 0 and procs.alive(self.pid):
            rescue(self.pid, self._folder)  # it was to end, and did not
        while self._deaf:
            with self._deaf.pop() as sock, contextlib.suppress(OSError):
                repair.hear(sock)
        self._close_namespace()

    def mute(self, folder: Path) -> None:
        """The source is about to end: from now on its outer connections close without a word. `folder`: smr.shim.tcp.lock's."""
        if not self._deaf:
            return
        self._namespace = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._folder = folder
        for sock in self._deaf:
            with contextlib.suppress(OSError):
                repair.repair_on(sock)
        # Not before: `rescue` knows by the mode whose packets are dropped.
        why = lock.lock((one for one in self.found if one.stream is not None and not one.inner), folder)
        if why:
            self.warnings.append(
                f"a packet that reaches the new container before its connections are restored will reset its connection: {why}"
            )

    def outlive(self) -> None:
        """The source has ended: wait until its network is gone, or take it down, and only then let go of its connections."""
        if not self._deaf:
            return
        path = Path(f"/proc/self/fd/{self._namespace}")
        try:
            if not _is_shared(self._namespace):
                deadline = time.monotonic() + _NETWORK_GONE_S
                while network.in_namespace(path, _interfaces_up) and time.monotonic() < deadline:
                    time.sleep(0.02)
                network.in_namespace(path, _interfaces_down)
        finally:
            while self._deaf:
                self._deaf.pop().close()
            self._close_namespace()

    def _close_namespace(self) -> None:
        if self._namespace >= 0:
            os.close(self._namespace)
            self._namespace = -1


@contextlib.contextmanager
def capture(pid: int, mode: Tcp) -> Iterator[Capture]:
    """A capture that is released in the end, whatever happens, unless its container has ended."""
    held = Capture(pid, mode)
    try:
        yield held
    finally:
        held.release()


def _described(one: table.Found, sock: socket.socket) -> Connection:
    local, remote = repair.end_of(sock.getsockname()), ("", 0, 0)
    with contextlib.suppress(OSError):  # it is not there while it is being connected, nor after a reset
        remote = repair.end_of(sock.getpeername())
    family, pid = sock.family, one.process.ns_pid
    return Connection(pid=pid, fd=one.fd, family=family, state=one.state, local=local, remote=remote, inner=one.inner)


def rescue(pid: int, folder: Path) -> None:
    """Undo for a tree whatever a capture had done to its sockets; nothing where there was none. `folder`: smr.shim.tcp.lock's."""
    locked: list[Connection] = []
    for one in table.find(pid, procs.tree(pid)):
        with contextlib.suppress(OSError), repair.borrow(one.process.pid, one.fd) as sock:
            repair.hear(sock)
            if repair.is_in_repair(sock):
                locked.append(_described(one, sock))
                # What SO_REUSEADDR was is not known any more; set, it hinders nobody.
                repair.repair_off(sock, 1)
    lock.unlock((one for one in locked if one.remote[1]), folder)


def _is_shared(namespace: int) -> bool:
    """Whether a process that is not ours has this network namespace."""
    here = os.fstat(namespace)
    for pid in procs.all_pids():
        with contextlib.suppress(OSError):
            there = (procs.PROC / str(pid) / "ns/net").stat()
            if (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev) and procs.alive(pid):
                return True
    return False


def _interfaces_up() -> list[str]:
    """Interfaces of this thread's network namespace that are up, without `lo`."""
    return [name for _, name in socket.if_nameindex() if name != "lo" and _flags(name) & _IFF_UP]


def _interfaces_down() -> None:
    for name in _interfaces_up():
        _flags(name, clear=_IFF_UP)


def _flags(name: str, *, clear: int = 0) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        found = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sh14x", name.encode(), 0))
        _, flags = struct.unpack("16sh14x", found)
        if clear:
            fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", name.encode(), flags & ~clear))
        return int(flags)
