"""The whole way by annotation through real engines: containerd's ctr and podman, devices and driver from CDI."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import cdi, client
from tests.gpu.container import GpuRunc, environment, make_root, python
from tests.integration import conftest as integration
from tests.integration.command import Done, eventually, run
from tests.integration.containerd import RUNTIME, Containerd
from tests.integration.podman import Podman

WORDS = ("/app/workload.py", "server", "--vram-gib", "1")


@pytest.fixture(scope="module")
def cdi_folder(gpu: cdi.Probe, box: Any) -> Path:
    """The CDI document where engines look for it; /run is the sandbox's own."""
    assert box
    return cdi.write(Path("/run/cdi"), gpu).parent


@pytest.fixture(scope="module")
def containerd(runc: GpuRunc, engines: Path, nodes: Any, cdi_folder: Path) -> Iterator[Containerd]:
    """A newer containerd with a newer runc; no image is loaded."""
    folder = engines / "containerd-new/bin"
    if not (folder / "containerd").exists():
        pytest.skip("no containerd 2.x: run dev/provision")
    node = nodes("containerd-gpu", runc.node.runtime)
    instance = Containerd(runc.box.base / "containerd-gpu", node, runc.box, folder=folder, version="2.x")
    assert cdi_folder.is_dir()
    with instance.serving():
        integration._started.append(instance)
        yield instance
        instance.remove_all()
        integration._started.remove(instance)


@pytest.fixture(scope="module")
def podman(runc: GpuRunc, nodes: Any, cdi_folder: Path) -> Podman:
    """podman with SMR as its runtime."""
    if shutil.which("podman") is None:
        pytest.skip("podman is not installed: run dev/provision")
    assert cdi_folder.is_dir()
    instance = Podman(runc.box.base / "podman-gpu", nodes("podman-gpu", runc.node.runtime), runc.box)
    integration._started.append(instance)
    return instance


@pytest.fixture
def root(runc: GpuRunc) -> Iterator[Any]:
    """Makes roots by name: overlays over the machine's own."""
    made: list[Path] = []

    def make(name: str) -> Path:
        made.append(runc.box.base / f"root-{name}")
        return make_root(made[-1])

    yield make
    for folder in made:
        run(["umount", folder / "rootfs"], check=False)
        shutil.rmtree(folder)


def ctr_run(containerd: Containerd, name: str, root: Path, **annotations: str) -> Done:
    """`ctr run --device nvidia.com/gpu=0`."""
    words = [word for key, value in annotations.items() for word in ("--annotation", f"smr.{key}={value}")]
    words += [word for each in environment() for word in ("--env", each)]
    output = f"file://{containerd.path}/logs/{name}.log"
    fixed = ["--runtime", RUNTIME, "--log-uri", output, "--rootfs", "--device", "nvidia.com/gpu=0", "--cwd", "/"]
    return containerd("run", "-d", *fixed, *words, root, name, python(), *WORDS)


def test_containerd(containerd: Containerd, root: Any) -> None:
    """Checkpointed while it serves, and restored by `ctr run --annotation smr.restore=...`: the same bytes, the same process."""
    ctr_run(containerd, "source", root("source"))

    def ready() -> object:
        assert containerd.running("source"), containerd.logs("source")
        return client.ask(containerd.pid("source"), "count")

    eventually(ready, timeout_s=120, what="the server answers")
    check = client.ask(containerd.pid("source"), "check")
    containerd.checkpoint("source", "gpu-ctr:1")
    assert client.ask(containerd.pid("source"), "check") == check
    containerd.remove("source")
    for name in ("one", "two"):
        ctr_run(containerd, name, root(name), restore="gpu-ctr:1", fallback="fail")
        assert containerd.running(name)
        assert client.ask(containerd.pid(name), "check") == check
        containerd.remove(name)
    containerd.node.smr("images", "rm", "gpu-ctr:1")


def podman_run(podman: Podman, name: str, root: Path, **annotations: str) -> Done:
    """`podman run --device nvidia.com/gpu=0`."""
    words = [f"--annotation=smr.{key}={value}" for key, value in annotations.items()]
    words += [f"--env={each}" for each in environment()]
    fixed = [f"--name={name}", f"--cgroup-parent={podman.parent}", "--network=none", "--device=nvidia.com/gpu=0", "--workdir=/"]
    return podman("run", "-d", *fixed, *words, "--rootfs", root, python(), *WORDS)


def test_podman(podman: Podman, root: Any) -> None:
    """The same by `podman run --device nvidia.com/gpu=0`."""
    podman_run(podman, "source", root("source"))

    def ready() -> object:
        assert podman.running("source"), podman.logs("source")
        return client.ask(podman.pid("source"), "count")

    eventually(ready, timeout_s=120, what="the server answers")
    check = client.ask(podman.pid("source"), "check")
    podman.checkpoint("source", "gpu-podman:1")
    assert client.ask(podman.pid("source"), "check") == check
    podman.remove("source")
    podman_run(podman, "again", root("again"), restore="gpu-podman:1", fallback="fail")
    assert podman.running("again")
    assert client.ask(podman.pid("again"), "check") == check
    assert os.stat(f"/proc/{podman.pid('again')}").st_uid == 0
    podman.remove("again")
    podman.node.smr("images", "rm", "gpu-podman:1")
