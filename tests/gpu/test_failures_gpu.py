"""Bad input and accidents: each ends with a clear error or a cold start, and never with a process left locked."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.client import Watch
from tests.gpu.container import HERE, GpuRunc, python
from tests.integration.command import eventually

WORDS = ("server", "--vram-gib", "2")
NAME = "org.opencontainers.image.ref.name"
_HOG = """
import sys, torch
free, total = torch.cuda.mem_get_info()
kept = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def image(runc: GpuRunc) -> tuple[str, dict[str, Any]]:
    """An image, and the answer of its process."""
    runc.start("source", *WORDS)
    runc.ready("source")
    check = runc.ask("source", "check")
    runc.checkpoint("source", "gpu-fail:1")
    runc.remove("source")
    return "gpu-fail:1", check


@pytest.fixture
def serving(runc: GpuRunc) -> dict[str, Any]:
    """A container `source` that serves, and its answer."""
    runc.start("source", *WORDS)
    runc.ready("source")
    return runc.ask("source", "check")


def goes_on(runc: GpuRunc, check: dict[str, Any]) -> None:
    """It answers as before, and can be checkpointed afterwards."""
    assert eventually(lambda: runc.ask("source", "check"), timeout_s=60) == check
    runc.ask("source", "churn")
    runc.checkpoint("source", "gpu-after:1")
    runc.drop("gpu-after:1")


