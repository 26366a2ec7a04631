"""An OCI runtime driven by hand: bundles on an overlay, `create`, `start`, `exec`, `kill`, `delete`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.integration.command import Done, eventually, run
from tests.integration.node import Node
from tests.integration.sandbox import Sandbox

Edit = Callable[[dict[str, object]], None]


class Runc:
    """One runtime binary (runc or crun), bare or with smr-runtime in front. `lower` is the unpacked test image.

    `prefix` runs every command in another place, such as a mount namespace.
    """

    def __init__(self, path: Path, node: Node, box: Sandbox, lower: Path, prefix: Sequence[str] = ()) -> None:
        self.name = node.runtime.name
        self.path, self.node, self.box, self.lower = path, node, box, lower
        self.env, self.prefix = node.env, tuple(prefix)
        self.smr: tuple[str, ...] = (*prefix, str(node.bin / "smr-runtime"))
        self.bare: tuple[str, ...] = (*prefix, str(node.runtime))
        self._loggers: dict[Path, list[subprocess.Popen[bytes]]] = {}
        path.mkdir(parents=True, exist_ok=True)

    def __call__(self, *words: object, bare: bool = False, check: bool = True, timeout_s: float = 90) -> Done:
        """Any runtime command, with pipes for its output. Not for create: the container would inherit the pipes."""
        return run([*(self.bare if bare else self.smr), *words], env=self.env, check=check, timeout_s=timeout_s)

    def bundle(
        self,
        name: str,
        *command: str,
        annotations: Mapping[str, str] | None = None,
        edit: Edit | None = None,
        terminal: bool = False,
    ) -> Path:
        """A bundle with an overlay root of the test image."""
        folder = self.path / name
        for part in ("upper", "work", "rootfs"):
            (folder / part).mkdir(parents=True)
        layers = f"lowerdir={self.lower},upperdir={folder / 'upper'},workdir={folder / 'work'}"
        run(["mount", "-t", "overlay", "overlay", "-o", layers, folder / "rootfs"])
        run([*self.bare, "spec", "--bundle", folder])
        spec = json.loads((folder / "config.json").read_text())
        spec["process"].update(args=list(command), terminal=terminal, env=["PATH=/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE=1"])
        spec["process"].pop("rlimits", None)
        spec["root"]["readonly"] = False
        spec["annotations"] = dict(annotations or {})
        spec["linux"]["cgroupsPath"] = f"/{self.box.token}/{name}"
        if edit is not None:
            edit(spec)
        (folder / "config.json").write_text(json.dumps(spec))
        return folder

    def create(
        self, name: str, bundle: Path, *options: str, bare: bool = False, check: bool = True, global_options: Sequence[str] = ()
    ) -> Done:
        """`create`, the container's output in BUNDLE/output; stderr of the runtime is there too."""
        words = [*global_options, "create", "--bundle", bundle, *options, name]
        argv = [str(word) for word in (*(self.bare if bare else self.smr), *words)]
        with self.output(bundle) as output:
            done = subprocess.run(
                argv, check=False, env=self.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=90
            )
        if done.returncode != 0:
            self._end_loggers(bundle)
        text = (bundle / "output").read_text(errors="replace")
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(argv)}\nexit status {done.returncode}\n{text}")
        return subprocess.CompletedProcess(argv, done.returncode, text, text)

    @contextlib.contextmanager
    def output(self, bundle: Path) -> Iterator[int]:
        """A pipe to BUNDLE/output, as an engine's monitor gives: CRIU cannot take a file that is outside of the container."""
        read, write = os.pipe()
        with (bundle / "output").open("ab") as file:
            logger = subprocess.Popen(["cat"], env=self.env, stdin=read, stdout=file)
        self._loggers.setdefault(bundle, []).append(logger)
        os.close(read)
        try:
            yield write
        finally:
            os.close(write)

    def _end_loggers(self, bundle: Path) -> None:
        for logger in self._loggers.pop(bundle, []):
            try:
                logger.wait(5)
            except subprocess.TimeoutExpired:
                logger.kill()
                logger.wait()

    def start(
        self,
        name: str,
        *workload: str,
        options: Sequence[str] = (),
        annotations: Mapping[str, str] | None = None,
        edit: Edit | None = None,
        check: bool = True,
        bare: bool = False,
    ) -> Done:
        """Bundle, create and start of the workload."""
        folder = self.bundle(name, "python3", "/app/workload.py", *workload, annotations=annotations, edit=edit)
        done = self.create(name, folder, *options, check=check, bare=bare)
        return done if done.returncode else self("start", name, bare=bare, check=check)

    def exec(self, name: str, *words: str, check: bool = True, bare: bool = False) -> Done:
        """`exec`."""
        return self("exec", name, *words, check=check, bare=bare)

    def ask(self, name: str, path: str = "look", port: int = 8000) -> dict[str, object]:
        """A request to the workload from inside the container."""
        answer: dict[str, object] = json.loads(self.exec(name, "wget", "-q", "-O-", f"http://127.0.0.1:{port}/{path}").stdout)
        return answer

    def ready(self, name: str, port: int = 8000) -> dict[str, object]:
        """Wait until the workload answers."""
        return eventually(lambda: self.ask(name, port=port), what=f"{name} answers")

    def state(self, name: str, *, bare: bool = False) -> dict[str, object]:
        """`state`."""
        found: dict[str, object] = json.loads(self("state", name, bare=bare).stdout)
        return found

    def pid(self, name: str) -> int:
        """Host pid of the container's init."""
        return int(str(self.state(name)["pid"]))

    def running(self, name: str) -> bool:
        """Whether the runtime says that it runs."""
        return self.state(name)["status"] == "running"

    def logs(self, name: str) -> str:
        """All that the container has written."""
        return (self.path / name / "output").read_text(errors="replace")

    def kill(self, name: str, signal: str = "KILL") -> None:
        """Send a signal."""
        self("kill", name, signal)

    def remove(self, name: str) -> None:
        """Delete and unmount; no error when it is not there."""
        self("delete", "--force", name, check=False)
        folder = self.path / name
        self._end_loggers(folder)
        if folder.exists():
            run(["umount", folder / "rootfs"], check=False)
            shutil.rmtree(folder)

    def remove_all(self) -> None:
        """Remove every container and bundle."""
        for folder in list(self.path.iterdir()):
            self.remove(folder.name)

    def checkpoint(self, name: str, image: str, *words: str, check: bool = True) -> Done:
        """`smr checkpoint` of a container of this runtime."""
        argv = [*self.prefix, self.node.bin / "smr", "checkpoint", name, "-n", image, "--engine", "runc", *words]
        return run(argv, env=self.env, check=check)
