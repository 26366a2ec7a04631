"""A server with sockets of every kind that knows an address: the feature `net` of workload.py.

What it binds it finds in its own namespace when it starts: the first IPv4 address of the first interface, its first IPv6 address
that is not link-local, and its link-local one. Each TCP listener answers a connection with its name; UDP sockets echo.
GET /net answers {NAME: [ADDRESS, PORT]} as getsockname says now, and what else can be seen from inside.
"""

import array
import contextlib
import fcntl
import os
import selectors
import socket
import struct
import threading
import time

GROUP = "239.77.1.2"
PORTS = {
    "own4": 9001,
    "own6": 9002,
    "link": 9003,
    "mapped": 9004,
    "dual": 9005,
    "lo4": 9006,
    "lo6": 9007,
    "udp4": 9008,
    "udp6": 9009,
    "device": 9010,
    "group": 9011,
    "peer": 9012,
    "second": 9013,
}


def ipv4(name):
    """Addresses of an interface, in the kernel's order."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        buffer = array.array("B", bytes(4096))
        length = fcntl.ioctl(control, 0x8912, struct.pack("iP", 4096, buffer.buffer_info()[0]))
        data = buffer.tobytes()[: struct.unpack("iP", length)[0]]
    rows = [data[at : at + 40] for at in range(0, len(data), 40)]
    return [socket.inet_ntoa(row[20:24]) for row in rows if row[:16].split(b"\0")[0].split(b":")[0] == name.encode()]


def ipv6(name, link):
    with contextlib.suppress(OSError), open("/proc/net/if_inet6") as table:
        rows = [line.split() for line in table]
        return [
            socket.inet_ntop(socket.AF_INET6, bytes.fromhex(row[0]))
            for row in rows
            if row[5] == name and row[0].startswith("fe8") == link
        ]
    return []


class Net:
    def __init__(self):
        names = [name for _, name in socket.if_nameindex() if name != "lo"]
        self.name = names[0] if names else ""
        self.sockets = {}
        self.heard = []
        self.open("lo4", socket.AF_INET, ("127.0.0.1",))
        self.open("dual", socket.AF_INET6, ("::",))
        with contextlib.suppress(OSError):
            self.open("lo6", socket.AF_INET6, ("::1",))
        self.loopback()
        four = ipv4(self.name) if self.name else []
        if four:
            self.open("own4", socket.AF_INET, (four[0],))
            self.open("mapped", socket.AF_INET6, ("::ffff:" + four[0],))
            self.open("udp4", socket.AF_INET, (four[0],), kind=socket.SOCK_DGRAM)
            self.open("device", socket.AF_INET, ("0.0.0.0",), device=self.name)
            self.connected(four[0])
            self.member(four[0])
        if len(four) > 1:
            self.open("second", socket.AF_INET, (four[1],))
        for address in ipv6(self.name, False)[:1]:
            self.open("own6", socket.AF_INET6, (address,))
            self.open("udp6", socket.AF_INET6, (address,), kind=socket.SOCK_DGRAM)
        for address in ipv6(self.name, True)[:1]:
            self.open("link", socket.AF_INET6, (address, 0, socket.if_nametoindex(self.name)))
        threading.Thread(target=self.serve, daemon=True).start()

    def open(self, label, family, address, kind=socket.SOCK_STREAM, device=""):
        opened = socket.socket(family, kind)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if device:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        self.bind(opened, (address[0], PORTS[label], *address[1:]))
        if kind == socket.SOCK_STREAM:
            opened.listen(8)
        self.sockets[label] = opened

    def bind(self, opened, address):
        """An IPv6 address cannot be used before it is known that nobody else has it: a second."""
        deadline = time.monotonic() + 5
        while True:
            try:
                return opened.bind(address)
            except OSError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    def loopback(self):
        """Two connected UDP sockets over lo, which must be up when they are made again."""
        there, here = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        there.bind(("127.0.0.1", 0))
        here.connect(there.getsockname())
        there.connect(here.getsockname())
        self.pair = there, here

    def connected(self, address):
        """A UDP socket that is connected to the host's side of the network, as a resolver's is."""
        peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        peer.connect((address.rpartition(".")[0] + ".1", PORTS["peer"]))
        self.sockets["peer"] = peer

    def member(self, address):
        group = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        group.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        group.bind((GROUP, PORTS["group"]))
        group.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(GROUP) + socket.inet_aton(address))
        self.sockets["group"] = group

    def serve(self):
        waiting = selectors.DefaultSelector()
        for label, opened in self.sockets.items():
            waiting.register(opened, selectors.EVENT_READ, label)
        while True:
            for key, _ in waiting.select():
                with contextlib.suppress(OSError):
                    self.answer(key.data, key.fileobj)

    def answer(self, label, opened):
        if opened.type == socket.SOCK_STREAM:
            connection, _ = opened.accept()
            with connection:
                connection.sendall(label.encode())
            return
        data, sender = opened.recvfrom(2048)
        self.heard.append(f"{label}:{data.decode()}")
        if label != "group":
            opened.sendto(label.encode(), sender)

    def use(self):
        there, here = self.pair
        here.send(b"over lo")
        return {
            "sockets": {label: list(opened.getsockname()) for label, opened in self.sockets.items()},
            "lo": there.recv(64).decode(),
            "heard": self.heard,
            "device": self.sockets["device"].getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).split(b"\0")[0].decode()
            if "device" in self.sockets
            else "",
            "hostname": socket.gethostname(),
            "files": {
                path: open(path).read() for path in ("/etc/hosts", "/etc/resolv.conf", "/etc/hostname") if os.path.exists(path)
            },
        }
