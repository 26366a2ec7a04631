"""Runs inside a test container: sockets of every kind and state, held across a checkpoint, that check themselves afterwards.

    socket_zoo.py [HOST PORT]      HOST PORT: a listener of the test, outside: outer connections are made to it

It answers HTTP on port 8000 as workload.py does:

    /look          {"count", "boot"}
    /inner         every kind that must work as if nothing had happened: "ok" or what is wrong
    /outer         what each of those that wait on a connection to the outside has seen: "waiting", or how it ended
    /hold/KIND     holds a socket that cannot be dumped (REFUSED); /drop closes it
    /half          reads the connection `half` to its end, answers there, and closes it
    /send/TEXT     TEXT to the outside on the connection `talk`; answers what came back

Port 8001 takes connections and never accepts them; port 8002 accepts and echoes.
"""

import asyncio
import contextlib
import errno
import json
import os
import select
import socket
import struct
import sys
import threading
import time

ALL = (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")
PATTERN = os.urandom(1 << 16) * 64


def own_address():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 9))
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


def tcp_pair(family=socket.AF_INET, host="127.0.0.1", to=None):
    with socket.create_server((host, 0), family=family, dualstack_ipv6=host == "::") as listener:
        client = socket.create_connection((to or host, listener.getsockname()[1]))
        server, _ = listener.accept()
    return client, server


def talk(one, other, size=300_000):
    """Both directions, more than a buffer holds."""
    for source, target in ((one, other), (other, one)):
        sender = threading.Thread(target=source.sendall, args=(PATTERN[:size],))
        sender.start()
        take(target, PATTERN[:size])
        sender.join()


def take(sock, expected):
    sock.settimeout(10)
    got = b""
    while len(got) < len(expected):
        part = sock.recv(1 << 20)
        if not part:
            break
        got += part
    assert got == expected, f"{len(got)} bytes, {len(expected)} expected"


class Pair:
    """A connection with data in flight both ways."""

    def __init__(self, family=socket.AF_INET, host="127.0.0.1", to=None):
        self.client, self.server = tcp_pair(family, host, to)
        self.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.client.sendall(b"to the server")
        self.server.sendall(b"to the client")

    def check(self):
        assert self.client.getsockname()[1] == self.server.getpeername()[1]
        assert self.client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        take(self.server, b"to the server")
        take(self.client, b"to the client")
        talk(self.client, self.server)
        self.client.sendall(b"to the server")
        self.server.sendall(b"to the client")


class Full:
    """As much in flight as fits, and then a shutdown; nobody has read a byte."""

    def __init__(self):
        self.client, self.server = tcp_pair()
        self.client.setblocking(False)
        self.sent = b""
        try:
            while True:
                part = PATTERN[: 1 << 16]
                self.sent += part[: self.client.send(part)]
        except BlockingIOError:
            pass
        self.client.shutdown(socket.SHUT_WR)

    def check(self):
        assert len(self.sent) > 1 << 20
        take(self.server, self.sent + b"" if self.sent else b"x")
        assert self.server.recv(1) == b""
        self.server.sendall(b"answer")
        take(self.client, b"answer")
        self.sent = b""
        self.check = lambda: None


class HalfClosed:
    def __init__(self):
        self.client, self.server = tcp_pair()
        self.client.sendall(b"last words")
        self.client.shutdown(socket.SHUT_WR)

    def check(self):
        take(self.server, b"last words")
        assert self.server.recv(1) == b""
        self.server.sendall(b"answer")
        take(self.client, b"answer")
        self.check = lambda: None


class PeerGone:
    """The other end was closed, its last words and its end have not been read."""

    def __init__(self, family, host):
        client, self.server = tcp_pair(family, host)
        client.sendall(b"last words")
        client.close()

    def check(self):
        take(self.server, b"last words")
        assert self.server.recv(1) == b""
        self.check = lambda: None


class Processes:
    """A connection between two processes, the other one blocked in a read."""

    def __init__(self):
        client, self.sock = tcp_pair()
        if os.fork() == 0:
            self.sock.close()
            while data := client.recv(100):
                client.sendall(data.upper())
            os._exit(0)
        client.close()

    def check(self):
        self.sock.sendall(b"are you there")
        take(self.sock, b"ARE YOU THERE")


