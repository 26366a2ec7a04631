"""podman with storage, state, configuration and network of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.integration import testimage
from tests.integration.command import Done, eventually, run
from tests.integration.node import Node
from tests.integration.sandbox import Sandbox

_CONF = """
[containers]
log_driver = "k8s-file"
default_ulimits = ["nofile=20000:20000", "nproc=20000:20000"]
[engine]
runtime = "smr"
runtime_supports_json = ["smr", "runc", "crun"]
cgroup_manager = "cgroupfs"
events_logger = "file"
image_copy_tmp_dir = "{base}/copy"
# conmon starts "podman container cleanup", which must find the same configuration.
conmon_env_vars = ["PATH={path}", "CONTAINERS_CONF={base}/containers.conf", "CONTAINERS_STORAGE_CONF={base}/storage.conf"]
volume_path = "{base}/volumes"
tmp_dir = "{base}/tmp"
[engine.runtimes]
smr = ["{node.bin}/smr-runtime"]
runc = ["{node.runtime}"]
[network]
network_config_dir = "{base}/networks"
default_network = "smrt"
"""
_STORAGE = """
[storage]
driver = "{driver}"
graphroot = "{base}/storage"
runroot = "{base}/runroot"
[storage.options.overlay]
{options}
"""


class Podman:
    """The stock podman. Containers are named by the test; `run` starts one detached and waits until it answers."""

    name = "podman"

    def __init__(self, path: Path, node: Node, box: Sandbox, *, driver: str = "overlay", options: str = "") -> None:
        """`driver` of the storage, `options` lines of storage.conf for the overlay driver."""
        self.path, self.node, self.parent = path, node, f"/{box.token}"
        for folder in ("tmp", "copy", "networks"):
            (path / folder).mkdir(parents=True)
        (path / "containers.conf").write_text(_CONF.format(base=path, node=node, path=node.env["PATH"]))
        (path / "storage.conf").write_text(_STORAGE.format(base=path, driver=driver, options=options))
        self._write_network()
        self.env = {
            **node.env,
            "CONTAINERS_CONF": str(path / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(path / "storage.conf"),
        }
        self.network: tuple[str, ...] = ()

    def _write_network(self) -> None:
        third = os.getpid() % 250
        document = {
            "name": "smrt",
            "id": "5" * 64,
            "driver": "bridge",
            "network_interface": f"smrt{os.getpid() % 100000}",
            "created": "2024-01-01T00:00:00Z",
            "subnets": [{"subnet": f"10.213.{third}.0/24", "gateway": f"10.213.{third}.1"}],
            "ipv6_enabled": False,
            "internal": False,
            "dns_enabled": False,
            "ipam_options": {"driver": "host-local"},
        }
        (self.path / "networks/smrt.json").write_text(json.dumps(document))

    def __call__(self, *words: object, check: bool = True, input: str | None = None, timeout_s: float = 90) -> Done:
        """Any podman command."""
        return run(["podman", *words], env=self.env, check=check, input=input, timeout_s=timeout_s)

    def with_criu(self, *words: object, check: bool = True) -> Done:
        """A podman command that finds our CRIU on PATH: podman itself asks it for its version before it calls the runtime."""
        path = f"{self.node.criu_folder}:{self.env['PATH']}"
        return run(["podman", *words], env={**self.env, "PATH": path}, check=check)

    def load(self, engines: Path) -> None:
        """Load the test image."""
        self("load", "-q", "-i", testimage.archive(engines))

    def start(
        self,
        name: str,
        *workload: str,
        options: Sequence[str] = (),
        annotations: Mapping[str, str] | None = None,
        check: bool = True,
    ) -> Done:
        """`podman run -d` of the workload; does not wait for it to answer."""
        words = [f"--annotation={key}={value}" for key, value in (annotations or {}).items()]
        command = ["python3", "/app/workload.py", *workload]
        network = () if any(option.startswith("--net") for option in options) else self.network
        return self(
            "run",
            "-d",
            f"--name={name}",
            f"--cgroup-parent={self.parent}",
            *network,
            *words,
            *options,
            testimage.NAME,
            *command,
            check=check,
        )

    def ask(self, name: str, path: str = "look", port: int = 8000) -> dict[str, object]:
        """A request to the workload from inside the container."""
        return json.loads(self.exec(name, "wget", "-q", "-O-", f"http://127.0.0.1:{port}/{path}").stdout)

    def ready(self, name: str, port: int = 8000) -> dict[str, object]:
        """Wait until the workload answers."""
        return eventually(lambda: self.ask(name, port=port), what=f"{name} answers")

    def exec(self, name: str, *words: str, check: bool = True, options: Sequence[str] = (), input: str | None = None) -> Done:
        """`podman exec`."""
        return self("exec", *options, name, *words, check=check, input=input)

    def inspect(self, name: str) -> dict[str, object]:
        """`podman inspect`, one container."""
        return json.loads(self("container", "inspect", name).stdout)[0]

    def field(self, name: str, template: str) -> str:
        """One field by a Go template."""
        return self("container", "inspect", "--format", template, name).stdout.strip()

    def pid(self, name: str) -> int:
        """Host pid of the container's init."""
        return int(self.field(name, "{{.State.Pid}}"))

    def address(self, name: str) -> str:
        """IP address on the bridge."""
        return self.field(name, "{{.NetworkSettings.Networks.smrt.IPAddress}}")

    def logs(self, name: str) -> str:
        """All that the container has written."""
        done = self("logs", name)
        return done.stdout + done.stderr

    def running(self, name: str) -> bool:
        """Whether the engine says that it runs."""
        return self.field(name, "{{.State.Status}}") == "running"

    def kill(self, name: str, signal: str = "KILL") -> None:
        """Send a signal through the engine."""
        self("kill", f"--signal={signal}", name)

    def wait(self, name: str) -> int:
        """Exit code of the container, once it has ended."""
        return int(self("wait", name).stdout)

    def hostname(self, name: str) -> str:
        """The hostname that the engine gave it."""
        return self.field(name, "{{.Config.Hostname}}")

    def remove(self, name: str) -> None:
        """Remove, by force; no error when it is not there."""
        self("rm", "-f", "-i", "-t", "0", name)

    def remove_all(self) -> None:
        """Remove every container."""
        self("rm", "-f", "-a", "-t", "0", check=False)

    def checkpoint(self, name: str, image: str, *words: str, check: bool = True) -> Done:
        """`smr checkpoint` of a container of this engine."""
        return self.node.smr("checkpoint", name, "-n", image, "--engine", "podman", *words, env=self.env, check=check)
