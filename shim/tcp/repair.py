"""One socket's TCP connection as a `Stream`, and a closed socket made such a connection again: the kernel's TCP_REPAIR.

What is asked of the kernel, and in which order, is what criu/soccr/soccr.c (4.2) asks; how FINs come back is not: both ends of an
inner connection are here, so an end that has shut down its sending simply does so again, once both ends are in place. For an end
whose peer is elsewhere or gone and has sent its FIN, `say_fin` says it once more in the peer's name.

A socket in repair mode sends nothing by itself, and closes silently; what comes for it is still taken in, but for `deafen`.
Leaving the mode sets SO_REUSEADDR to 0, so it is put back. All of this needs CAP_NET_ADMIN over the network namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
from collections.abc import Iterator

from smr.images.connections import End, Stream
from smr.shim.tcp.table import CLOSE_WAIT, CLOSING, FIN_WAIT1, FIN_WAIT2, LAST_ACK

_PIDFD_GETFD = 438  # the same number on every architecture but alpha
_REPAIR, _REPAIR_QUEUE, _QUEUE_SEQ, _REPAIR_OPTIONS, _TIMESTAMP, _REPAIR_WINDOW = 19, 20, 21, 22, 24, 29
_ON, _OFF, _OFF_WITHOUT_PROBE = 1, 0, -1
_NO_QUEUE, _RECEIVED, _SENT = 0, 1, 2
_SIOCOUTQ, _SIOCINQ, _SIOCOUTQNSD = 0x5411, 0x541B, 0x894B
_HAS_TIMESTAMPS, _HAS_SACK, _HAS_SCALE = 1, 2, 4  # TCPI_OPT_*
_OPTION_MSS, _OPTION_SCALE, _OPTION_SACK, _OPTION_TIMESTAMPS = 2, 3, 4, 8
_SNDBUFFORCE, _RCVBUFFORCE, _BUF_LOCK, _TRANSPARENT, _TRANSPARENT6 = 32, 33, 72, 19, 75
_ATTACH_FILTER, _DETACH_FILTER, _GET_FILTER = 26, 27, 26
_LARGEST_BUFFER = (1 << 30) - 1
_SMALLEST_CHUNK = 1024
# The state has a FIN of ours in it (sent, or waiting to be), or one of the other end.
SHUT = frozenset({FIN_WAIT1, FIN_WAIT2, CLOSING, LAST_ACK})
ENDED = frozenset({CLOSE_WAIT, CLOSING, LAST_ACK})
_DROP = struct.pack("=HBBI", 0x06, 0, 0, 0)  # BPF: return 0, that is, keep nothing of the packet


def borrow(pid: int, fd: int) -> socket.socket:
    """A socket of another process, as a descriptor of ours. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.pidfd_open(pid)
    try:
        ours = libc.syscall(_PIDFD_GETFD, handle, fd, 0)
    finally:
        os.close(handle)
    if ours < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    os.set_inheritable(ours, False)
    return socket.socket(fileno=ours)


def end_of(address: tuple[object, ...]) -> End:
    """An address of Python's `socket` as (address, port, scope id)."""
    return str(address[0]).partition("%")[0], int(str(address[1])), int(str(address[3])) if len(address) > 3 else 0


def address_of(family: int, end: End) -> tuple[object, ...]:
    """The same the other way."""
    return (end[0], end[1]) if family == socket.AF_INET else (end[0], end[1], 0, end[2])


def deafen(sock: socket.socket) -> None:
    """Let no packet in: it is dropped as if it had been lost on its way. Raises OSError, EEXIST where the socket has a filter."""
    size = sock.getsockopt(socket.SOL_SOCKET, _GET_FILTER)
    if size:
        raise OSError(errno.EEXIST, "the socket has a filter of its own")
    program = ctypes.create_string_buffer(_DROP, len(_DROP))
    sock.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("@HP", 1, ctypes.addressof(program)))


def hear(sock: socket.socket) -> None:
    """Take back `deafen`; nothing where the filter is not ours."""
    program = ctypes.create_string_buffer(len(_DROP))
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_uint32(1)
    found = libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, _GET_FILTER, program, ctypes.byref(size))
    if found == 0 and size.value == 1 and program.raw == _DROP:
        sock.setsockopt(socket.SOL_SOCKET, _DETACH_FILTER, 0)


@contextlib.contextmanager
def in_repair(sock: socket.socket) -> Iterator[None]:
    """The socket in repair mode for a moment; nothing is sent at its end. Not to be nested."""
    reuse = repair_on(sock)
    try:
        yield
    finally:
        repair_off(sock, reuse)


def repair_on(sock: socket.socket) -> int:
    """Returns SO_REUSEADDR as it was, for `repair_off`."""
    reuse = sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    sock.setsockopt(socket.IPPROTO_TCP, _REPAIR, _ON)
    return reuse