class EdgeTriggered:
    """Data that an edge-triggered epoll has told of already, and data that came later."""

    def __init__(self):
        self.pair = tcp_pair()
        self.epoll = select.epoll()
        self.epoll.register(self.pair[1], select.EPOLLIN | select.EPOLLET)
        self.epoll.register(self.pair[0], select.EPOLLIN)

    def check(self):
        self.epoll.poll(0)
        self.pair[0].sendall(b"more")
        events = dict(self.epoll.poll(5))
        assert events == {self.pair[1].fileno(): select.EPOLLIN}, events
        take(self.pair[1], b"more")


class Listener:
    """A listening socket in an edge-triggered epoll; TIME_WAIT on its port."""

    def __init__(self, family, host):
        self.listener = socket.create_server((host, 0), family=family)
        self.epoll = select.epoll()
        self.epoll.register(self.listener, select.EPOLLIN | select.EPOLLET)
        self.accept()

    def accept(self):
        with socket.create_connection(self.listener.getsockname()[:2]) as client:
            assert self.epoll.poll(5)
            server, _ = self.listener.accept()
            with server:
                server.sendall(b"hello")
                take(client, b"hello")

    check = accept


class UnixStream:
    """Data and a descriptor in flight."""

    def __init__(self, kind):
        self.one, self.other = socket.socketpair(socket.AF_UNIX, kind)
        self.read, write = os.pipe()
        socket.send_fds(self.one, [b"pipe"], [write])
        self.one.send(b"more")
        os.close(write)

    def check(self):
        self.other.settimeout(5)
        data, fds, _, _ = socket.recv_fds(self.other, 4, 1)
        assert (data, len(fds)) == (b"pipe", 1), (data, fds)
        os.write(fds[0], b"x")
        assert os.read(self.read, 1) == b"x"
        assert self.other.recv(4) == b"more"
        socket.send_fds(self.one, [b"pipe"], fds)
        self.one.send(b"more")
        os.close(fds[0])


class UnixNamed:
    """A named and an abstract listener, a connection to each, and a datagram socket."""

    def __init__(self, kind=socket.SOCK_STREAM):
        self.pairs = []
        for name in (f"/tmp/zoo{kind}.sock", f"\0zoo{kind}"):
            listener = socket.socket(socket.AF_UNIX, kind)
            listener.bind(name)
            listener.listen(4)
            client = socket.socket(socket.AF_UNIX, kind)
            client.connect(name)
            self.pairs.append((listener, client, listener.accept()[0]))
        self.datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.datagram.bind(f"/tmp/zoo{kind}.dgram")

    def check(self):
        for listener, client, server in self.pairs:
            client.send(b"hello")
            assert server.recv(9) == b"hello"
            with socket.socket(socket.AF_UNIX, listener.type) as later:
                later.connect(listener.getsockname())
                with listener.accept()[0] as accepted:
                    later.send(b"new")
                    assert accepted.recv(9) == b"new"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"datagram", self.datagram.getsockname())
        assert self.datagram.recv(9) == b"datagram"


class Udp:
    """Bound and not connected; connected to each other; in an edge-triggered epoll."""

    def __init__(self, family, host):
        self.bound, self.one, self.other = (socket.socket(family, socket.SOCK_DGRAM) for _ in range(3))
        for sock in (self.bound, self.one, self.other):
            sock.bind((host, 0))
            sock.settimeout(5)
        self.one.connect(self.other.getsockname())
        self.other.connect(self.one.getsockname())
        self.epoll = select.epoll()
        self.epoll.register(self.other, select.EPOLLIN | select.EPOLLET)

    def check(self):
        self.one.send(b"datagram")
        assert self.epoll.poll(5)
        assert self.other.recv(9) == b"datagram"
        with socket.socket(self.bound.family, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"to the bound", self.bound.getsockname())
        assert self.bound.recv(99) == b"to the bound"


class Netlink:
    """Routing netlink: it asks for the interfaces."""

    def __init__(self):
        self.sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        self.sock.bind((0, 0))
        self.sock.settimeout(5)
        self.check()

    def check(self):
        self.sock.send(struct.pack("=IHHIIBxHiII", 32, 18, 0x301, 1, 0, 0, 0, 0, 0, 0))
        found, done = b"", False
        while not done:
            data = self.sock.recv(1 << 16)
            found += data
            at = 0
            while at < len(data):
                size, kind = struct.unpack_from("=IH", data, at)
                done = done or kind == 3
                at += (size + 3) & ~3
        assert b"lo\0" in found


