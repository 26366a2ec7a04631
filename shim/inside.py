"""Reaching into a container from the host: HTTP to a server in its network namespace, files under its root.

A socket belongs to the network namespace in which it is made, so only its making happens in there; connecting and talking is
done by the caller's own thread. What a container may have put in the way is not followed: paths are resolved by openat2(2)
below the container's root (Linux 5.6), never through a link out of it. Standard library only: a restore calls this.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from smr.shim import network

# Same number on every architecture but alpha; struct open_how is three 64-bit words.
_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_IN_ROOT = 0x02, 0x04, 0x10
_BODY_BYTES = 8 << 20
_RETRY_S = 0.05
# Nobody listens, or the network's interfaces or the socket are not there, yet.
_NOT_YET = (errno.ECONNREFUSED, errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.ENOENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a server listens in a container. `hosts` are IP addresses, tried in turn; or `unix`, an absolute path of a socket."""

    hosts: tuple[str, ...] = ("127.0.0.1", "::1")
    port: int = 80
    unix: str = ""

    def url(self, path: str) -> str:
        """The address as a message shows it."""
        if self.unix:
            return f"unix://{self.unix}:{path}"
        host = f"[{self.hosts[0]}]" if ":" in self.hosts[0] else self.hosts[0]
        return f"http://{host}:{self.port}{path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a server said: the HTTP status and at most 8 MiB of the body."""

    status: int
    body: bytes


class SilentError(Exception):
    """A server did not answer in time, or closed the connection: the request was sent, and may have had an effect."""


def open_in_root(root_fd: int, path: str, flags: int, mode: int = 0, *, symlinks: bool = False) -> int:
    """openat2 of `path` with the directory `root_fd` as the root; without `symlinks` a link on the way is OSError ELOOP."""
    resolve = _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS | (0 if symlinks else _RESOLVE_NO_SYMLINKS)
    how = (ctypes.c_uint64 * 3)(flags | os.O_CLOEXEC, mode, resolve)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    while True:
        fd = libc.syscall(
            ctypes.c_long(_OPENAT2),
            ctypes.c_int(root_fd),
            ctypes.c_char_p(os.fsencode(path)),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        number = ctypes.get_errno()
        if fd >= 0:
            return int(fd)
        # EAGAIN: something was renamed or mounted on the way while the kernel looked.
        if number not in (errno.EAGAIN, errno.EINTR):
            raise OSError(number, os.strerror(number), path)


@contextlib.contextmanager
def root_of(pid: int) -> Iterator[int]:
    """A descriptor of the root directory that process `pid` sees, with the mounts it sees."""
    fd = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def request(
    pid: int,
    endpoint: Endpoint,
    method: str,
    path: str,
    *,
    body: bytes | None = None,
    json: bool = False,
    deadline: float,
    retry_refused: bool = False,
) -> Answer:
    """One HTTP request from inside the container of `pid`; `deadline` in time.monotonic().

    Raises OSError when there is no connection (ECONNREFUSED, ENOENT...; with `retry_refused` not before the deadline),
    SilentError when there is no whole answer in time, OSError for the rest. No proxy is asked, no redirect followed.
    """
    import http.client

    peer = _connect(pid, endpoint, deadline, retry_refused=retry_refused)
    # A socket's timeout is for one read; a server that sends a byte now and then would hold us for ever.
    watchdog = threading.Timer(max(deadline - time.monotonic(), 0.0), _hang_up, (peer,))
    watchdog.daemon = True
    watchdog.start()
    try:
        host = "localhost" if endpoint.unix else endpoint.url("").removeprefix("http://")
        return _talk(peer, host, method, path, body, json=json)
    except (OSError, http.client.HTTPException) as error:
        late = time.monotonic() >= deadline
        raise SilentError("no answer in time" if late else f"closed the connection: {error or type(error).__name__}") from error
    finally:
        watchdog.cancel()
        peer.close()


def _talk(peer: socket.socket, host: str, method: str, path: str, body: bytes | None, *, json: bool) -> Answer:
    import http.client  # with what it imports 15 ms, of which a restore has nothing

    headers = {"Host": host, "Connection": "close", "User-Agent": "smr"}
    if body is not None:
        headers["Content-Type"] = "application/json" if json else "text/plain; charset=utf-8"
    elif method not in ("GET", "HEAD"):
        headers["Content-Length"] = "0"
    connection = http.client.HTTPConnection("localhost")
    connection.auto_open = 0  # never a connection of its own: that would be to our localhost
    connection.sock = peer
    with contextlib.closing(connection):
        connection.request(method, path, body=body, headers=headers)
        with connection.getresponse() as response:
            content = response.read(_BODY_BYTES)
            if response.length and len(content) < _BODY_BYTES:  # read(n) says nothing of a body that is cut off
                raise http.client.IncompleteRead(content, response.length)
            return Answer(status=response.status, body=content)


def _hang_up(peer: socket.socket) -> None:
    with contextlib.suppress(OSError):
        peer.shutdown(socket.SHUT_RDWR)


def _connect(pid: int, endpoint: Endpoint, deadline: float, *, retry_refused: bool) -> socket.socket:
    while True:
        try:
            return connect(pid, endpoint, deadline)
        except OSError as error:
            if not retry_refused or error.errno not in _NOT_YET or time.monotonic() + _RETRY_S >= deadline:
                raise
            time.sleep(_RETRY_S)


def connect(pid: int, endpoint: Endpoint, deadline: float) -> socket.socket:
    """A connection to a server inside the container of `pid`. Raises OSError."""
    if endpoint.unix:
        return _connect_unix(pid, endpoint.unix, deadline)
    first: OSError | None = None
    for host in endpoint.hosts:
        try:
            return _connect_tcp(pid, host, endpoint.port, deadline)
        except OSError as error:
            # A container without IPv6 has no ::1 to be refused at: the first address says what is wrong.
            first = first or error
    raise first or ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def _connect_tcp(pid: int, host: str, port: int, deadline: float) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    peer = network.in_namespace(Path(f"/proc/{pid}/ns/net"), lambda: socket.socket(family, socket.SOCK_STREAM))
    try:
        peer.settimeout(max(deadline - time.monotonic(), 0.001))
        peer.connect((host, port))
        peer.settimeout(None)
    except BaseException:
        peer.close()
        raise
    return peer


def _connect_unix(pid: int, path: str, deadline: float) -> socket.socket:
    """A socket by its descriptor: connect(2) on a path would follow the container's links from our root."""
    with root_of(pid) as root:
        found = open_in_root(root, path, os.O_PATH, symlinks=True)
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        peer.settimeout(max(deadline - time.monotonic(), 0.001))
        peer.connect(f"/proc/self/fd/{found}")
        peer.settimeout(None)
    except BaseException:
        peer.close()
        raise
    finally:
        os.close(found)
    return peer
