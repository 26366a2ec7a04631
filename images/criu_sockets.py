"""Inet and packet sockets of a dump's files.img: what they know of the network they were in, and how that is made the new one's.

An address is text as `ipaddress` writes it; one that is link-local has its interface behind it, "fe80::1%eth0": it means nothing
without. Sockets of IPv6 may be bound to an IPv4 address in its IPv6 form (::ffff:10.0.0.1), which counts as the IPv4 address.

Source: criu/sk-inet.c, criu/sk-packet.c, criu/sockets.c (dump_bound_dev), versions 4.1 to 4.3: CRIU binds every socket with a
port to its address, asks for an interface by the name in `ifname`, and gives SO_BINDTODEVICE the name in `so_bound_dev`; packet
sockets are bound to a number. TCP connections are bound only where they are restored as established ones.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from smr.images.criu_files import read_messages, write_messages
from smr.images.socket_move import Move, SocketFacts
from smr.proto.criu import sockets_pb2
from smr.proto.errors import Code, SmrError

_INET, _PACKET = 4, 10  # fd_types of fdinfo.proto
_AF_INET6 = 10
_TCP, _UDP = 6, 17
_FILE = "files.img"


def facts(folder: Path, names: Mapping[int, str]) -> SocketFacts:
    """Read them from the dump in `folder`; `names` are its interfaces by number. IMAGE_CORRUPT when it does not parse."""
    if not (folder / _FILE).is_file():
        return SocketFacts()
    addresses: set[str] = set()
    devices: set[str] = set()
    peers: set[str] = set()
    ipv6 = False
    for entry in read_messages(folder / _FILE, sockets_pb2.FileEntry):
        if entry.type == _PACKET and entry.psk.ifindex:
            devices.add(names.get(entry.psk.ifindex, f"#{entry.psk.ifindex}"))
        if entry.type != _INET:
            continue
        socket = entry.isk
        ipv6 = ipv6 or socket.family == _AF_INET6
        devices |= {name for name in (socket.ifname, socket.opts.so_bound_dev) if name}
        if not socket.dst_port and socket.src_port and (address := _text(socket, socket.src_addr)):
            addresses.add(address)
        elif socket.dst_port and socket.proto != _TCP and _text(socket, socket.dst_addr):
            peers.add(_peer(socket))
    found = (tuple(sorted(names)) for names in (addresses, devices, peers))
    return SocketFacts(**dict(zip(("addresses", "devices", "peers"), found, strict=True)), ipv6=ipv6)


def move(folder: Path, to: Move, can_connect: Callable[[str, str], bool]) -> tuple[int, tuple[str, ...]]:
    """Give the sockets of a dump what `to` says; returns how many were changed, and peers that were taken from sockets.

    A UDP socket that `can_connect(own address, peer's)` says no of would end the restore, because CRIU connects it again: it is
    left without a peer, as after connect(2) to AF_UNSPEC, with its port, on all addresses.
    """
    path = folder / _FILE
    entries = list(read_messages(path, sockets_pb2.FileEntry))
    changed, parted = 0, set()
    for entry in entries:
        if entry.type == _PACKET:
            changed += _move_packet(entry.psk, to)
        elif entry.type == _INET:
            before = entry.isk.SerializeToString()
            _move_inet(entry.isk, to)
            if entry.isk.dst_port and entry.isk.proto != _TCP and not can_connect(*_ends(entry.isk)):
                parted.add(_peer(entry.isk))
                _part(entry.isk)
            changed += before != entry.isk.SerializeToString()
    if changed:
        write_messages(path, path.read_bytes()[:8], entries)
    return changed, tuple(sorted(parted))


def at_port(folder: Path, number: int) -> str:
    """What the socket with CRIU's id `number` is bound to, "10.0.0.1:80" or "[::]:80"; empty when there is none."""
    for entry in read_messages(folder / _FILE, sockets_pb2.FileEntry):
        if entry.type == _INET and entry.isk.id == number:
            kind = {_TCP: "TCP", _UDP: "UDP"}.get(entry.isk.proto, f"protocol {entry.isk.proto}")
            return f"{kind} {_with_port(_address(entry.isk.src_addr), entry.isk.src_port)}"
    return ""


def _move_inet(socket: sockets_pb2.InetSkEntry, to: Move) -> None:
    _move_address(socket, socket.src_addr, to)
    if socket.proto != _TCP:
        _move_address(socket, socket.dst_addr, to)
    if socket.ifname:
        socket.ifname = to.devices.get(socket.ifname, socket.ifname)
    if socket.opts.so_bound_dev:
        socket.opts.so_bound_dev = to.devices.get(socket.opts.so_bound_dev, socket.opts.so_bound_dev)


def _move_address(socket: sockets_pb2.InetSkEntry, words: Sequence[int], to: Move) -> None:
    new = to.addresses.get(_text(socket, words))
    if new is None:
        return
    address: IPv4Address | IPv6Address = _parse(new)
    if len(words) == 4 and isinstance(address, IPv4Address):
        address = IPv6Address(f"::ffff:{address}")
    words[:] = struct.unpack(f"={len(address.packed) // 4}I", address.packed)  # type: ignore[index]  # a repeated field


def _move_packet(socket: sockets_pb2.PacketSockEntry, to: Move) -> bool:
    before = socket.SerializeToString()
    socket.ifindex = to.indexes.get(socket.ifindex, socket.ifindex)
    for member in socket.mclist:
        member.index = to.indexes.get(member.index, member.index)
    return before != socket.SerializeToString()


def _part(socket: sockets_pb2.InetSkEntry) -> None:
    socket.dst_port = 0
    socket.dst_addr[:] = [0] * len(socket.dst_addr)
    socket.src_addr[:] = [0] * len(socket.src_addr)
    socket.ClearField("ifname")


def _ends(socket: sockets_pb2.InetSkEntry) -> tuple[str, str]:
    """Both addresses, link-local ones with their interface."""
    scope = f"%{socket.ifname}" if socket.ifname else ""
    ends = (_address(words) for words in (socket.src_addr, socket.dst_addr))
    own, peer = (f"{end}{scope if end.is_link_local and end.version == 6 else ''}" for end in ends)
    return own, peer


def _peer(socket: sockets_pb2.InetSkEntry) -> str:
    return _with_port(_address(socket.dst_addr), socket.dst_port)


def _with_port(address: IPv4Address | IPv6Address, port: int) -> str:
    return f"[{address}]:{port}" if isinstance(address, IPv6Address) else f"{address}:{port}"


def _text(socket: sockets_pb2.InetSkEntry, words: Sequence[int]) -> str:
    """The address, where it is one that only its host has; else empty."""
    address = _address(words)
    if address.is_unspecified or address.is_loopback or address.is_multicast:
        return ""
    return f"{address}%{socket.ifname}" if isinstance(address, IPv6Address) and address.is_link_local else str(address)


def _address(words: Sequence[int]) -> IPv4Address | IPv6Address:
    """An address as CRIU keeps it: 32-bit words as they lie in memory; four for IPv6, and for IPv4 in CRIU before 1.0."""
    if len(words) not in (1, 4):
        raise SmrError(f"CRIU image {_FILE}: an address of {len(words)} words", code=Code.IMAGE_CORRUPT, file=_FILE)
    packed = struct.pack(f"={len(words)}I", *words)
    if len(words) == 1:
        return IPv4Address(packed)
    address = IPv6Address(packed)
    return address.ipv4_mapped or address


def _parse(text: str) -> IPv4Address | IPv6Address:
    plain = text.partition("%")[0]
    return IPv6Address(plain) if ":" in plain else IPv4Address(plain)