class RawIcmp:
    """A raw socket gets the echo request that another sends."""

    def __init__(self):
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        self.sock.settimeout(5)

    def check(self):
        payload = os.urandom(8)
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sender:
            words = struct.pack("!BBHHH", 8, 0, 0, 7, 7) + payload
            total = sum(struct.unpack("!8H", words))
            total = (total & 0xFFFF) + (total >> 16)
            total = (total & 0xFFFF) + (total >> 16)
            sender.sendto(words[:2] + struct.pack("!H", ~total & 0xFFFF) + words[4:], ("127.0.0.1", 0))
        deadline = time.monotonic() + 5
        while payload not in self.sock.recv(2000):
            assert time.monotonic() < deadline


class Packet:
    """A packet socket on `lo` sees what goes over it."""

    def __init__(self):
        self.sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
        self.sock.bind(("lo", 3))
        self.sock.settimeout(5)

    def check(self):
        payload = os.urandom(8)
        self.drain()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(payload, ("127.0.0.1", 9))
        deadline = time.monotonic() + 5
        while payload not in self.sock.recv(2000):
            assert time.monotonic() < deadline

    def drain(self):
        """What the others have sent over `lo` may have filled it."""
        self.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while self.sock.recv(2000):
                pass
        self.sock.settimeout(5)


class Reset:
    """A connection that was reset before: closed, with a descriptor."""

    def __init__(self):
        self.client, server = tcp_pair()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        server.close()

    def check(self):
        try:
            assert self.client.recv(1) == b""
        except OSError as error:
            assert error.errno in {errno.ECONNRESET, errno.ENOTCONN}, error


INNER = {
    "pair": Pair,
    "pair6": lambda: Pair(socket.AF_INET6, "::1"),
    "mapped": lambda: Pair(socket.AF_INET6, "::", "127.0.0.1"),
    "own address": lambda: Pair(socket.AF_INET, own_address()),
    "full": Full,
    "half closed": HalfClosed,
    "peer gone": lambda: PeerGone(*ALL[0]),
    "peer gone6": lambda: PeerGone(*ALL[1]),
    "processes": Processes,
    "edge": EdgeTriggered,
    "listener": lambda: Listener(*ALL[0]),
    "listener6": lambda: Listener(*ALL[1]),
    "listener own": lambda: Listener(socket.AF_INET, own_address()),
    "reset": Reset,
    "unix stream": lambda: UnixStream(socket.SOCK_STREAM),
    "unix seqpacket": lambda: UnixStream(socket.SOCK_SEQPACKET),
    "unix dgram": lambda: UnixStream(socket.SOCK_DGRAM),
    "unix named": UnixNamed,
    "unix named seqpacket": lambda: UnixNamed(socket.SOCK_SEQPACKET),
    "udp": lambda: Udp(*ALL[0]),
    "udp6": lambda: Udp(*ALL[1]),
    "udp own": lambda: Udp(socket.AF_INET, own_address()),
    "netlink": Netlink,
    "raw": RawIcmp,
    "packet": Packet,
}


class Waiter(threading.Thread):
    """Waits on a connection to the outside, and keeps how that ended."""

    def __init__(self, how, sock):
        super().__init__(daemon=True)
        self.how, self.sock, self.seen = how, sock, "waiting"
        self.start()

    def run(self):
        try:
            self.seen = self.how(self.sock)
        except OSError as error:
            self.seen = errno.errorcode.get(error.errno, repr(error))


def read(sock):
    return f"read {sock.recv(100)!r}"


def polled(sock):
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return error_of(sock, dict(poll.poll())[sock.fileno()], select.POLLERR)


def epolled(flags):
    def wait(sock):
        with select.epoll() as epoll:
            epoll.register(sock, select.EPOLLIN | flags)
            return error_of(sock, dict(epoll.poll())[sock.fileno()], select.EPOLLERR)

    return wait


def error_of(sock, events, mark):
    assert events & mark, f"events {events:#x}"
    return read(sock)


def asynchronous(sock):
    async def wait():
        reader, _ = await asyncio.open_connection(sock=sock)
        return f"read {await reader.read(100)!r}"

    return asyncio.run(wait())


