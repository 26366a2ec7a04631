"""Restore: the connections of a checkpoint put into the sockets of the stopped tree, and the others ended.

CRIU has made each of these sockets a closed one, with its options, its place in epoll sets and its descriptors. Then:

    inner                   built again at both ends, then both begin to speak; its address is loopback, or the container's, which
                            may be another now
    outer, `established`    built again where it was. Until its socket is there, a deaf one of ours stands in for it: the kernel
                            resets whatever it does not know
    all others              connected to ourselves and reset, so that whoever reads, writes, polls or waits in an epoll set finds
                            ECONNRESET, as when the peer's machine has died. An attempt to connect finds ECONNREFUSED

A socket that CRIU has closed would say end of file, which some protocols take for the end of a document. Where a reset cannot
be had, as when the socket is bound to a device, that is what is left. Nothing of `revive` fails a restore.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from smr.images.connections import Connection, End, plain
from smr.proto.annotations import Tcp
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec
from smr.shim import network, procs
from smr.shim.tcp import repair, table

_LISTENERS = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
_MAPPED = "::ffff:127.0.0.1"
_LINGER = struct.pack("ii", 1, 0)
# On loopback it takes microseconds; where something filters it, nobody is to wait for each of a thousand.
_RESET_S = 0.2


@dataclass(slots=True)
class Outcome:
    """How many sockets found which end, for `smr inspect`, and what the user should know."""

    restored: int = 0
    reset: int = 0
    closed: int = 0
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, int]:
        """For the record."""
        return {"restored": self.restored, "reset": self.reset, "closed": self.closed}


@dataclass(slots=True, kw_only=True)
class _Socket:
    """A connection and the socket that is to have it."""

    connection: Connection
    sock: socket.socket
    reuse: int = 0


Places = dict[tuple[End, End], socket.socket]


@contextlib.contextmanager
def stand_in(connections: Sequence[Connection], mode: Tcp, spec: Spec) -> Iterator[Places]:
    """Deaf sockets in place of outer connections in the new container's namespace, by their ends.

    None where that is yet to be made. Raises NETWORK_FAILED where a connection is in use there already.
    """
    places: Places = {}
    with contextlib.ExitStack() as stack:
        outer = [one for one in connections if not one.inner and one.stream is not None]
        path = spec.namespaces.get("network", "/proc/self/ns/net")
        if mode is Tcp.ESTABLISHED and outer and path:
            problem = network.in_namespace(Path(path), lambda: _deaf(outer, places, stack))
            if problem is not None:
                raise problem
        yield places


def _deaf(outer: Sequence[Connection], places: Places, stack: contextlib.ExitStack) -> SmrError | None:
    """Fill `places` in this thread's namespace; returns what is in the way."""
    for one in outer:
        assert one.stream is not None
        sock = stack.enter_context(socket.socket(one.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
        try:
            repair.deafen(sock)
            repair.repair_on(sock)
            repair.build(sock, one.local, one.remote, one.state, replace(one.stream, received=b"", queued=b"", unsent=0))
        except OSError as error:
            return SmrError(
                f"the connection from {one.remote[0]} port {one.remote[1]} to {one.local[0]} port {one.local[1]} cannot be had"
                f" here: {error.strerror}",
                hint="the container that was checkpointed must be gone: smr checkpoint --stop; or set smr.tcp=close",
                code=Code.NETWORK_FAILED,
            )
        places[one.local, one.remote] = sock
    return None


def revive(
    connections: Sequence[Connection], pid: int, mode: Tcp, moves: Callable[[], Mapping[str, str]], places: Places
) -> Outcome:
    """Give the stopped tree of `pid` its connections; `moves`: old to new addresses, `places`: what `stand_in` yielded."""
    here = network.addresses(pid)
    outcome = Outcome()
    with contextlib.ExitStack() as stack:
        sockets = list(_borrow(connections, pid, stack))
        kept = [one for one in sockets if _survives(one.connection, mode)]
        lost = [one for one in sockets if not _survives(one.connection, mode)]
        moved = moves() if any(one.connection.inner and not _stays(one.connection.local, here) for one in kept) else {}
        lost += _build([_with_ends(one, here, moved) for one in kept], pid, places)
        outcome.restored = len(sockets) - len(lost)
        failed = [one for one in lost if _survives(one.connection, mode)]
        if failed:
            ends = ", ".join(sorted({f"{one.connection.local[0]} port {one.connection.local[1]}" for one in failed})[:3])
            outcome.warnings = (f"{len(failed)} TCP connections could not be restored and were reset: {ends}",)
        outcome.reset = _reset(lost, pid)
        outcome.closed = len(lost) - outcome.reset
    return outcome


def _survives(one: Connection, mode: Tcp) -> bool:
    return one.stream is not None and (one.inner or mode is Tcp.ESTABLISHED)


def _borrow(connections: Sequence[Connection], pid: int, stack: contextlib.ExitStack) -> Iterator[_Socket]:
    """The closed TCP sockets of the tree that are to be connections; others are left alone, whatever an image says of them."""
    here = {process.ns_pid: process.pid for process in procs.tree(pid)}
    for one in connections:
        with contextlib.suppress(OSError, KeyError):
            sock = stack.enter_context(repair.borrow(here[one.pid], one.fd))
            is_tcp = sock.type == socket.SOCK_STREAM and sock.proto == socket.IPPROTO_TCP and sock.family == one.family
            if is_tcp and repair.state_of(sock) == table.CLOSE:
                yield _Socket(connection=one, sock=sock)


def _with_ends(one: _Socket, here: Sequence[str], moved: Mapping[str, str]) -> _Socket:
    """An inner connection at addresses that the container has: its own, that which took its place, or loopback."""
    if one.connection.inner:
        local, remote = (_moved(end, here, moved) for end in (one.connection.local, one.connection.remote))
        one.connection = replace(one.connection, local=local, remote=remote)
    return one


def _moved(end: End, here: Sequence[str], moved: Mapping[str, str]) -> End:
    if _stays(end, here):
        return end
    address = plain(end)[0]
    new = moved.get(address, "::1" if ":" in address else "127.0.0.1")
    return (f"::ffff:{new}" if ":" in end[0] and ":" not in address else new, end[1], 0)


def _stays(end: End, here: Sequence[str]) -> bool:
    from ipaddress import ip_address

    return plain(end)[0] in here or ip_address(plain(end)[0]).is_loopback


def _build(sockets: list[_Socket], pid: int, places: Places) -> list[_Socket]:
    """Build all, then let them speak; returns those that could not be, with the inner ones at their other ends."""
    failed: list[_Socket] = []
    for one in sockets:
        stream = one.connection.stream
        assert stream is not None
        try:
            repair.disconnect(one.sock)
            one.reuse = repair.repair_on(one.sock)
            if (place := places.get((one.connection.local, one.connection.remote))) is not None:
                place.close()
            repair.build(one.sock, one.connection.local, one.connection.remote, one.connection.state, stream)
        except OSError:
            failed.append(one)
    gone = {_other(one) for one in failed}
    failed += [one for one in sockets if one not in failed and _ends(one) in gone]
    for one in failed:
        with contextlib.suppress(OSError):
            repair.disconnect(one.sock)
            repair.repair_off(one.sock, one.reuse)
    built = [one for one in sockets if one not in failed]
    for one in built:
        repair.repair_off(one.sock, one.reuse, probe=not one.connection.inner)
    ends = {_ends(one) for one in built}
    for one in built:
        assert one.connection.stream is not None
        with contextlib.suppress(OSError):
            repair.finish(one.sock, one.connection.state, one.connection.stream)
    alone = [one for one in built if _other(one) not in ends]
    finished = [one.connection for one in alone if one.connection.state in repair.ENDED]
    if finished:
        network.in_namespace(Path(f"/proc/{pid}/ns/net"), lambda: _say_fins(finished))
    return failed


def _ends(one: _Socket) -> tuple[tuple[str, int], tuple[str, int]]:
    return plain(one.connection.local), plain(one.connection.remote)


def _other(one: _Socket) -> tuple[tuple[str, int], tuple[str, int]]:
    return plain(one.connection.remote), plain(one.connection.local)


def _say_fins(connections: Sequence[Connection]) -> None:
    for one in connections:
        assert one.stream is not None
        with contextlib.suppress(OSError):
            repair.say_fin(one.family, one.local, one.remote, one.stream)


def _reset(sockets: Sequence[_Socket], pid: int) -> int:
    """End them with an error that waits; returns for how many that worked. The rest say end of file."""
    if not sockets:
        return 0
    with contextlib.ExitStack() as stack:
        made = network.in_namespace(Path(f"/proc/{pid}/ns/net"), lambda: _peers(stack))
        count, give_up = 0, time.monotonic() + _RESET_S
        for one in sockets:
            attempt = one.connection.state == table.SYN_SENT
            try:
                if time.monotonic() > give_up:
                    raise TimeoutError
                _reset_one(one.sock, made, refuse=attempt)
                count += 1
                give_up = time.monotonic() + _RESET_S
            except OSError:
                with contextlib.suppress(OSError):
                    one.sock.shutdown(socket.SHUT_RDWR)
    return count


@dataclass(slots=True, kw_only=True)
class _Peers:
    """A listener and a port that refuses, at one loopback address; `address` is how a socket of `family` writes it."""

    listener: socket.socket
    refusing: socket.socket
    address: str


def _peers(stack: contextlib.ExitStack) -> list[_Peers]:
    """What there is of both: a socket of IPv6 can be reset by IPv4's, where IPv6 is turned off."""
    found = []
    for family, address in _LISTENERS:
        with contextlib.suppress(OSError):
            made = [stack.enter_context(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)) for _ in range(2)]
            for sock in made:
                sock.bind((address, 0))
            made[0].listen(8)
            found.append(_Peers(listener=made[0], refusing=made[1], address=address))
    return found


def _reset_one(sock: socket.socket, peers: Sequence[_Peers], *, refuse: bool) -> None:
    failed: OSError = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    blocking = os.get_blocking(sock.fileno())
    os.set_blocking(sock.fileno(), False)
    try:
        for peer in sorted(peers, key=lambda one: one.listener.family != sock.family):
            if sock.family == socket.AF_INET and peer.listener.family != sock.family:
                continue
            host = _MAPPED if peer.listener.family != sock.family else peer.address
            try:
                repair.disconnect(sock)
                target = peer.refusing if refuse else peer.listener
                number = sock.connect_ex((host, target.getsockname()[1]))
                if number not in {0, errno.EINPROGRESS}:
                    raise OSError(number, os.strerror(number))
                if not refuse:
                    _hang_up(peer.listener)
                return
            except OSError as error:
                failed = error
        raise failed
    finally:
        os.set_blocking(sock.fileno(), blocking)


def _hang_up(listener: socket.socket) -> None:
    if not select.select([listener], [], [], _RESET_S)[0]:
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    accepted, _ = listener.accept()
    with accepted:
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