def repair_off(sock: socket.socket, reuse: int, *, probe: bool = False) -> None:
    """Leave the mode; with `probe`, ask the other end at once where it is, so that it learns that we are here again."""
    sock.setsockopt(socket.IPPROTO_TCP, _REPAIR, _OFF if probe else _OFF_WITHOUT_PROBE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(bool(reuse)))


def is_in_repair(sock: socket.socket) -> bool:
    """Whether someone has left it in that mode."""
    return sock.getsockopt(socket.IPPROTO_TCP, _REPAIR) == _ON


def state_of(sock: socket.socket) -> int:
    """TCP state, as in /proc/net/tcp."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[0]


def read(sock: socket.socket) -> tuple[int, Stream]:
    """State and stream of a connected socket in repair mode, which stays as it is; nothing may arrive meanwhile."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)
    state, options, scales = info[0], info[5], info[6]
    low, high = scales & 15, scales >> 4
    if struct.pack("=H", 1) == b"\0\1":
        low, high = high, low
    received, queued, unsent = (_size(sock, ask) for ask in (_SIOCINQ, _SIOCOUTQ, _SIOCOUTQNSD))
    fin_sent, fin_received = state in SHUT, state in ENDED
    if fin_sent:  # it counts as a byte of the queue
        queued, unsent = max(queued - 1, 0), max(unsent - 1, 0)
    in_seq, read_bytes = _queue(sock, _RECEIVED, received)
    out_seq, sent_bytes = _queue(sock, _SENT, queued)
    sock.setsockopt(socket.IPPROTO_TCP, _REPAIR_QUEUE, _NO_QUEUE)
    window = struct.unpack("=5I", sock.getsockopt(socket.IPPROTO_TCP, _REPAIR_WINDOW, 20))
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    hung_up = any(events & select.POLLRDHUP for _, events in poll.poll(0))
    return state, Stream(
        in_seq=(in_seq - fin_received) & 0xFFFFFFFF,
        out_seq=(out_seq - fin_sent) & 0xFFFFFFFF,
        unsent=unsent,
        mss=sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG),
        options=options & (_HAS_TIMESTAMPS | _HAS_SACK | _HAS_SCALE),
        send_scale=low,
        receive_scale=high,
        timestamp=_unsigned(sock.getsockopt(socket.IPPROTO_TCP, _TIMESTAMP)) if options & _HAS_TIMESTAMPS else 0,
        window=window,
        read_shut=hung_up and not fin_received,
        received=read_bytes,
        queued=sent_bytes,
    )