def connecting(sock):
    """An attempt that does not end: SYN_SENT."""
    with select.epoll() as epoll:
        epoll.register(sock, select.EPOLLOUT)
        epoll.poll()
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return errno.errorcode.get(number, "connected")


HOW = {
    "read": read,
    "poll": polled,
    "epoll": epolled(0),
    "epoll edge": epolled(select.EPOLLET | select.EPOLLRDHUP),
    "asyncio": asynchronous,
}


class Outer:
    def __init__(self, address):
        self.waiters = {}
        for name, how in HOW.items():
            sock = socket.create_connection(address)
            sock.sendall(name.encode().ljust(16))
            self.waiters[name] = Waiter(how, sock)
        self.talk = socket.create_connection(address)
        self.talk.sendall(b"talk".ljust(16))
        self.half = socket.create_connection(address)
        self.half.sendall(b"half".ljust(16))
        attempt = socket.socket()
        attempt.setblocking(False)
        attempt.connect_ex((address[0], address[1] + 1))
        self.waiters["connecting"] = Waiter(connecting, attempt)

    def look(self):
        return {name: waiter.seen for name, waiter in self.waiters.items()}

    def read_half(self):
        """All that the other end said before it shut down, then an answer."""
        read = b""
        self.half.settimeout(10)
        while part := self.half.recv(100):
            read += part
        self.half.sendall(b"answer")
        self.half.close()
        return read.decode()

    def send(self, text):
        try:
            self.talk.sendall(text.encode())
            return self.talk.recv(100).decode()
        except OSError as error:
            return errno.errorcode.get(error.errno, repr(error))


def corked():
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect(("127.0.0.1", 9))
    sock.setsockopt(socket.IPPROTO_UDP, 1, 1)
    sock.send(b"not sent")
    return [sock]


def unix_outside():
    """A stream to a listener that nobody else in the container has: its other end is in /outside, a volume."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect("/outside/listener")
    return [sock]


# What cannot be dumped, each as a list of what is to be closed again.
REFUSED = {
    "mptcp": lambda: [socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)],
    "corked": corked,
    "alg": lambda: [socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)],
    "vsock": lambda: [socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)],
    "unix outside": unix_outside,
}


class Echo:
    def __init__(self):
        self.silent = socket.create_server(("0.0.0.0", 8001), backlog=16)
        self.listener = socket.create_server(("0.0.0.0", 8002), backlog=16)
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            sock, _ = self.listener.accept()
            threading.Thread(target=self.echo, args=(sock,), daemon=True).start()

    @staticmethod
    def echo(sock):
        try:
            while data := sock.recv(1 << 16):
                sock.sendall(data)
        except OSError:
            pass
        sock.close()


def check(kinds):
    result = {}
    for name, kind in kinds.items():
        try:
            kind.check()
            result[name] = "ok"
        except Exception as error:  # noqa: BLE001  # the test sees it
            result[name] = repr(error)
    return result


def route(state, name, argument):
    if name == "inner":
        return check(state["inner"])
    if name == "outer":
        return state["outer"].look()
    if name == "half":
        return {"read": state["outer"].read_half()}
    if name == "send":
        return {"answer": state["outer"].send(argument)}
    if name == "hold":
        try:
            state["held"] = REFUSED[argument.replace("_", " ")]()
        except OSError as error:
            return {"error": repr(error)}
        return {}
    if name == "drop":
        return {"dropped": [sock.close() for sock in state.pop("held")]}
    state["count"] += name == "count"
    return {"count": state["count"], "boot": state["boot"]}


def answer(connection, state):
    request = b""
    while b"\r\n\r\n" not in request:
        part = connection.recv(4096)
        if not part:
            return
        request += part
    name, _, argument = request.split()[1].decode().strip("/").partition("/")
    data = json.dumps(route(state, name, argument)).encode()
    connection.sendall(f"HTTP/1.0 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)


def main(arguments):
    state = {"boot": os.urandom(8).hex(), "count": 0, "inner": {name: make() for name, make in INNER.items()}}
    state["echo"] = Echo()
    if arguments:
        state["outer"] = Outer((arguments[0], int(arguments[1])))
    server = socket.create_server(("0.0.0.0", 8000), backlog=16)
    while True:
        connection, _ = server.accept()
        with connection:
            answer(connection, state)


if __name__ == "__main__":
    main(sys.argv[1:])
