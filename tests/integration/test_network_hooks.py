"""Containers whose network the runtime makes: `lo`, and hooks that connect it, as nerdctl's do, with the real CNI plugins."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cni import PLUGINS, Network
from tests.integration.command import eventually, run
from tests.integration.conftest import Machine
from tests.integration.netload import PORTS
from tests.integration.runc import Edit, Runc

FAIL = {"smr.fallback": "fail"}
SYSCTL = {"net.core.somaxconn": "1234", "net.ipv4.ip_unprivileged_port_start": "80"}


@pytest.fixture(scope="module")
def cni(machine: Machine) -> Iterator[Network]:
    """A CNI network."""
    if not (PLUGINS / "bridge").exists():
        pytest.skip(f"no CNI plugins in {PLUGINS}: run dev/provision")
    network = Network(machine.box.base / "cni")
    yield network
    network.close()


@pytest.fixture(scope="module")
def newest(machine: Machine, lower: Path) -> Runc:
    """One runtime, for what does not depend on it."""
    return Runc(machine.box.base / "net-runc", machine.node("net-runc", machine.runtime("runc-new")), machine.box, lower)


@pytest.fixture(params=["runc", "runc-new"])
def each(request: pytest.FixtureRequest, newest: Runc, machine: Machine, lower: Path) -> Iterator[Runc]:
    """An old one and a new one."""
    found = newest
    if request.param == "runc":
        found = Runc(machine.box.base / "net-old", machine.node("net-old", machine.runtime("runc")), machine.box, lower)
    yield found
    found.remove_all()


@pytest.fixture
def node(newest: Runc) -> Iterator[Runc]:
    """The same; nothing of a test stays."""
    yield newest
    newest.remove_all()


@pytest.fixture(scope="module")
def image(newest: Runc, cni: Network) -> str:
    """A server with sockets of all kinds on a CNI network."""
    return checkpointed(newest, cni)


def checkpointed(runc: Runc, cni: Network) -> str:
    """Start it, checkpoint and remove it."""
    runc.start("source", "net", edit=with_hooks(cni))
    runc.ready("source")
    runc.checkpoint("source", "net:1")
    runc.remove("source")
    return "net:1"


def with_hooks(cni: Network, **options: str) -> Edit:
    """A spec with the network's hooks, and with sysctls."""

    def edit(spec: dict[str, object]) -> None:
        spec["hooks"] = cni.hooks(**options)
        spec["linux"]["sysctl"] = SYSCTL  # type: ignore[index]

    return edit


def told(address: str, label: str, *, udp: bool = False, scope: int = 0) -> str:
    """What a socket of the workload says to a client on the host."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM) as client:
        client.settimeout(5)
        client.connect((address, PORTS[label], 0, scope) if scope else (address, PORTS[label]))
        if udp:
            client.send(b"hello")
        return client.recv(64).decode()


def test_a_network_that_hooks_connect(each: Runc, cni: Network) -> None:
    """The namespace is connected before CRIU restores sockets: each is bound to the new address, and answers there."""
    runc = each
    name = checkpointed(runc, cni)
    del_before = cni.calls().count("del again")
    runc.start("again", "net", edit=with_hooks(cni), annotations={"smr.restore": name, **FAIL})
    found = runc.ask("again", "net")
    bound = found["sockets"]
    four, six, link = bound["own4"][0], bound["own6"][0], bound["link"]
    assert {four, six} <= set(cni.leases())
    assert bound["mapped"][0] == f"::ffff:{four}"
    assert bound["udp4"][0] == bound["peer"][0] == four
    assert bound["udp6"][0] == six
    assert bound["lo4"][0] == "127.0.0.1"
    assert found["lo"] == "over lo"
    scope = socket.if_nametoindex(cni.bridge)
    assert [told(four, label) for label in ("own4", "mapped", "device", "dual")] == ["own4", "mapped", "device", "dual"]
    assert [told(six, label) for label in ("own6", "dual")] == ["own6", "dual"]
    assert told(link[0], "link", scope=scope) == "link"
    assert (told(four, "udp4", udp=True), told(six, "udp6", udp=True)) == ("udp4", "udp6")
    assert runc.exec("again", "cat", "/proc/sys/net/core/somaxconn").stdout.strip() == "1234"
    # The engine's spec is what it was, the hooks that have run are not run twice, and those of the end are run.
    spec = json.loads((runc.path / "again/config.json").read_text())
    assert [entry for entry in spec["linux"]["namespaces"] if entry["type"] == "network"] == [{"type": "network"}]
    assert set(spec["hooks"]) == {"createRuntime", "poststop"}
    assert cni.calls().count("add again") == cni.calls().count("del again") + 1
    runc.checkpoint("again", "second:1")
    runc.remove("again")
    assert cni.calls().count("del again") == del_before + 1
    assert not {four, six} & set(cni.leases())


def test_a_hook_that_fails(node: Runc, image: str, cni: Network) -> None:
    """The create fails with what the hook said, and what hooks did is taken back."""
    edit = with_hooks(cni, broken="createRuntime")
    done = node.start("again", "net", edit=edit, annotations={"smr.restore": image, **FAIL}, check=False)
    assert done.returncode != 0
    assert "createRuntime hook" in done.stdout
    assert "broken by the test" in done.stdout
    assert cni.calls()[-2:] == ["add again", "del again"]
    assert cni.leases() == []
    assert "netns" not in (node.path / "again/config.json").read_text()


def test_a_hook_of_the_containers_mounts(node: Runc, image: str, cni: Network) -> None:
    """A hook that mounts is run again by the runtime, with the container's own process."""
    calls = node.path.with_name("mount-calls")
    pid = """pid=$(sed 's/.*"pid": *\\([0-9]*\\).*/\\1/')"""
    mount = "mount --make-rprivate / && mount -t tmpfs smr-hook-test /mnt"
    script = f"{pid}; nsenter --mount=/proc/$pid/ns/mnt sh -c '{mount}' && echo $pid >>{calls}"

    def edit(spec: dict[str, object]) -> None:
        with_hooks(cni)(spec)
        mounting = {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}
        spec["hooks"]["createRuntime"].append(mounting)  # type: ignore[index]

    node.start("again", "net", edit=edit, annotations={"smr.restore": image, **FAIL})
    assert node.ask("again", "net")["sockets"]["own4"][0] in cni.leases()
    assert len(set(calls.read_text().split())) == 2
    assert "smr-hook-test" not in Path("/proc/self/mountinfo").read_text()
    assert cni.calls().count("add again") == cni.calls().count("del again") + 1


