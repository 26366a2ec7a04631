"""A containerd of our own, driven by its `ctr`. Works with 1.6 and 2.x."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.integration import testimage
from tests.integration.command import Done, eventually, run
from tests.integration.node import Node
from tests.integration.sandbox import Sandbox

RUNTIME = "io.containerd.smr.v2"
STOCK = "io.containerd.runc.v2"
_CONFIG = """version = {version}
root = "{base}/root"
state = "{base}/state"
disabled_plugins = [{disabled}]
[grpc]
address = "{base}/state/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
path = "{base}/opt"
"""
_DISABLED = (
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.blockfile",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.erofs",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.nri.v1.nri",
    "io.containerd.internal.v1.tracing",
    "io.containerd.tracing.processor.v1.otlp",
)


class Containerd:
    """The stock containerd. `start` runs a container detached with its output in a file."""

    def __init__(self, path: Path, node: Node, box: Sandbox, *, folder: Path | None, version: str) -> None:
        self.name = f"containerd-{version}"
        self.path, self.node, self.namespace = path, node, box.token
        self.state = path / "state"
        self.log = path / "containerd.log"
        (path / "logs").mkdir(parents=True)
        disabled = ", ".join(f'"{plugin}"' for plugin in _DISABLED)
        layout = 2 if version.startswith("1.") else 3
        (path / "config.toml").write_text(_CONFIG.format(version=layout, base=path, disabled=disabled))
        search = node.env["PATH"] if folder is None else f"{folder}:{node.env['PATH']}"
        self.env = {
            **node.env,
            "PATH": f"{node.bin}:{search}",
            "CONTAINERD_ADDRESS": str(self.state / "containerd.sock"),
            "CONTAINERD_NAMESPACE": self.namespace,
        }
        self.program = str(folder / "containerd") if folder else "containerd"
        self.ctr = str(folder / "ctr") if folder else "ctr"
        self._execs = itertools.count()

    @contextlib.contextmanager
    def serving(self) -> Iterator[Containerd]:
        """Run the daemon."""
        with self.log.open("wb") as log:
            argv = [self.program, "--config", str(self.path / "config.toml")]
            daemon = subprocess.Popen(argv, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            eventually(
                lambda: daemon.poll() is not None or self("version", check=False, timeout_s=10).returncode == 0,
                what="containerd serves",
            )
            if daemon.poll() is not None:
                raise OSError(f"containerd ended: {self.log.read_text()[-2000:]}")
            yield self
        finally:
            daemon.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()

    def __call__(self, *words: object, check: bool = True, input: str | None = None, timeout_s: float = 90) -> Done:
        """Any ctr command; the socket and namespace are in its environment."""
        return run([self.ctr, *words], env=self.env, check=check, input=input, timeout_s=timeout_s)

    def load(self, engines: Path) -> None:
        """Import the test image."""
        self("images", "import", testimage.archive(engines))

    def start(
        self,
        name: str,
        *workload: str,
        options: Sequence[str] = (),
        annotations: Mapping[str, str] | None = None,
        check: bool = True,
        runtime: str = RUNTIME,
    ) -> Done:
        """`ctr run -d` of the workload; does not wait for it to answer."""
        words = [word for key, value in (annotations or {}).items() for word in ("--annotation", f"{key}={value}")]
        command = ["python3", "/app/workload.py", *workload]
        output = f"file://{self.path}/logs/{name}.log"
        return self(
            "run", "-d", "--runtime", runtime, "--log-uri", output, *words, *options, testimage.NAME, name, *command, check=check
        )

    def ask(self, name: str, path: str = "look", port: int = 8000) -> dict[str, object]:
        """A request to the workload from inside the container."""
        answer: dict[str, object] = json.loads(self.exec(name, "wget", "-q", "-O-", f"http://127.0.0.1:{port}/{path}").stdout)
        return answer

    def ready(self, name: str, port: int = 8000) -> dict[str, object]:
        """Wait until the workload answers."""
        return eventually(lambda: self.ask(name, port=port), what=f"{name} answers")

    def exec(self, name: str, *words: str, check: bool = True, options: Sequence[str] = (), input: str | None = None) -> Done:
        """`ctr task exec`."""
        return self("task", "exec", "--exec-id", f"e{next(self._execs)}", *options, name, *words, check=check, input=input)

    def tasks(self) -> dict[str, tuple[int, str]]:
        """Pid and status of every task."""
        rows = [line.split() for line in self("task", "ls").stdout.splitlines()[1:]]
        return {row[0]: (int(row[1]), row[2]) for row in rows}

    def pid(self, name: str) -> int:
        """Host pid of the container's init."""
        return self.tasks()[name][0]

    def logs(self, name: str) -> str:
        """All that the container has written."""
        file = self.path / f"logs/{name}.log"
        return file.read_text() if file.exists() else ""

    def running(self, name: str) -> bool:
        """Whether the engine says that it runs."""
        return self.tasks().get(name, (0, ""))[1] == "RUNNING"

    def kill(self, name: str, signal: str = "SIGKILL") -> None:
        """Send a signal through the engine."""
        self("task", "kill", "--signal", signal if signal.startswith("SIG") else f"SIG{signal}", name)

    def wait(self, name: str) -> int:
        """Exit code of the container, once it has ended; the task is deleted by that."""
        eventually(lambda: self.tasks().get(name, (0, "STOPPED"))[1] == "STOPPED", what=f"{name} has ended")
        said = re.search(r"exit code (\d+)", self("task", "delete", name).stderr)
        return int(said[1]) if said else 0

    def hostname(self, name: str) -> str:
        """The hostname in its spec; ctr gives none."""
        return str(json.loads(self("container", "info", name).stdout)["Spec"].get("hostname", ""))

    def remove(self, name: str) -> None:
        """Remove task, container and snapshot; no error when they are not there."""
        self("task", "delete", "--force", name, check=False)
        self("container", "delete", name, check=False)
        (self.path / f"logs/{name}.log").unlink(missing_ok=True)

    def remove_all(self) -> None:
        """Remove every container."""
        for name in self("container", "ls", "-q").stdout.split():
            self.remove(name)
        for line in self("snapshot", "ls").stdout.splitlines()[1:]:
            if not line.split()[0].startswith("sha256:"):
                self("snapshot", "rm", line.split()[0], check=False)

    def checkpoint(self, name: str, image: str, *words: str, check: bool = True) -> Done:
        """`smr checkpoint` of a container of this engine."""
        return self.node.smr("checkpoint", name, "-n", image, "--engine", "containerd", *words, env=self.env, check=check)
