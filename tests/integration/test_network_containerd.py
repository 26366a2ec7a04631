"""Networks under containerd: a namespace that CNI has connected, as the CRI plugin has it, and ctr's own --cni."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cni import PLUGINS, Network
from tests.integration.command import run
from tests.integration.conftest import make_warm
from tests.integration.containerd import Containerd
from tests.integration.sandbox import Sandbox
from tests.integration.test_network_hooks import told

FAIL = {"smr.fallback": "fail"}
PORT = 19300 + os.getpid() % 100


@pytest.fixture(scope="module")
def networks(box: Sandbox) -> Iterator[tuple[Network, Network]]:
    """Two networks, the second with a port that is published."""
    if not (PLUGINS / "portmap").exists():
        pytest.skip(f"no CNI plugins in {PLUGINS}: run dev/provision")
    found = (Network(box.base / "cni-one", 1), Network(box.base / "cni-two", 2, ports={PORT: 9005}))
    yield found
    for network in found:
        network.close()


@contextlib.contextmanager
def namespace(network: Network, name: str) -> Iterator[str]:
    """The path of a namespace that is connected to a network."""
    path = f"/run/netns/{name}{os.getpid()}"
    program = Path(__file__).with_name("cni.py")
    run(["ip", "netns", "add", Path(path).name])
    try:
        run([sys.executable, program, "add", network.folder, path, name])
        yield path
        run([sys.executable, program, "del", network.folder, path, name])
    finally:
        run(["ip", "netns", "del", Path(path).name])


def test_a_namespace_that_cni_has_connected(containerd_2: Containerd, networks: tuple[Network, Network]) -> None:
    """From one network to another: sockets of both families move, and the published port leads to the restored server."""
    containerd = containerd_2
    first, second = networks
    with namespace(first, "smrone") as one, namespace(second, "smrtwo") as two:
        run(["ip", "-n", Path(one).name, "link", "set", "lo", "up"])  # in the other, that is SMR's to do
        containerd.start("source", "net", options=[f"--with-ns=network:{one}"])
        warm = make_warm(containerd, "cni:1", "net", start=False)
        annotations = {"smr.restore": warm.image, **FAIL}
        containerd.start("again", "net", options=[f"--with-ns=network:{two}"], annotations=annotations)
        containerd.ready("again")
        bound = containerd.ask("again", "net")["sockets"]
        four, six = bound["own4"][0], bound["own6"][0]
        assert {four, six} <= set(second.leases())
        assert [told(four, label) for label in ("own4", "mapped", "device", "dual")] == ["own4", "mapped", "device", "dual"]
        assert [told(six, label) for label in ("own6", "dual")] == ["own6", "dual"]
        assert told(bound["link"][0], "link", scope=socket.if_nametoindex(second.bridge)) == "link"
        with socket.create_connection((f"10.215.{second.third}.1", PORT), timeout=5) as client:
            assert client.recv(16) == b"dual"
        containerd.remove("again")
        # Without any network there is nothing that the sockets could move to.
        done = containerd.start("again", "net", annotations=annotations, check=False)
        assert "its engine connects this network after create" in done.stderr


def test_a_network_that_comes_after_create(containerd_1: Containerd, networks: tuple[Network, Network]) -> None:
    """`ctr run --cni` asks for the plugins when the container is created: what listens everywhere answers there."""
    containerd = containerd_1
    containerd.start("source")
    warm = make_warm(containerd, "later:1", start=False)
    conf = json.loads((networks[0].folder / "conf.json").read_text())
    folder = Path("/etc/cni/net.d")
    with in_place_of(folder, json.dumps(conf)):
        containerd.start("again", options=["--cni"], annotations={"smr.restore": warm.image, **FAIL})
        containerd.ready("again")
        lease = next(address for address in networks[0].leases() if "." in address and address[0].isdigit())
        with socket.create_connection((lease, 8000), timeout=5) as client:
            client.sendall(b"GET /count HTTP/1.0\r\n\r\n")
            answer = b"".join(iter(lambda: client.recv(4096), b""))
        assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {"count": warm.count + 1, "boot": warm.boot}
        containerd.kill("again")
        containerd.remove("again")
    for lease in networks[0].leases():
        (networks[0].folder / "ipam" / networks[0].bridge / lease).unlink()  # ctr leaves them to `ctr task delete`


@contextlib.contextmanager
def in_place_of(folder: Path, conf: str) -> Iterator[None]:
    """Our network as the machine's, for who cannot be told another place; only the test's own mount namespace sees it."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    run(["mount", "-t", "tmpfs", "tmpfs", folder])
    programs = Path("/opt/cni/bin")
    made_programs = not programs.exists()
    programs.mkdir(parents=True, exist_ok=True)
    run(["mount", "--bind", PLUGINS, programs])
    try:
        (folder / "10-smr.conflist").write_text(conf)
        yield
    finally:
        run(["umount", programs])
        run(["umount", folder])
        for path, own in ((programs, made_programs), (folder, made)):
            if own:
                os.removedirs(path)
