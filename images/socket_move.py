"""What sockets of a dump need of their network, and which network they are to have. No protobuf: a restore without such sockets
reads none of this from CRIU's images. Addresses are written as in `smr.images.criu_sockets`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketFacts:
    """What sockets of a dump need of their network. `addresses` and `devices` are sorted.

    `addresses` are those other than wildcard, loopback and multicast that sockets without a peer are bound to; `devices` the
    interfaces that sockets are tied to; `peers` those outside of sockets other than TCP ones; `ipv6` whether any is of IPv6.
    """

    addresses: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    ipv6: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Old to new: addresses, names of interfaces, numbers of interfaces. What is not in it stays."""

    addresses: Mapping[str, str] = field(default_factory=dict)
    devices: Mapping[str, str] = field(default_factory=dict)
    indexes: Mapping[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(old != new for table in (self.addresses, self.devices, self.indexes) for old, new in table.items())