def disconnect(sock: socket.socket) -> None:
    """A closed socket as good as new: the shutdown that CRIU leaves on it is taken away."""
    libc = ctypes.CDLL(None, use_errno=True)
    unspecified = struct.pack("=H26x", socket.AF_UNSPEC)
    if libc.connect(sock.fileno(), unspecified, len(unspecified)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def build(sock: socket.socket, local: End, remote: End, state: int, stream: Stream) -> None:
    """Make a closed socket, in repair mode, the connection that `stream` was; it stays in repair mode. `finish` does the rest."""
    family = sock.family
    sock.bind(address_of(family, local))
    _set_seq(sock, _RECEIVED, stream.in_seq - len(stream.received))
    _set_seq(sock, _SENT, stream.out_seq - len(stream.queued))
    sock.setsockopt(socket.IPPROTO_TCP, _REPAIR_QUEUE, _NO_QUEUE)
    failed = sock.connect_ex(address_of(family, remote))
    if failed not in {0, errno.EINPROGRESS}:
        raise OSError(failed, os.strerror(failed))
    options = [(_OPTION_MSS, stream.mss)]
    if stream.options & _HAS_SACK:
        options.append((_OPTION_SACK, 0))
    if stream.options & _HAS_SCALE:
        options.append((_OPTION_SCALE, stream.send_scale & 0xFFFF | (stream.receive_scale & 0xFFFF) << 16))
    if stream.options & _HAS_TIMESTAMPS:
        options.append((_OPTION_TIMESTAMPS, 0))
    sock.setsockopt(socket.IPPROTO_TCP, _REPAIR_OPTIONS, b"".join(struct.pack("=II", *pair) for pair in options))
    if stream.options & _HAS_TIMESTAMPS:
        sock.setsockopt(socket.IPPROTO_TCP, _TIMESTAMP, struct.pack("=I", stream.timestamp))
    with large_buffers(sock):
        _fill(sock, _RECEIVED, stream.received)
        _fill(sock, _SENT, stream.queued[: len(stream.queued) - stream.unsent])
    sock.setsockopt(socket.IPPROTO_TCP, _REPAIR_QUEUE, _NO_QUEUE)
    first, wanted, largest, receive, up_to = stream.window
    if state in ENDED:  # the FIN, which is not there yet, had taken one
        receive, up_to = (receive + 1) & 0xFFFFFFFF, (up_to - 1) & 0xFFFFFFFF
    sock.setsockopt(socket.IPPROTO_TCP, _REPAIR_WINDOW, struct.pack("=5I", first, wanted, largest, receive, up_to))


def finish(sock: socket.socket, state: int, stream: Stream) -> None:
    """What only a connection out of repair mode can do: queue what was never sent, and shut down."""
    unsent = stream.queued[len(stream.queued) - stream.unsent :] if stream.unsent else b""
    if unsent:
        with large_buffers(sock):
            _send(sock, unsent)
    if state in SHUT:
        sock.shutdown(socket.SHUT_WR)
    if stream.read_shut:
        sock.shutdown(socket.SHUT_RD)


def say_fin(family: int, local: End, remote: End, stream: Stream) -> None:
    """Say the FIN of an end that is not here to the end that is; to be run in its network namespace. `stream` is the latter's."""
    with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as peer:
        level, option = (socket.IPPROTO_IP, _TRANSPARENT) if family == socket.AF_INET else (socket.IPPROTO_IPV6, _TRANSPARENT6)
        peer.setsockopt(level, option, 1)
        mirrored = Stream(
            in_seq=stream.out_seq,
            out_seq=stream.in_seq,
            unsent=0,
            mss=stream.mss,
            options=stream.options,
            send_scale=stream.receive_scale,
            receive_scale=stream.send_scale,
            timestamp=stream.timestamp,
            window=(stream.out_seq, 0xFFFF, 0xFFFF, 0xFFFF, stream.out_seq),
        )
        reuse = repair_on(peer)
        build(peer, remote, local, 1, mirrored)
        repair_off(peer, reuse)
        peer.shutdown(socket.SHUT_WR)
        repair_on(peer)  # so that it closes without a word


@contextlib.contextmanager
def large_buffers(sock: socket.socket) -> Iterator[None]:
    """Room for whatever was in the queues; what the process had set, or had left to the kernel, is put back."""
    kept = [sock.getsockopt(socket.SOL_SOCKET, option) for option in (socket.SO_SNDBUF, socket.SO_RCVBUF)]
    try:
        locked = sock.getsockopt(socket.SOL_SOCKET, _BUF_LOCK)
    except OSError:
        locked = -1  # before Linux 5.14
    for option in (_SNDBUFFORCE, _RCVBUFFORCE):
        sock.setsockopt(socket.SOL_SOCKET, option, _LARGEST_BUFFER)
    try:
        yield
    finally:
        for option, size in zip((_SNDBUFFORCE, _RCVBUFFORCE), kept, strict=True):
            sock.setsockopt(socket.SOL_SOCKET, option, size // 2)  # the kernel doubles it
        if locked >= 0:
            sock.setsockopt(socket.SOL_SOCKET, _BUF_LOCK, locked)


def _fill(sock: socket.socket, queue: int, data: bytes) -> None:
    if data:
        sock.setsockopt(socket.IPPROTO_TCP, _REPAIR_QUEUE, queue)
        _send(sock, data)


def _send(sock: socket.socket, data: bytes) -> None:
    """All of it, at once; the kernel makes one buffer of each piece of a receive queue, and may have none that large."""
    view, chunk = memoryview(data), len(data)
    while view:
        try:
            view = view[sock.send(view[:chunk], socket.MSG_DONTWAIT) :]
        except OSError:
            if chunk <= _SMALLEST_CHUNK:
                raise
            chunk = max(chunk // 2, _SMALLEST_CHUNK)


def _queue(sock: socket.socket, queue: int, length: int) -> tuple[int, bytes]:
    """The sequence number behind a queue, and its `length` bytes."""
    sock.setsockopt(socket.IPPROTO_TCP, _REPAIR_QUEUE, queue)
    seq = _unsigned(sock.getsockopt(socket.IPPROTO_TCP, _QUEUE_SEQ))
    if not length:
        return seq, b""
    data = sock.recv(length + 1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    if len(data) != length:
        raise OSError(errno.EIO, f"a queue has {len(data)} bytes, {length} were announced")
    return seq, data


def _set_seq(sock: socket.socket, queue: int, seq: int) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, _REPAIR_QUEUE, queue)
    sock.setsockopt(socket.IPPROTO_TCP, _QUEUE_SEQ, struct.pack("=I", seq & 0xFFFFFFFF))


def _size(sock: socket.socket, ask: int) -> int:
    (size,) = struct.unpack("=i", fcntl.ioctl(sock, ask, b"\0\0\0\0"))
    return int(size)


def _unsigned(value: int) -> int:
    return value & 0xFFFFFFFF
