"""What SMR does inside a container's network namespace: `lo` up, and which addresses it has.

Everything runs in a thread that enters the namespace and ends: setns(CLONE_NEWNET) is per thread. `os.setns` is new in
Python 3.12, hence libc's.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from smr.proto.errors import Code, SmrError

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address

_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1
_T = TypeVar("_T")


def in_namespace(namespace: Path, action: Callable[[], _T]) -> _T:
    """Run `action` in a network namespace (/proc/PID/ns/net or a bind of one) and return its result."""
    result: list[_T] = []
    failure: list[OSError] = []

    def work() -> None:
        try:
            fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET) != 0:
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number))
            finally:
                os.close(fd)
            result.append(action())
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="smr-netns")
    thread.start()
    thread.join()
    if failure:
        raise SmrError(
            f"cannot work in network namespace {namespace}: {failure[0].strerror}", code=Code.NETWORK_FAILED
        ) from failure[0]
    return result[0]


def loopback_up(namespace: Path) -> bool:
    """Set `lo` up when it is down; True when that changed anything. CRIU leaves it down in a namespace it made."""
    return in_namespace(namespace, set_loopback_up)


def set_loopback_up() -> bool:
    """The same in the namespace of the thread that calls."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        request = struct.pack("16sh14x", b"lo", 0)
        name, flags = struct.unpack("16sh14x", fcntl.ioctl(control, _SIOCGIFFLAGS, request))
        if flags & _IFF_UP:
            return False
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", name, flags | _IFF_UP))
        return True


def addresses(pid: int | str) -> tuple[str, ...]:
    """Local unicast addresses in the network namespace of `pid`, IPv4 then IPv6, without loopback; from /proc/PID/net."""
    return (*parse_fib_trie(_text(pid, "fib_trie")), *parse_if_inet6(_text(pid, "if_inet6")))


def addresses_of_namespace(namespace: Path) -> tuple[str, ...]:
    """The same for a namespace by its path; /proc/thread-self/net shows the namespace the thread has entered."""
    return in_namespace(namespace, lambda: addresses("thread-self"))


def parse_fib_trie(text: str) -> list[str]:
    """IPv4 addresses: fib_trie lists each local one as a /32 host LOCAL leaf, once a table."""
    found: list[str] = []
    previous = ""
    for line in text.splitlines():
        if "/32 host LOCAL" in line and previous.startswith("|-- "):
            address = previous.removeprefix("|-- ")
            if not address.startswith("127.") and address not in found:
                found.append(address)
        previous = line.strip()
    return found


def parse_if_inet6(text: str) -> list[str]:
    """IPv6 addresses: one a line, in hexadecimal, the interface's name last."""
    raw = [line.split() for line in text.splitlines()]
    return [socket.inet_ntop(socket.AF_INET6, bytes.fromhex(words[0])) for words in raw if words and words[-1] != "lo"]


def address_of(text: str) -> IPv4Address | IPv6Address:
    """/proc/net prints addresses as host-order 32-bit words in hexadecimal."""
    from ipaddress import IPv4Address, IPv6Address

    raw = b"".join(struct.pack("=I", int(text[at : at + 8], 16)) for at in range(0, len(text), 8))
    if len(raw) == 4:
        return IPv4Address(raw)
    address = IPv6Address(raw)
    return address.ipv4_mapped or address


def _text(pid: int | str, name: str) -> str:
    try:
        return (Path("/proc") / str(pid) / "net" / name).read_text()
    except OSError:
        return ""
