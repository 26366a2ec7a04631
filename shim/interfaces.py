"""Interfaces of a network namespace with their addresses, from /proc/net and two ioctls: no netlink library is imported.

IPv4 addresses of an interface are in the kernel's order, the primary one first; IPv6 ones have none that means anything, and are
sorted. Addresses that failed duplicate address detection are left out, tentative ones are not: they will be good.
Source: netdevice(7) (SIOCGIFCONF, SIOCGIFNETMASK), linux/if_addr.h, net/ipv6/addrconf.c (if6_seq_show).
"""

from __future__ import annotations

import array
import fcntl
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from smr.proto.checkpoint import Interface
from smr.shim import network

_SIOCGIFCONF, _SIOCGIFNETMASK = 0x8912, 0x891B
_IFREQ_BYTES = 40
_DADFAILED = 0x08


def of_namespace(namespace: Path) -> tuple[Interface, ...]:
    """The interfaces of a namespace (/proc/PID/ns/net or the like), by number. Raises NETWORK_FAILED."""
    return network.in_namespace(namespace, _here)


def plain(interfaces: Sequence[Interface]) -> tuple[str, ...]:
    """Their addresses without prefixes and without loopback, IPv4 before IPv6."""
    found = [text.partition("/")[0] for one in interfaces if one.name != "lo" for text in one.addresses]
    return tuple(sorted(found, key=lambda address: ":" in address))


def _here() -> tuple[Interface, ...]:
    table = _read("/proc/thread-self/net/if_inet6")
    v4, v6 = _ipv4(), parse_if_inet6(table)
    return tuple(
        Interface(name=name, index=index, addresses=(*v4.get(name, ()), *v6.get(name, ())))
        for index, name in sorted(socket.if_nameindex())
    )


def _ipv4() -> dict[str, list[str]]:
    """ "10.88.0.5/16" by interface; an alias (eth0:1) is its interface's."""
    found: dict[str, list[str]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        for row in _ifconf(control):
            label = row[:16].split(b"\0")[0]
            address = socket.inet_ntoa(row[20:24])
            # With the address in the request, the mask is that of this one among several.
            mask = fcntl.ioctl(control, _SIOCGIFNETMASK, row)[20:24]
            prefix = bin(int.from_bytes(mask, "big")).count("1")
            found.setdefault(label.partition(b":")[0].decode(), []).append(f"{address}/{prefix}")
    return found


def _ifconf(control: socket.socket) -> list[bytes]:
    size = 64 * _IFREQ_BYTES
    while True:
        buffer = array.array("B", bytes(size))
        answer = fcntl.ioctl(control, _SIOCGIFCONF, struct.pack("iP", size, buffer.buffer_info()[0]))
        used = struct.unpack("iP", answer)[0]
        if used < size:
            data = buffer.tobytes()[:used]
            return [data[at : at + _IFREQ_BYTES] for at in range(0, used, _IFREQ_BYTES)]
        size *= 2  # more interfaces than there was room for


def parse_if_inet6(text: str) -> dict[str, list[str]]:
    """ "fd00::5/64" by interface, from the lines of /proc/net/if_inet6: address, number, prefix, scope, flags, name."""
    found: dict[str, list[str]] = {}
    for line in sorted(text.splitlines()):
        words = line.split()
        if len(words) == 6 and not int(words[4], 16) & _DADFAILED:
            address = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(words[0]))
            found.setdefault(words[5], []).append(f"{address}/{int(words[2], 16)}")
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""  # a kernel without IPv6
