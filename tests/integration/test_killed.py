"""kill -9 at any moment of create, start and checkpoint: the engine can still remove the container, and nothing is left.

The moments are a sweep over the length of the operation, measured first, so every stage is hit in some of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.command import eventually
from tests.integration.conftest import Warm, make_warm
from tests.integration.podman import Podman
from tests.integration.runc import Runc
from tests.integration.sandbox import Sandbox

FAIL = {"smr.fallback": "fail"}
FEATURES = ("workers", "shm")
MOMENTS = 12


@pytest.fixture(scope="module")
def image(restoring_runc: Runc) -> Iterator[Warm]:
    """An image with changed files, so that a create has something to undo."""
    runc = restoring_runc
    runc.start("source", *FEATURES)
    runc.ready("source")
    runc.exec("source", "sh", "-c", "echo changed >/etc/marker; echo new >/data/new; rm /etc/group")
    yield make_warm(runc, "killed:1", *FEATURES, start=False)


def killed_after(argv: list[str], env: dict[str, str], delay_s: float, stdio: int) -> int:
    """Run, kill -9 after `delay_s`; the exit status."""
    with subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=stdio, stderr=stdio) as process:
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        return process.wait()


def test_create_is_killed(restoring_runc: Runc, image: Warm, box: Sandbox) -> None:
    """Killed at any stage of create: delete works, the root is as it was, nothing is left; a new create works."""
    runc = restoring_runc
    before = box.snapshot()
    length_s = _length_of_create(runc, image)
    statuses = set()
    for moment in range(MOMENTS):
        folder = runc.bundle("again", "python3", "/app/workload.py", *FEATURES, annotations={"smr.restore": image.image, **FAIL})
        argv = [*runc.smr, "create", "--bundle", str(folder), "again"]
        with runc.output(folder) as output:
            statuses.add(killed_after(argv, runc.env, length_s * (moment + 0.5) / MOMENTS, output))
        eventually(lambda: not _undoing(runc), what="the guard is done")
        if runc("state", "again", check=False).returncode != 0:
            assert _changed(folder / "rootfs", runc.lower) == [], f"moment {moment}"
        runc("delete", "--force", "again", check=False)
        runc.remove("again")
        eventually(lambda: not box.snapshot().left_since(before), timeout_s=10, what=f"clean after moment {moment}")
    assert -signal.SIGKILL in statuses, "no moment was within create"
    runc.start("again", *FEATURES, annotations={"smr.restore": image.image, **FAIL})
    assert runc.ask("again", "count") == {"count": image.count + 1, "boot": image.boot}


def _changed(root: Path, lower: Path) -> list[str]:
    """Files of the root that are not as in the image; only where the checkpoint had changed some."""
    seen = []
    for name in ("etc", "data"):
        there = {path.relative_to(lower) for path in (lower / name).rglob("*")}
        here = {path.relative_to(root) for path in (root / name).rglob("*")}
        seen += [f"{path}" for path in there ^ here]
        same = (path for path in there & here if (root / path).is_file())
        seen += [f"{path}" for path in same if (root / path).read_bytes() != (lower / path).read_bytes()]
    return sorted(seen)


def _length_of_create(runc: Runc, image: Warm) -> float:
    folder = runc.bundle("again", "python3", "/app/workload.py", *FEATURES, annotations={"smr.restore": image.image, **FAIL})
    start = time.monotonic()
    runc.create("again", folder)
    length_s = time.monotonic() - start
    runc.remove("again")
    return length_s


def _undoing(runc: Runc) -> bool:
    """Whether a process of this node's SMR is still at work."""
    return any(
        "smr.shim" in command
        for _, command in runc.box.processes()
        if str(runc.node.path) in command or "smr.shim.runtime" in command
    )


def test_start_is_killed(restoring_runc: Runc, image: Warm, box: Sandbox) -> None:
    """Killed within start: the container runs or can be started or deleted, and nothing is left."""
    runc = restoring_runc
    before = box.snapshot()
    for moment in range(6):
        folder = runc.bundle("again", "python3", "/app/workload.py", *FEATURES, annotations={"smr.restore": image.image, **FAIL})
        runc.create("again", folder)
        killed_after([*runc.smr, "start", "again"], runc.env, 0.02 * (moment + 1), subprocess.DEVNULL)
        runc("delete", "--force", "again")
        runc.remove("again")
        eventually(lambda: not box.snapshot().left_since(before), timeout_s=10, what=f"clean after moment {moment}")


def test_a_checkpoint_is_killed(podman: Podman, box: Sandbox) -> None:
    """Killed at any stage of a checkpoint: the container serves on, no image is half there, gc finds nothing to keep."""
    podman.start("source", *FEATURES)
    boot = podman.ready("source")["boot"]
    start = time.monotonic()
    podman.checkpoint("source", "whole:1")
    length_s = time.monotonic() - start
    argv = [str(podman.node.bin / "smr"), "checkpoint", "source", "-n", "part:1", "--engine", "podman"]
    for moment in range(MOMENTS):
        killed_after(argv, podman.env, length_s * (moment + 0.5) / MOMENTS, subprocess.DEVNULL)
        answer = eventually(lambda: podman.ask("source", "count"), timeout_s=15, what=f"it serves after moment {moment}")
        assert answer == {"count": moment + 1, "boot": boot}
        if podman.node.smr("images", "verify", "part:1", check=False).returncode == 0:
            podman.node.smr("images", "rm", "part:1")
    podman.node.smr("gc")
    assert list((podman.node.store / "ingest").glob("*")) == []
    podman.node.smr("images", "verify", "whole:1")
    podman.node.smr("images", "rm", "whole:1")


def test_the_engine_is_not_told_a_lie(podman: Podman, podman_warm: Warm) -> None:
    """smr-runtime is killed within a podman run: podman reports a failure, can remove the container, and start another."""
    argv = ["podman", "run", "-d", "--name=again", f"--cgroup-parent={podman.parent}", *podman.network]
    argv += [f"--annotation=smr.restore={podman_warm.image}", "--annotation=smr.fallback=fail", "localhost/smr-test:1"]
    argv += ["python3", "/app/workload.py", *podman_warm.features]
    with subprocess.Popen(argv, env=podman.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        pid = eventually(lambda: _runtime_pid(podman), timeout_s=10, what="smr-runtime runs")
        os.kill(pid, signal.SIGKILL)
        assert process.wait(60) != 0
    podman.remove("again")
    podman.start("again", *podman_warm.features, annotations={"smr.restore": podman_warm.image, **FAIL})
    assert podman.ask("again", "count") == {"count": podman_warm.count + 1, "boot": podman_warm.boot}


def _runtime_pid(podman: Podman) -> int:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if b"smr.shim.runtime" in words and b"create" in words and str(podman.node.run_dir).encode() in environment:
                return int(entry.name)
    return 0
