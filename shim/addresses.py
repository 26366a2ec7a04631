"""Which address of the new container takes the place of which of the checkpoint's.

Interfaces are paired first: what `smr.addresses` says, then the same name, then what is left over by number, where it is as many
on both sides. An address that the new side has anywhere is kept. Others of a pair are matched within their kind (IPv4, IPv6,
link-local): the only one of its subnet with the only one of that subnet, then by order, which only IPv4 has. What cannot be told
is left out, and is an error only when a socket is bound to it.

Old images know addresses without interfaces: then all of one side count as one interface's, and nothing has an order.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_interface
from pathlib import Path

from smr.images.socket_move import Move, SocketFacts
from smr.proto.annotations import ADDRESSES
from smr.proto.checkpoint import CheckpointConfig, Interface
from smr.proto.errors import Code, SmrError
from smr.shim import interfaces, network

_NAMELESS = ""
# The first interface of every namespace; images of others name none.
_LOOPBACK = {1: "lo"}
# How long a link-local address may be on its way: a second for duplicate address detection, and some for the carrier.
_LINK_LOCAL_S = 3.0
_BIND_HINTS = (
    (
        "already in use",
        "a process in the same network namespace has it ('ss -ltunp' names it): end that one, or use another network",
    ),
    ("Cannot assign", f"the container lacks the address: name its successor with {ADDRESSES}=OLD=NEW"),
    ("family not supported", "this kernel has no IPv6: boot without ipv6.disable=1, or have the server use IPv4"),
)
_Address = IPv4Interface | IPv6Interface
_Ip = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`move` is what files.img is to be given; `interfaces` are the new side's."""

    move: Move
    interfaces: tuple[Interface, ...] = ()

    def has(self, address: str) -> bool:
        """Whether the new side has an address; a link-local one on its own interface, where that is named."""
        plain, _, name = address.partition("%")
        return any(str(found.ip) == plain and name in {"", one.name} for one in self.interfaces for found in _addresses(one))


def fit_sockets(
    folder: Path, config: CheckpointConfig, namespace: Path | None, wanted: Mapping[str, str], *, connected_later: bool
) -> list[str]:
    """Give the sockets of CRIU's directory the addresses of `namespace` (None: there is none yet); returns warnings.

    Raises NETWORK_FAILED when a socket needs what is not there, IMAGE_CORRUPT when files.img does not parse.
    """
    from smr.images import criu_sockets

    facts = criu_sockets.facts(folder, _LOOPBACK | {one.index: one.name for one in config.interfaces})
    chosen = plan(config, _look(namespace, facts), wanted)
    check(facts, chosen, connected_later=connected_later)
    moved = criu_sockets.move(folder, chosen.move, _Connector(chosen, namespace))
    return [f"a socket was connected to {peer}, which cannot be reached from here: it has no peer now" for peer in moved[1]]


def _look(namespace: Path | None, facts: SocketFacts) -> tuple[Interface, ...]:
    """What is there; where a link-local address is needed, it may still be on its way: it comes with the interface's carrier."""
    if namespace is None:
        return ()
    deadline = time.monotonic() + _LINK_LOCAL_S
    while True:
        found = interfaces.of_namespace(namespace)
        waiting = any("%" in address for address in facts.addresses) and any(
            one.name != "lo" and not any(_kind(address) == "link" for address in _addresses(one)) for one in found
        )
        if not waiting or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


def bind_failure(log: str, folder: Path) -> SmrError | None:
    """What CRIU's log says of a socket that could not be had again, in words of its owner; None when it says nothing of that."""
    found = re.search(r"Can't (bind) inet socket \(id (\d+)\): (.+)|Can't (create|connect) inet socket[^:]*: (.+)", log)
    if found is None:
        return None
    from smr.images import criu_sockets

    reason = (found[3] or found[5]).strip()
    what = f"{criu_sockets.at_port(folder, int(found[2]))} of the checkpoint" if found[1] else "a socket of the checkpoint"
    hint = next((hint for mark, hint in _BIND_HINTS if mark in reason), "")
    return SmrError(f"{what} cannot be had in this network: {reason}", hint=hint, code=Code.NETWORK_FAILED)


class _Connector:
    """Whether a UDP socket could be connected in the new namespace."""

    def __init__(self, chosen: Plan, namespace: Path | None) -> None:
        self._plan, self._namespace = chosen, namespace

    def __call__(self, own: str, peer: str) -> bool:
        end = ip_interface(own.partition("%")[0]).ip
        there = end.is_unspecified or end.is_loopback or self._plan.has(own)
        return there and self._namespace is not None and network.in_namespace(self._namespace, lambda: _connects(peer))


def _connects(peer: str) -> bool:
    """Only the way is looked for: connecting a UDP socket sends nothing."""
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(socket.getaddrinfo(peer, 9, family, socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)[0][4])
        except OSError:
            return False
    return True


