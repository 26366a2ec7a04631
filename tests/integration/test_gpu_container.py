"""Checkpoint and restore of containers with a GPU, the whole path, with a fake driver (tests/integration/gpu_node.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.command import eventually
from tests.integration.conftest import Machine
from tests.integration.gpu_node import FIRST, RUNNING, SECOND, UUIDS, Counts, GpuNode, stopped

_NOTE = "exec:sh -c 'echo {} $(cat /fake-cuda/1.state) >>/fake-cuda/hooks; cat /fake-cuda/1.counts >/fake-cuda/then'"
HOOKS = ("--quiesce", _NOTE.format("quiesce"), "--resume", _NOTE.format("resume"))


@pytest.fixture(scope="module")
def node(machine: Machine, lower: Path) -> Iterator[GpuNode]:
    """One for all tests here."""
    made = GpuNode(machine, lower)
    with made.loaded():
        yield made


@pytest.fixture(autouse=True)
def fresh(node: GpuNode) -> Iterator[None]:
    """No faults of the test before; no container afterwards."""
    node.reset()
    yield
    node.mend()
    node.runc.remove_all()


@pytest.fixture(scope="module")
def image(node: GpuNode) -> str:
    """One image for the tests that only restore: of GPU FIRST, with hooks."""
    node.reset()
    node.start("source")
    node.checkpoint("gpu:1", *HOOKS)
    node.runc.remove("source")
    return "gpu:1"


def test_a_checkpoint_leaves_it_running(node: GpuNode) -> None:
    """Quiesce, lock, checkpoint, dump, restore, unlock, resume: then it goes on, and nothing of it was lost."""
    pid = node.start()
    boot = node.counts(pid).boot
    told = json.loads(node.checkpoint("goes-on:1", *HOOKS, "--json").stdout)
    assert [name for name in told["stages_s"] if name in {"quiesce", "gpu", "dump", "gpu_back", "resume"}] == [
        "quiesce", "gpu", "dump", "gpu_back", "resume",
    ]  # fmt: skip
    assert told["warnings"] == []
    assert [call for call, _, what in node.calls() if what == "end"] == ["lock", "checkpoint", "restore", "unlock"]
    assert node.text(pid, "hooks") == "quiesce 0\nresume 0\n"
    node.serves(pid)
    counts = node.counts(pid)
    assert (counts.boot, counts.checkpoints, counts.restores, counts.unlocks) == (boot, 1, 1, 1)
    assert node.minors(pid) == [FIRST]


def test_a_restore_has_its_gpu_back_before_start(node: GpuNode, image: str) -> None:
    """After create: GPU memory and device files are back and nothing has run; start lets it run, then the resume hook."""
    node.create(image)
    pid = node.runc.pid("again")
    assert node.state(pid) == RUNNING
    assert stopped(pid)
    counts = node.counts(pid)
    assert (counts.checkpoints, counts.restores, counts.unlocks, counts.bad) == (1, 1, 1, 0)
    assert counts.ticks == counts.ticks_at_restore
    assert node.text(pid, "hooks") == "quiesce 0\n"
    node.runc("start", "again")
    node.serves(pid)
    eventually(lambda: node.text(pid, "hooks") == "quiesce 0\nresume 0\n", what="the resume hook")
    assert Counts.read(Path(f"/proc/{pid}/root/fake-cuda/then")).ticks >= counts.ticks
    assert node.minors(pid) == [FIRST]


def test_a_restore_on_another_gpu(node: GpuNode, image: str) -> None:
    """The driver gets the pairs of the map; the device node is the new spec's; the container can read what became what."""
    pid = node.restore(image, gpus=(SECOND,))
    node.serves(pid)
    assert node.open_devices(pid) == ["/dev/nvidia-uvm", f"/dev/nvidia{SECOND}", "/dev/nvidiactl"]
    assert not Path(f"/proc/{pid}/root/dev/nvidia{FIRST}").exists()
    old, new = UUIDS[FIRST], UUIDS[SECOND]
    assert node.text(pid, "1.pairs") == "".join(uuid.removeprefix("GPU-").replace("-", "") for uuid in (old, new))
    restored = json.loads(Path(f"/proc/{pid}/root/run/smr/restored.json").read_text())
    assert restored["gpus"] == {old: new}
    record = json.loads(node.node.smr("inspect", "again", "--json").stdout)
    assert record["gpus"] == {old: new}
    names = [stage["name"] for stage in record["stages"]]
    wanted = ["gpu_check", "create", "fill", "gpu", "adopt", "start"]
    assert [name for name in names if name in wanted] == wanted
