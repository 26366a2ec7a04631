"""Which address and interface of a new container takes the place of which of the checkpoint's."""

from __future__ import annotations

import pytest

from smr.images.socket_move import SocketFacts
from smr.proto.checkpoint import CheckpointConfig, Host, Interface, Source
from smr.proto.errors import Code, SmrError
from smr.shim import addresses
from smr.shim.addresses import Plan

LO = Interface(name="lo", index=1, addresses=("127.0.0.1/8", "::1/128"))


def eth(*found: str, name: str = "eth0", index: int = 2) -> Interface:
    """An interface."""
    return Interface(name=name, index=index, addresses=found)


def config(*interfaces: Interface, flat: tuple[str, ...] = ()) -> CheckpointConfig:
    """A checkpoint of a container with these interfaces; `flat` for one that older versions have written."""
    return CheckpointConfig(
        created="2026-01-31T12:00:00.000+00:00",
        host=Host(architecture="x86_64", kernel="6.1", criu="4.2", runtime="runc"),
        source=Source(engine="podman", container_id="c"),
        spec={},
        interfaces=interfaces,
        addresses=flat,
    )


def plan(old: CheckpointConfig, *new: Interface, wanted: dict[str, str] | None = None) -> Plan:
    """The plan for a new namespace."""
    return addresses.plan(old, new, wanted or {})


def moved(old: CheckpointConfig, *new: Interface, wanted: dict[str, str] | None = None) -> dict[str, str]:
    """Its addresses."""
    return dict(plan(old, *new, wanted=wanted).move.addresses)


def refusal(chosen: Plan, *, bound: tuple[str, ...] = (), tied: tuple[str, ...] = (), later: bool = False) -> SmrError:
    """The error of a check that must fail."""
    with pytest.raises(SmrError) as caught:
        addresses.check(SocketFacts(addresses=bound, devices=tied), chosen, connected_later=later)
    assert caught.value.code is Code.NETWORK_FAILED
    return caught.value


def test_one_address_of_each_family() -> None:
    """The new one takes the place of the old one; link-local ones by interface."""
    old = config(LO, eth("10.88.0.2/16", "fd00::2/64", "fe80::1/64"))
    assert moved(old, LO, eth("10.99.0.7/24", "fd01::7/64", "fe80::9/64", index=5)) == {
        "10.88.0.2": "10.99.0.7",
        "fd00::2": "fd01::7",
        "fe80::1%eth0": "fe80::9%eth0",
    }


def test_several_addresses_of_ipv4_by_order() -> None:
    """The kernel has an order of them, the primary one first."""
    old = config(LO, eth("10.88.0.2/16", "10.77.0.2/16"))
    assert moved(old, eth("10.99.0.7/24", "10.66.0.7/24")) == {"10.88.0.2": "10.99.0.7", "10.77.0.2": "10.66.0.7"}


def test_the_subnet_goes_before_the_order() -> None:
    """An address of the same network is the likelier successor."""
    old = config(LO, eth("10.88.0.2/16", "10.77.0.2/16"))
    assert moved(old, eth("10.77.0.9/16", "10.88.0.9/16")) == {"10.88.0.2": "10.88.0.9", "10.77.0.2": "10.77.0.9"}


def test_the_primary_address_where_there_are_fewer() -> None:
    """The others have no successor, which matters only when one is used."""
    old = config(LO, eth("10.88.0.2/16", "10.77.0.2/16"))
    new = eth("10.99.0.7/24")
    assert moved(old, new) == {"10.88.0.2": "10.99.0.7"}
    error = refusal(plan(old, new), bound=("10.77.0.2",))
    assert "bound to 10.77.0.2, which this container does not have (it has 10.99.0.7)" in error.message
    assert "smr.addresses=10.77.0.2=NEW" in error.hint


def test_several_addresses_of_ipv6_have_no_order() -> None:
    """They cannot be told apart, but by their subnet."""
    old = config(LO, eth("fd00::2/64", "fd00:1::2/64"))
    assert moved(old, eth("fd02::2/64", "fd03::2/64")) == {}
    assert moved(old, eth("fd00:1::9/64", "fd03::2/64")) == {"fd00:1::2": "fd00:1::9", "fd00::2": "fd03::2"}


def test_an_address_that_is_there_is_kept() -> None:
    """Also on another interface."""
    old = config(LO, eth("10.88.0.2/16", "fd00::2/64"))
    new = (eth("10.99.0.7/24"), eth("10.88.0.2/16", "fd00::2/64", name="eth1", index=3))
    assert moved(old, *new) == {}
    addresses.check(SocketFacts(addresses=("10.88.0.2", "fd00::2")), plan(old, *new), connected_later=False)


