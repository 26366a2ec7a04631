"""Networks of podman: bridges with IPv6 and with several interfaces, none, another container's, a pod's; names and addresses."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from tests.integration import testimage
from tests.integration.conftest import Warm, make_warm
from tests.integration.podman import Podman
from tests.integration.test_network_hooks import told

FAIL = {"smr.fallback": "fail"}
# podman's own pause image needs a program that is not everywhere.
_INFRA = ("--name=smrpod", "--share=net", f"--infra-image={testimage.NAME}", "--infra-command=sleep 1000")
THIRD = (os.getpid() + 3) % 250


@pytest.fixture(scope="module")
def networks(bridge: Podman) -> Iterator[tuple[str, str]]:
    """Two bridges with addresses of both families."""
    names = ("first6", "second6")
    made = []
    for number, name in enumerate(names):
        subnets = [f"--subnet=10.{216 + number}.{THIRD}.0/24", "--ipv6", "--disable-dns", f"--subnet=fd5b:{THIRD}:{number}::/64"]
        done = bridge("network", "create", *subnets, name, check=False)
        if done.returncode != 0:
            pytest.skip(f"podman makes no network with IPv6 here: {done.stderr.strip()}")
        made.append(name)
    yield names
    bridge("rm", "-f", "-a", "-t", "0", check=False)
    for name in made:
        bridge("network", "rm", name, check=False)


@pytest.fixture(scope="module")
def image(bridge: Podman, networks: tuple[str, str]) -> Warm:
    """A server with sockets of all kinds, on the first of them."""
    bridge.start("source", "net", options=["--network=first6"])
    return make_warm(bridge, "bridge6:1", "net", start=False)


def again(podman: Podman, image: Warm, *options: str, check: bool = True, name: str = "again", **annotations: str) -> str:
    """A container restored from `image`; what podman says."""
    asked = {"smr.restore": image.image, **FAIL, **annotations}
    done = podman.start(name, *image.features, options=options, annotations=asked, check=check)
    return done.stdout + done.stderr


def test_a_bridge_of_both_families(bridge: Podman, image: Warm) -> None:
    """On another network: every socket is bound to an address of it and answers there; names are the new container's."""
    hostname, server = "moved-here", "192.0.2.77"
    again(bridge, image, "--network=second6", f"--hostname={hostname}", f"--dns={server}", "--add-host=friend:192.0.2.9")
    found = bridge.ask("again", "net")
    bound = found["sockets"]
    own = bridge.inspect("again")["NetworkSettings"]["Networks"]["second6"]
    four, six = own["IPAddress"], own["GlobalIPv6Address"]
    assert (bound["own4"][0], bound["own6"][0], bound["udp4"][0]) == (four, six, four)
    assert [told(four, label) for label in ("own4", "mapped", "device", "dual")] == ["own4", "mapped", "device", "dual"]
    assert [told(six, label) for label in ("own6", "dual")] == ["own6", "dual"]
    assert told(four, "udp4", udp=True) == "udp4"
    # As the restored process reads them now.
    assert found["hostname"] == hostname
    assert server in found["files"]["/etc/resolv.conf"]
    assert "192.0.2.9" in found["files"]["/etc/hosts"]
    assert hostname in found["files"]["/etc/hostname"]


def test_several_interfaces(bridge: Podman, image: Warm) -> None:
    """The interface of the same name counts, or the one that the annotation names."""
    both = ("--network=first6", "--network=second6")
    again(bridge, image, *both)
    networks = bridge.inspect("again")["NetworkSettings"]["Networks"]
    addresses = [networks[name]["IPAddress"] for name in ("first6", "second6")]
    before = bridge.ask("again", "net")
    assert before["sockets"]["own4"][0] in addresses
    bridge.remove("again")
    other = "eth1" if before["device"] == "eth0" else "eth0"
    again(bridge, image, *both, **{"smr.addresses": f"eth0={other}"})
    after = bridge.ask("again", "net")
    assert (after["device"], before["device"]) == ("eth1", "eth0")
    assert after["sockets"]["own4"][0] != before["sockets"]["own4"][0]
    assert told(after["sockets"]["own6"][0], "own6") == "own6"


def test_a_family_that_is_missing(bridge: Podman, image: Warm) -> None:
    """A network of IPv4 alone: the address that nothing takes the place of is named, and the container starts cold."""
    bridge.start("again", *image.features, annotations={"smr.restore": image.image})
    assert bridge.ready("again")["boot"] != image.boot
    record = bridge.node.only_record("cold")
    assert record["reason_code"] == "network_failed"
    assert f"bound to fd5b:{THIRD}" in str(record["reason"])
    assert "smr.addresses" in str(record["reason"])


def test_the_same_address_twice(bridge: Podman, image: Warm) -> None:
    """podman refuses the second container that asks for it, and the first is not touched."""
    address = f"10.216.{THIRD}.77"
    again(bridge, image, "--network=first6", f"--ip={address}", name="first")
    assert told(address, "own4") == "own4"
    said = again(bridge, image, "--network=first6", f"--ip={address}", check=False)
    assert address in said
    assert told(address, "own4") == "own4"


def test_no_network(bridge: Podman) -> None:
    """What talks over loopback goes on, from a network and from none."""
    bridge.start("source", "net", options=["--network=none"])
    warm = make_warm(bridge, "none:1", "net", start=False)
    again(bridge, warm, "--network=none")
    found = bridge.ask("again", "net")
    assert found["lo"] == "over lo"
    assert {"lo4", "dual"} <= set(found["sockets"])
    bridge.remove("again")
    again(bridge, warm)
    assert told(bridge.address("again"), "dual") == "dual"
    assert bridge.ask("again", "net")["lo"] == "over lo"


def test_another_containers_network(bridge: Podman, image: Warm) -> None:
    """`--network container:`: sockets move to that container's addresses; a port that is taken there is named."""
    bridge("run", "-d", "--name=other", f"--cgroup-parent={bridge.parent}", "--network=second6", testimage.NAME, "sleep", "1000")
    again(bridge, image, "--network=container:other")
    address = bridge.inspect("other")["NetworkSettings"]["Networks"]["second6"]["IPAddress"]
    assert told(address, "own4") == "own4"
    said = again(bridge, image, "--network=container:other", name="third", check=False)
    assert "cannot be had in this network: Address already in use" in said
    assert "ss -ltunp" in said
    for name in ("third", "again"):  # before the one they depend on
        bridge.remove(name)


def test_a_pod(bridge: Podman, image: Warm) -> None:
    """A pod's network is its infra container's; the ports that the pod publishes lead to the restored server."""
    port = 19100 + os.getpid() % 100
    made = bridge("pod", "create", *_INFRA, "--network=second6", "-p", f"{port}:9005", check=False)
    if made.returncode != 0:
        pytest.skip(f"podman makes no pod here: {made.stderr.strip()}")
    try:
        done = bridge.start(
            "again", "net", options=["--pod=smrpod"], annotations={"smr.restore": image.image, **FAIL}, check=False
        )
        if done.returncode != 0 and "cgroup" in done.stderr:
            pytest.skip(f"podman starts no container in a pod here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        bound = bridge.ask("again", "net")["sockets"]
        assert told(bound["own4"][0], "own4") == "own4"
        with socket.create_connection((f"10.217.{THIRD}.1", port), timeout=5) as client:
            assert client.recv(16) == b"dual"
    finally:
        bridge("pod", "rm", "-f", "-t", "0", "smrpod", check=False)
