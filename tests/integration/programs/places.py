"""Where the servers run: podman on a bridge with IPv4 and IPv6, and containerd with the CNI plugins of the node.

Under containerd a network namespace is made first and the plugins `bridge` and `loopback` are called on it, as a Kubernetes node
does for a pod; the container joins it. Both give a container the addresses that the test asks for.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tests.integration.command import Done, run
from tests.integration.containerd import RUNTIME, Containerd
from tests.integration.podman import Podman
from tests.integration.programs import image

PLUGINS = Path("/usr/lib/cni")
FIRST_ID = 200000
MAP = f"0:{FIRST_ID}:65536"


class Subnets:
    """Addresses of one place by a small number; the gateway, which is the host's own end of the bridge, is 1."""

    def __init__(self, second: int) -> None:
        third = os.getpid() % 250
        self.v4, self.v6 = f"10.{second}.{third}", f"fd00:{second:x}:{third:x}:"

    def pair(self, number: int) -> tuple[str, str]:
        """The addresses of both families."""
        return f"{self.v4}.{number}", f"{self.v6}:{number}"


class Place(Protocol):
    """A running engine and its network."""

    engine: Podman | Containerd
    subnets: Subnets

    def start(
        self,
        name: str,
        command: Sequence[str],
        addresses: tuple[str, str],
        *,
        binds: Sequence[str] = (),
        environment: Sequence[str] = (),
        mapped: bool = False,
        annotations: Mapping[str, str] | None = None,
    ) -> Done:
        """Start a container detached, with both addresses; `mapped`: in a user namespace."""
        ...

    def remove(self, name: str) -> None:
        """Remove the container and its network, by force."""
        ...


class OnPodman:
    """podman's bridge (netavark)."""

    def __init__(self, engine: Podman) -> None:
        self.engine, self.subnets = engine, Subnets(215)
        document = {
            "name": "programs",
            "id": "6" * 64,
            "driver": "bridge",
            "network_interface": f"smrp{os.getpid() % 100000}",
            "created": "2024-01-01T00:00:00Z",
            "subnets": [
                {"subnet": f"{self.subnets.v4}.0/24", "gateway": self.subnets.pair(1)[0]},
                {"subnet": f"{self.subnets.v6}:/64", "gateway": self.subnets.pair(1)[1]},
            ],
            "ipv6_enabled": True,
            "internal": False,
            "dns_enabled": False,
            "ipam_options": {"driver": "host-local"},
        }
        (engine.path / "networks/programs.json").write_text(json.dumps(document))

    def start(
        self,
        name: str,
        command: Sequence[str],
        addresses: tuple[str, str],
        *,
        binds: Sequence[str] = (),
        environment: Sequence[str] = (),
        mapped: bool = False,
        annotations: Mapping[str, str] | None = None,
    ) -> Done:
        """`podman run -d`."""
        words = [f"--annotation={key}={value}" for key, value in (annotations or {}).items()]
        words += [word for bind in binds for word in ("-v", bind)]
        words += [word for entry in environment for word in ("-e", entry)]
        network = f"--network=programs:ip={addresses[0]},ip6={addresses[1]}"
        words += [f"--uidmap={MAP}", f"--gidmap={MAP}"] if mapped else []
        cgroup = f"--cgroup-parent={self.engine.parent}"
        return self.engine("run", "-d", f"--name={name}", cgroup, network, *words, image.NAME, *command)

    def remove(self, name: str) -> None:
        """`podman rm -f`."""
        self.engine.remove(name)


class OnContainerd:
    """containerd and the CNI plugins, driven as its CRI plugin drives them."""

    def __init__(self, engine: Containerd) -> None:
        self.engine, self.subnets = engine, Subnets(216 if engine.name.endswith("1.6") else 217)
        self.bridge = f"smrc{self.subnets.v4.split('.')[1]}-{os.getpid() % 100000}"
        self._ranges = [
            [{"subnet": f"{self.subnets.v4}.0/24", "gateway": self.subnets.pair(1)[0]}],
            [{"subnet": f"{self.subnets.v6}:/64", "gateway": self.subnets.pair(1)[1]}],
        ]
        self._addresses: dict[str, tuple[str, str]] = {}

    def start(
        self,
        name: str,
        command: Sequence[str],
        addresses: tuple[str, str],
        *,
        binds: Sequence[str] = (),
        environment: Sequence[str] = (),
        mapped: bool = False,
        annotations: Mapping[str, str] | None = None,
    ) -> Done:
        """A network namespace, the plugins, then `ctr run -d`."""
        self._addresses[name] = addresses
        run(["ip", "netns", "add", name])
        self._plugins(name, "ADD")
        words = [word for key, value in (annotations or {}).items() for word in ("--annotation", f"{key}={value}")]
        for bind in binds:
            source, _, rest = bind.partition(":")
            destination, _, mode = rest.partition(":")
            words += ["--mount", f"type=bind,src={source},dst={destination},options=rbind:{mode or 'rw'}"]
        words += [word for entry in environment for word in ("--env", entry)]
        words += ["--uidmap", MAP, "--gidmap", MAP] if mapped else []
        words += ["--with-ns", f"network:/run/netns/{name}", "--log-uri", f"file://{self.engine.path}/logs/{name}.log"]
        return self.engine("run", "-d", "--runtime", RUNTIME, *words, image.NAME, name, *command)

    def _plugins(self, name: str, verb: str) -> None:
        for plugin, settings, interface in (("loopback", {}, "lo"), ("bridge", self._settings(name), "eth0")):
            document = {"cniVersion": "0.4.0", "name": "programs", "type": plugin, **settings}
            environment = {
                **os.environ,
                "CNI_COMMAND": verb,
                "CNI_CONTAINERID": name,
                "CNI_NETNS": f"/run/netns/{name}",
                "CNI_IFNAME": interface,
                "CNI_PATH": str(PLUGINS),
            }
            run([PLUGINS / plugin], env=environment, input=json.dumps(document), check=verb == "ADD")

    def _settings(self, name: str) -> dict[str, object]:
        v4, v6 = self._addresses[name]
        ipam = {"type": "host-local", "ranges": self._ranges, "dataDir": f"{self.engine.path}/cni"}
        asked = {"ips": [f"{v4}/24", f"{v6}/64"]}
        return {"bridge": self.bridge, "isGateway": True, "ipam": ipam, "args": {"cni": asked}, "runtimeConfig": asked}

    def remove(self, name: str) -> None:
        """The container, the plugins' DEL, the namespace."""
        self.engine.remove(name)
        if name in self._addresses:
            self._plugins(name, "DEL")
            del self._addresses[name]
            run(["ip", "netns", "del", name])

    def remove_all(self) -> None:
        """What a failed test has left."""
        for name in list(self._addresses):
            self.remove(name)


@contextlib.contextmanager
def podman_place(engine: Podman) -> Iterator[Place]:
    """podman with the programs' image and network."""
    yield OnPodman(engine)


@contextlib.contextmanager
def containerd_place(engine: Containerd) -> Iterator[Place]:
    """containerd with the programs' image; its bridge is removed in the end."""
    place = OnContainerd(engine)
    try:
        yield place
    finally:
        place.remove_all()
        subprocess.run(["ip", "link", "del", place.bridge], check=False, capture_output=True)