def altered(runc: GpuRunc, image: str, name: str, edit: Callable[[dict[str, Any]], None]) -> str:
    """`image` under another name, with an edited config; its layers are those of the first."""
    store = runc.node.store
    index = json.loads((store / "index.json").read_text())

    def blob(digest: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((store / "blobs" / digest.replace(":", "/")).read_bytes())
        return found

    def put(document: dict[str, Any], described: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
        digest = hashlib.sha256(data).hexdigest()
        (store / "blobs/sha256" / digest).write_bytes(data)
        return {**described, "digest": f"sha256:{digest}", "size": len(data)}

    (entry,) = (entry for entry in index["manifests"] if entry["annotations"].get(NAME) == image)
    manifest = blob(entry["digest"])
    config = blob(manifest["config"]["digest"])
    edit(config)
    manifest["config"] = put(config, manifest["config"])
    index["manifests"].append({**put(manifest, entry), "annotations": {**entry["annotations"], NAME: name}})
    (store / "index.json").write_text(json.dumps(index))
    return name


@contextmanager
def hog(leave_bytes: int) -> Iterator[None]:
    """Another process that holds all of the GPU's memory but `leave_bytes`."""
    pipe = subprocess.PIPE
    with subprocess.Popen([python(), "-c", _HOG, str(leave_bytes)], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield
        finally:
            process.communicate("")


@contextmanager
def watching(pid: int, state: int, target: str) -> Iterator[subprocess.Popen[str]]:
    """watch.py beside the block."""
    argv = [sys.executable, str(HERE / "watch.py"), str(pid), str(state), target]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "watching\n"
        try:
            yield process
        finally:
            process.kill()


def error_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The error that `smr ... --json` printed."""
    assert done.returncode != 0
    found: dict[str, Any] = json.loads(done.stdout)["error"]
    return found


def test_no_gpu_in_the_new_container(runc: GpuRunc, image: tuple[str, Any]) -> None:
    """Refused before a process exists, with what is missing."""
    done = runc.restore("again", image[0], *WORDS, devices=(), check=False)
    assert done.returncode != 0
    assert "GPU" in done.stderr
    assert runc("state", "again", check=False).returncode != 0


def test_no_gpu_and_a_cold_start(runc: GpuRunc, image: tuple[str, Any]) -> None:
    """With smr.fallback=cold the container really starts: its process runs, and the reason stands in the record."""
    words = ("server", "--vram-gib", "0.01", "--device", "cpu")
    annotations = {"smr.fallback": "cold", "smr.command": "force"}
    runc.restore("again", image[0], *words, devices=(), annotations=annotations)
    assert runc.ready("again")["boot"] != image[1]["boot"]
    record = runc.node.only_record("cold")
    assert str(record["reason_code"]).startswith("gpu_")


def test_another_driver_in_the_image(runc: GpuRunc, image: tuple[str, Any]) -> None:
    """An image of a driver of another branch is refused, and both versions are named."""

    def edit(config: dict[str, Any]) -> None:
        config["gpu"]["driver"] = "999.10.20"

    name = altered(runc, image[0], "gpu-driver:1", edit)
    done = runc.restore("again", name, *WORDS, check=False)
    assert done.returncode != 0
    assert "999.10" in done.stderr
    runc.drop(name)


def test_another_model_in_the_image(runc: GpuRunc, image: tuple[str, Any]) -> None:
    """An image of another model of GPU is refused by name."""

    def edit(config: dict[str, Any]) -> None:
        config["gpu"]["gpus"][0].update(name="NVIDIA Imaginary 1", uuid="GPU-00000000-0000-0000-0000-000000000000")

    name = altered(runc, image[0], "gpu-model:1", edit)
    done = runc.restore("again", name, *WORDS, check=False)
    assert done.returncode != 0
    assert "Imaginary" in done.stderr
    runc.drop(name)


def test_too_little_free_memory(runc: GpuRunc, image: tuple[str, Any]) -> None:
    """Another process holds the GPU's memory: refused with both sizes before a process exists; afterwards it works."""
    with hog(1 << 30):
        done = runc.restore("again", image[0], *WORDS, check=False)
        assert done.returncode != 0
        assert "GiB" in done.stderr
        assert runc("state", "again", check=False).returncode != 0
    runc.remove("again")
    runc.restore("again", image[0], *WORDS)
    assert runc.ask("again", "check") == image[1]


def test_too_little_free_memory_and_a_cold_start(runc: GpuRunc, image: tuple[str, Any]) -> None:
    """The cold container has the GPU, and what there is of its memory."""
    words = ("server", "--vram-gib", "0.05")
    with hog(2 << 30):
        runc.restore("again", image[0], *words, annotations={"smr.fallback": "cold", "smr.command": "force"})
        assert runc.ready("again")["boot"] != image[1]["boot"]
        assert runc.node.only_record("cold")["reason_code"] == "gpu_memory"
        runc.remove("again")


@pytest.mark.parametrize("state", [1, 2])
def test_the_process_is_killed_while_it_is_locked(runc: GpuRunc, serving: dict[str, Any], state: int) -> None:
    """Killed from outside in the middle of its checkpoint: an error, no image, nothing left."""
    pid = runc.pid("source")
    with watching(pid, state, str(pid)) as watcher:
        done = runc.checkpoint("source", "gpu-killed:1", check=False)
        assert watcher.wait(60) == 0
    assert error_of(done)["code"] in {"gpu_failed", "checkpoint_failed", "container_state", "criu_failed"}
    assert "gpu-killed" not in runc.node.smr("images", "ls").stdout
    assert serving


@pytest.mark.parametrize("state", [1, 2])
def test_the_helper_is_killed_in_the_middle_of_a_checkpoint(runc: GpuRunc, serving: dict[str, Any], state: int) -> None:
    """kill -9 of the program that makes the driver's calls: the container answers again, never locked."""
    with watching(runc.pid("source"), state, "helper") as watcher:
        done = runc.checkpoint("source", "gpu-helper:1", check=False)
        assert watcher.wait(60) == 0
    if done.returncode == 0:  # it had done its work already
        runc.drop("gpu-helper:1")
    goes_on(runc, serving)


@pytest.mark.parametrize("state", [1, 2])
def test_smr_checkpoint_is_killed(runc: GpuRunc, serving: dict[str, Any], state: int) -> None:
    """kill -9 of `smr checkpoint` itself: its guard lets the container go on."""
    with (
        Watch.over(runc.pid("source")) as watch,
        runc.checkpointing("source", "gpu-smr:1") as process,
        watching(runc.pid("source"), state, str(process.pid)) as watcher,
    ):
        assert watcher.wait(60) == 0
        process.wait(60)
        eventually(lambda: runc.ask("source", "count"), timeout_s=60, what="it answers")
    assert watch.errors == []
    runc.node.smr("gc", check=False)
    goes_on(runc, serving)


def test_a_full_disk_leaves_the_container_serving(runc: GpuRunc, serving: dict[str, Any], tmp_path: Path) -> None:
    """The dump does not fit: disk_full, and the container goes on."""
    small = tmp_path / "small"
    small.mkdir()
    from tests.integration.command import run

    run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", small])
    try:
        done = run(
            [runc.node.bin / "smr", "checkpoint", "source", "-n", "gpu-full:1", "--engine", "runc", "--json"],
            env={**runc.env, "SMR_STORE": str(small)},
            check=False,
            timeout_s=120,
        )
    finally:
        run(["umount", "-l", small])
    assert error_of(done)["code"] == "disk_full"
    goes_on(runc, serving)


def test_a_debugger_is_found_before_the_pause(runc: GpuRunc, serving: dict[str, Any]) -> None:
    """A traced process cannot be checkpointed: told with the tracer's pid, and not one request waited for a lock."""
    pid = runc.pid("source")
    code = (
        "import ctypes, sys; libc = ctypes.CDLL(None, use_errno=True); libc.ptrace.argtypes = [ctypes.c_long] * 4\n"
        f"assert libc.ptrace(0x4206, {pid}, 0, 0) == 0\nprint('traced', flush=True)\nsys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as tracer:
        assert tracer.stdout is not None
        assert tracer.stdout.readline() == "traced\n"
        try:
            error = error_of(runc.checkpoint("source", "gpu-traced:1", check=False))
            assert str(tracer.pid) in error["message"] + error["hint"]
            assert runc.ask("source", "check") == serving
        finally:
            tracer.communicate("")
    goes_on(runc, serving)