def plan(config: CheckpointConfig, new: Sequence[Interface], wanted: Mapping[str, str]) -> Plan:
    """How a checkpoint's network becomes `new`; `wanted` is the annotation, addresses and interfaces, old to new."""
    old = config.interfaces
    now = tuple(new)
    if not old:
        old, now = (Interface(name=_NAMELESS, addresses=tuple(config.addresses)),), (_all(new),)
    pairs = dict(_pairs(old, now, wanted))
    moved: dict[str, str] = {}
    for before, after in pairs.items():
        one, other = _named(old, before), _named(now, after)
        moved |= {_key(a, before): _key(b, after) for a, b in _match(one, other, _ips(old), _ips(now))}
    moved |= {a: b for a, b in wanted.items() if _is_address(a)}
    indexes = {_named(old, before).index: _named(now, after).index for before, after in pairs.items() if before}
    devices = {before: after for before, after in pairs.items() if before}
    devices |= {a: b for a, b in wanted.items() if not _is_address(a)}
    return Plan(move=Move(addresses=moved, devices=devices, indexes=indexes), interfaces=tuple(new))


def check(facts: SocketFacts, chosen: Plan, *, connected_later: bool) -> None:
    """Raise NETWORK_FAILED for the first address or interface that a socket needs and the new side has nothing for."""
    names = {one.name for one in chosen.interfaces}
    for device in facts.devices:
        new = chosen.move.devices.get(device, device)
        if new not in names:
            raise _lacks(f"a socket of the checkpoint is tied to interface {device}", device, new, names, connected_later)
    for address in facts.addresses:
        new = chosen.move.addresses.get(address, address)
        if not chosen.has(new):
            there = {str(found.ip) for one in chosen.interfaces for found in _addresses(one)}
            raise _lacks(f"a socket of the checkpoint is bound to {address}", address, new, there, connected_later)


def _lacks(what: str, old: str, new: str, there: Iterable[str], connected_later: bool) -> SmrError:
    has = ", ".join(sorted(one for one in there if one != "lo")) or "none"
    instead = f", for which {ADDRESSES} names {new}" if new != old else ""
    if connected_later:
        hint = "its engine connects this network after create: use wildcard addresses, or a namespace that is connected before"
    else:
        hint = f"name its successor, {ADDRESSES}={old.partition('%')[0]}=NEW; or have the server use 0.0.0.0 or ::"
    return SmrError(f"{what}{instead}, which this container does not have (it has {has})", hint=hint, code=Code.NETWORK_FAILED)


def _pairs(old: Sequence[Interface], new: Sequence[Interface], wanted: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    before, after = [one.name for one in old], [one.name for one in new]
    known = set(after)
    for name in list(before):
        partner = wanted.get(name, name)
        if partner in after:
            after.remove(partner)
            yield name, partner
        if name in wanted or partner in known:
            before.remove(name)
    left, right = ([name for name in names if name != "lo"] for names in (before, after))
    if len(left) == len(right):
        yield from zip(left, right, strict=True)


def _match(old: Interface, new: Interface, of_old: frozenset[_Ip], of_new: frozenset[_Ip]) -> Iterator[tuple[_Address, _Address]]:
    for kind in ("4", "6", "link"):
        # Link-local addresses mean something on their own interface only; others are kept wherever the new side has them.
        left = [a for a in _addresses(old) if _kind(a) == kind and (kind == "link" or a.ip not in of_new)]
        right = [a for a in _addresses(new) if _kind(a) == kind and (kind == "link" or a.ip not in of_old)]
        for address in list(left) if kind != "link" else ():
            alike = [[a for a in side if a.network == address.network] for side in (left, right)]
            if address.network.num_addresses > 1 and [len(side) for side in alike] == [1, 1]:
                yield address, alike[1][0]
                left.remove(address)
                right.remove(alike[1][0])
        ordered = kind == "4" and old.name != _NAMELESS
        if len(left) == len(right) and (ordered or len(left) == 1):
            yield from zip(left, right, strict=True)
        elif ordered and left and right:
            yield left[0], right[0]  # the primary ones


def _ips(all_of_them: Sequence[Interface]) -> frozenset[_Ip]:
    return frozenset(address.ip for one in all_of_them for address in _addresses(one) if not address.ip.is_link_local)


def _addresses(interface: Interface) -> list[_Address]:
    """Those that only this host has."""
    found = [ip_interface(text) for text in interface.addresses]
    return [address for address in found if not address.ip.is_loopback]


def _kind(address: _Address) -> str:
    if address.version == 4:
        return "4"
    return "link" if address.ip.is_link_local else "6"


def _key(address: _Address, name: str) -> str:
    return f"{address.ip}%{name}" if _kind(address) == "link" and name else str(address.ip)


def _named(interfaces: Sequence[Interface], name: str) -> Interface:
    return next(one for one in interfaces if one.name == name)


def _all(interfaces: Sequence[Interface]) -> Interface:
    addresses = [text for one in interfaces if one.name != "lo" for text in one.addresses]
    return Interface(name=_NAMELESS, addresses=tuple(addresses))


def _is_address(text: str) -> bool:
    return "." in text or ":" in text