def test_interfaces_by_name_then_by_what_is_left() -> None:
    """The same name first; the others in order, when there are as many."""
    old = config(LO, eth("10.0.1.2/24"), eth("10.0.2.2/24", name="net1", index=3), eth("10.0.3.2/24", name="net2", index=4))
    new = (LO, eth("10.9.3.2/24", name="a"), eth("10.9.1.2/24", index=3), eth("10.9.2.2/24", name="b", index=4))
    chosen = plan(old, *new)
    assert dict(chosen.move.devices) == {"lo": "lo", "eth0": "eth0", "net1": "a", "net2": "b"}
    assert dict(chosen.move.indexes) == {1: 1, 2: 3, 3: 2, 4: 4}
    assert dict(chosen.move.addresses) == {"10.0.1.2": "10.9.1.2", "10.0.2.2": "10.9.3.2", "10.0.3.2": "10.9.2.2"}


def test_interfaces_that_cannot_be_told() -> None:
    """One of two: a socket that is tied to it cannot be restored."""
    old = config(LO, eth("10.0.1.2/24", name="a"), eth("10.0.2.2/24", name="b", index=3))
    chosen = plan(old, LO, eth("10.9.1.2/24"))
    error = refusal(chosen, tied=("b",))
    assert "tied to interface b, which this container does not have (it has eth0)" in error.message
    assert "smr.addresses=b=NEW" in error.hint


def test_the_annotation_says_it() -> None:
    """Interfaces and addresses; it goes before everything else."""
    old = config(LO, eth("10.0.1.2/24", name="a"), eth("10.0.2.2/24", "fd00::2/64", name="b", index=3))
    new = (LO, eth("10.9.1.2/24", "10.9.1.3/24", "fd09::1/64"))
    chosen = plan(old, *new, wanted={"b": "eth0", "10.0.1.2": "10.9.1.3"})
    assert dict(chosen.move.addresses) == {"10.0.2.2": "10.9.1.2", "fd00::2": "fd09::1", "10.0.1.2": "10.9.1.3"}
    assert chosen.move.devices["b"] == "eth0"


def test_the_annotation_names_what_is_not_there() -> None:
    """Address or interface: both names are in the message."""
    old = config(LO, eth("10.0.1.2/24"))
    wrong = plan(old, eth("10.9.1.2/24"), wanted={"10.0.1.2": "10.9.1.9"})
    assert "bound to 10.0.1.2, for which smr.addresses names 10.9.1.9" in refusal(wrong, bound=("10.0.1.2",)).message
    wrong = plan(old, eth("10.9.1.2/24"), wanted={"eth0": "eth9"})
    assert "tied to interface eth0, for which smr.addresses names eth9" in refusal(wrong, tied=("eth0",)).message


def test_a_link_local_address_needs_its_own_interface() -> None:
    """The same address on another one is another address."""
    old = config(LO, eth("fe80::1/64"))
    chosen = plan(old, eth("fe80::2/64"), eth("fe80::1/64", name="eth1", index=3))
    assert chosen.has(chosen.move.addresses["fe80::1%eth0"])
    assert not chosen.has("fe80::1%eth0")


def test_a_family_that_is_missing() -> None:
    """The new network has no IPv6: the address is named, with what there is."""
    old = config(LO, eth("10.88.0.2/16", "fd00::2/64"))
    error = refusal(plan(old, LO, eth("10.99.0.7/24")), bound=("10.88.0.2", "fd00::2"))
    assert "bound to fd00::2" in error.message
    assert "it has 10.99.0.7" in error.message


def test_a_network_that_comes_later() -> None:
    """The hint is another: nothing that SMR could be told would help."""
    old = config(LO, eth("10.88.0.2/16"))
    error = refusal(plan(old, LO), bound=("10.88.0.2",), later=True)
    assert "after create" in error.hint
    assert "(it has none)" in error.message


def test_images_that_know_no_interfaces() -> None:
    """One address of a family on each side, as they were written before."""
    old = config(flat=("10.88.0.2", "fd00::2"))
    assert moved(old, LO, eth("10.99.0.7/24", "fd01::7/64", "fe80::9/64")) == {"10.88.0.2": "10.99.0.7", "fd00::2": "fd01::7"}
    assert moved(old, LO, eth("10.99.0.7/24", "10.99.0.8/24")) == {}
