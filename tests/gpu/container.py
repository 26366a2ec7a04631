"""Containers for the GPU tests: runc by hand, on an overlay over the machine's own root, devices and driver from a CDI document.

The root's lower layer is `/` itself: Python and torch are there and nothing has to be unpacked. Other mounts of the machine do
not show through an overlay, so the driver's libraries come by CDI alone where they are a mount, as with GPU operators.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.gpu import cdi, client
from tests.integration.command import Done, eventually, run
from tests.integration.node import Node
from tests.integration.runc import Edit, Runc
from tests.integration.sandbox import Sandbox

PROGRAMS = ("workload.py", "ranks.py")
HERE = Path(__file__).parent
# For the containers' processes: what this machine wants of NCCL and torch holds inside, too.
_KEPT = ("NCCL_", "TORCH_SYMM", "NVSHMEM_")


def python() -> str:
    """The Python that has torch. One of a venv is not resolved: its link's place is what makes it that venv's."""
    return os.environ.get("SMR_TEST_PYTHON", sys.executable)


def environment() -> list[str]:
    """The environment of a container's process."""
    kept = [f"{key}={value}" for key, value in os.environ.items() if key.startswith(_KEPT)]
    return ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONDONTWRITEBYTECODE=1", "HOME=/root", *kept]


def make_root(folder: Path) -> Path:
    """An overlay over `/` at FOLDER/rootfs, with our programs in /app."""
    for part in ("upper/app", "work", "rootfs"):
        (folder / part).mkdir(parents=True)
    for program in PROGRAMS:
        shutil.copy(HERE / program, folder / "upper/app")
    layers = f"lowerdir=/,upperdir={folder / 'upper'},workdir={folder / 'work'}"
    run(["mount", "-t", "overlay", "overlay", "-o", layers, folder / "rootfs"])
    return folder / "rootfs"


@contextmanager
def network(file: Path) -> Iterator[Edit]:
    """A network namespace with `lo` up, as engines make them before the runtime is called: an edit for containers in it."""
    file.touch()
    up = "import fcntl, socket, struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh14x', b'lo', 0x41))"
    run(["unshare", f"--net={file}", sys.executable, "-c", up])

    def edit(spec: dict[str, Any]) -> None:
        for one in spec["linux"]["namespaces"]:
            if one["type"] == "network":
                one["path"] = str(file)

    try:
        yield edit
    finally:
        run(["umount", file])
        file.unlink()


class GpuRunc(Runc):
    """runc with GPUs. `devices` names some of the CDI document; () gives a container without any."""

    def __init__(self, path: Path, node: Node, box: Sandbox, document: Mapping[str, Any]) -> None:
        super().__init__(path, node, box, Path("/"))
        self.document = document

    def bundle(  # type: ignore[override]
        self,
        name: str,
        *command: str,
        devices: Sequence[str] = ("0",),
        env: Sequence[str] = (),
        annotations: Mapping[str, str] | None = None,
        edit: Edit | None = None,
    ) -> Path:
        """A bundle whose root is an overlay over the machine's."""
        folder = self.path / name
        make_root(folder)
        run([*self.bare, "spec", "--bundle", folder])
        spec = json.loads((folder / "config.json").read_text())
        spec["process"].update(args=list(command), terminal=False, env=[*environment(), *env])
        spec["process"].pop("rlimits", None)
        spec["root"]["readonly"] = False
        spec["annotations"] = dict(annotations or {})
        spec["linux"]["cgroupsPath"] = f"/{self.box.token}/{name}"
        for mount in spec["mounts"]:
            if mount["destination"] == "/dev/shm":
                mount["options"] = [*(option for option in mount["options"] if not option.startswith("size=")), "size=1g"]
        if devices:
            cdi.apply(spec, self.document, devices)
        if edit is not None:
            edit(spec)
        (folder / "config.json").write_text(json.dumps(spec))
        return folder

    def start(  # type: ignore[override]
        self,
        name: str,
        *words: str,
        program: str = "workload.py",
        devices: Sequence[str] = ("0",),
        env: Sequence[str] = (),
        annotations: Mapping[str, str] | None = None,
        edit: Edit | None = None,
        check: bool = True,
    ) -> Done:
        """Bundle, create and start of a program of ours; does not wait for it to answer."""
        command = (python(), f"/app/{program}", *words)
        folder = self.bundle(name, *command, devices=devices, env=env, annotations=annotations, edit=edit)
        done = self.create(name, folder, check=check)
        return done if done.returncode else self("start", name, check=check)

    def restore(self, name: str, image: str, *words: str, check: bool = True, **more: Any) -> Done:
        """Start of the same program with `smr.restore`, and `smr.fallback=fail` unless `annotations` say otherwise."""
        annotations = {"smr.restore": image, "smr.fallback": "fail", **more.pop("annotations", {})}
        return self.start(name, *words, annotations=annotations, check=check, **more)

    def ask(self, name: str, path: str = "count", port: int = 8000) -> dict[str, Any]:
        """A request to the program, in the container's network namespace."""
        return client.ask(self.pid(name), path, port=port)

    def ready(self, name: str, port: int = 8000) -> dict[str, Any]:
        """Wait until the program answers; what it wrote is in the error when it ends instead."""

        def probe() -> dict[str, Any]:
            if not self.running(name):
                raise RuntimeError(f"{name} ended:\n{self.logs(name)[-3000:]}")
            return self.ask(name, "count", port)

        return eventually(probe, timeout_s=200, what=f"{name} answers")

    def checkpoint(self, name: str, image: str, *words: str, check: bool = True) -> Done:
        """`smr checkpoint --json`."""
        argv = [self.node.bin / "smr", "checkpoint", name, "-n", image, "--engine", "runc", "--json", *words]
        return run(argv, env=self.env, check=check, timeout_s=200)

    @contextmanager
    def checkpointing(self, name: str, image: str, *words: str) -> Iterator[subprocess.Popen[str]]:
        """`smr checkpoint` going on beside the block; ended with it."""
        argv = [str(self.node.bin / "smr"), "checkpoint", name, "-n", image, "--engine", "runc", *words]
        pipe = subprocess.PIPE
        with subprocess.Popen(argv, env=self.env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    def inspect(self, name: str) -> dict[str, Any]:
        """`smr inspect --json`, once the restore is recorded as done."""

        def restored() -> dict[str, Any]:
            found: dict[str, Any] = json.loads(self.node.smr("inspect", name, "--json").stdout)
            return found if found["status"] == "restored" else {}

        return eventually(restored, what=f"{name} is recorded as restored")

    def drop(self, *images: str) -> None:
        """Remove images of the store; they are large."""
        self.node.smr("images", "rm", *images, check=False)
        self.node.smr("gc", check=False)