def test_a_restore_that_fails_after_hooks(node: Runc, image: str, cni: Network) -> None:
    """The cold start finds the network as it was before: the hooks are undone, and run again by the runtime."""
    annotations = {"smr.restore": image, "smr.addresses": "eth0=eth7"}
    node.start("again", "net", edit=with_hooks(cni), annotations=annotations)
    assert node.ready("again")["count"] == 0
    assert cni.calls()[-3:] == ["add again", "del again", "add again"]
    assert node.ask("again", "net")["sockets"]["own4"][0] in cni.leases()
    record = node.node.only_record("cold")
    assert record["reason_code"] == "network_failed"
    assert "tied to interface eth0, for which smr.addresses names eth7" in str(record["reason"])


def test_a_create_that_is_killed_in_a_hook(node: Runc, image: str, cni: Network) -> None:
    """kill -9 while a hook connects the network: it is disconnected when the hook has ended, and the spec is the engine's."""
    annotations = {"smr.restore": image, **FAIL}
    folder = node.bundle("again", "python3", "/app/workload.py", "net", edit=with_hooks(cni, slow="1"), annotations=annotations)
    written = (folder / "config.json").read_text()
    before = cni.calls()
    argv = [*node.smr, "create", "--bundle", str(folder), "again"]
    with node.output(folder) as output, subprocess.Popen(argv, env=node.env, stdout=output, stderr=output) as process:
        eventually(lambda: cni.calls() != before, what="the hook runs")
        process.send_signal(signal.SIGKILL)
    eventually(lambda: cni.calls()[-1] == "del again" and node.node.records() == {}, what="the guard is done")
    assert cni.leases() == []
    assert (folder / "config.json").read_text() == written


def test_a_namespace_that_is_given(node: Runc, image: str, cni: Network) -> None:
    """A checkpoint of a namespace that the runtime made goes into one that is there, and the other way about."""
    name = f"smrn{os.getpid()}"
    run(["ip", "netns", "add", name])
    try:
        path = f"/run/netns/{name}"
        run(["python3", Path(__file__).with_name("cni.py"), "add", cni.folder, path, name])

        def edit(spec: dict[str, object]) -> None:
            for entry in spec["linux"]["namespaces"]:  # type: ignore[index]
                entry.update({"path": path} if entry["type"] == "network" else {})

        node.start("again", "net", edit=edit, annotations={"smr.restore": image, **FAIL})
        address = node.ask("again", "net")["sockets"]["own4"][0]
        assert told(address, "own4") == "own4"
        node.checkpoint("again", "given:1")
        node.remove("again")
        node.start("again", "net", edit=with_hooks(cni), annotations={"smr.restore": "given:1", **FAIL})
        assert node.ask("again", "net")["sockets"]["own4"][0] not in {address, "127.0.0.1"}
        node.remove("again")
        run(["python3", Path(__file__).with_name("cni.py"), "del", cni.folder, path, name])
    finally:
        run(["ip", "netns", "del", name])


def test_nobody_connects_it(node: Runc, image: str) -> None:
    """Without hooks there is no address for sockets that had one: the error says which, and what to do."""
    done = node.start("again", "net", annotations={"smr.restore": image, **FAIL}, check=False)
    assert done.returncode != 0
    assert "which this container does not have (it has none)" in done.stdout
    assert "its engine connects this network after create" in done.stdout


def test_lo_in_a_user_namespace(node: Runc) -> None:
    """There only CRIU can make the network's namespace: `lo` is up in it before sockets of loopback are bound."""

    def edit(spec: dict[str, object]) -> None:
        linux = spec["linux"]
        linux["namespaces"].append({"type": "user"})  # type: ignore[index]
        linux["uidMappings"] = linux["gidMappings"] = [{"containerID": 0, "hostID": 200000, "size": 65536}]  # type: ignore[index]
        spec["mounts"] = [mount for mount in spec["mounts"] if mount["type"] not in {"sysfs", "cgroup"}]  # type: ignore[attr-defined]

    node.path.chmod(0o755)
    started = node.start("source", "net", edit=edit, check=False)
    if started.returncode != 0:
        pytest.skip(f"no container in a user namespace here: {started.stderr.strip()}")
    node.ready("source")
    node.checkpoint("source", "late:1")
    node.remove("source")
    node.start("again", "net", edit=edit, annotations={"smr.restore": "late:1", **FAIL})
    found = node.ask("again", "net")
    assert found["lo"] == "over lo"
    assert {"lo4", "dual"} <= set(found["sockets"])
