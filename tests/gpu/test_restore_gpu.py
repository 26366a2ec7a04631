"""One CUDA process: every byte of VRAM, streams, graphs, pinned memory and the allocator's state after a restore."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.client import Watch
from tests.gpu.container import GpuRunc
from tests.integration.command import eventually

WORDS = ("server", "--vram-gib", "2")
IMAGE = "gpu-one:1"


@dataclass(frozen=True)
class Warm:
    """An image, what the process answered before it, and what `smr checkpoint --json` said."""

    image: str
    check: dict[str, Any]
    count: int
    said: dict[str, Any]


@pytest.fixture(scope="module")
def warm(runc: GpuRunc) -> Warm:
    """A checkpoint of a server with 2 GiB of VRAM; the source is gone."""
    runc.start("source", *WORDS)
    runc.ready("source")
    runc.ask("source", "churn")
    check = runc.ask("source", "check")
    count = runc.ask("source", "count")["count"]
    said = json.loads(runc.checkpoint("source", IMAGE).stdout)
    runc.remove("source")
    return Warm(IMAGE, check, count, said)


def test_every_byte_and_number_is_as_before(runc: GpuRunc, warm: Warm) -> None:
    """The digest over all VRAM, made on the GPU, equals; so do the results of graphs, streams and pinned copies."""
    runc.restore("again", warm.image, *WORDS)
    assert runc.ask("again", "check") == warm.check
    assert runc.ask("again", "count")["count"] == warm.count + 1
    assert warm.check["bytes"] > 2 << 30


def test_the_allocator_goes_on_among_its_fragments(runc: GpuRunc, warm: Warm) -> None:
    """Tensors are freed and allocated after the restore, and two restores that do the same come to the same."""
    digests = []
    for name in ("one", "two"):
        runc.restore(name, warm.image, *WORDS)
        runc.ask(name, "churn")
        digests.append(runc.ask(name, "check")["digest"])
    assert digests[0] == digests[1]


def test_ten_restores_of_one_image(runc: GpuRunc, warm: Warm) -> None:
    """The last is as the first: nothing of a restored container reaches the image."""
    answers = []
    for number in range(10):
        name = f"again{number}"
        runc.restore(name, warm.image, *WORDS)
        answers.append(runc.ask(name, "check"))
        runc.ask(name, "churn")
        runc.remove(name)
    assert answers == [warm.check] * 10


def test_two_restores_at_once_on_one_gpu(runc: GpuRunc, warm: Warm) -> None:
    """Both have their own memory: what one changes, the other does not see."""
    for name in ("one", "two"):
        runc.restore(name, warm.image, *WORDS)
    runc.ask("one", "churn")
    assert runc.ask("one", "check")["digest"] != warm.check["digest"]
    assert runc.ask("two", "check") == warm.check


def asking(warm: Warm) -> dict[str, str]:
    """Annotations for a bundle by hand, whatever its command."""
    return {"smr.restore": warm.image, "smr.command": "force", "smr.fallback": "fail"}


def test_nothing_runs_between_create_and_start(runc: GpuRunc, warm: Warm) -> None:
    """After create every thread is stopped and the GPU's memory is there; start is all that it takes to be answered."""
    folder = runc.bundle("again", "python3", annotations=asking(warm))
    runc.create("again", folder)
    pid = runc.pid("again")
    assert _thread_states(pid) == {"T"}
    runc("start", "again")
    assert runc.ask("again", "check") == warm.check


def test_a_created_container_is_deleted_without_a_trace(runc: GpuRunc, warm: Warm) -> None:
    """Deleted before it ever ran, with its GPU memory; `vram` and `leaks` look after it."""
    folder = runc.bundle("again", "python3", annotations=asking(warm))
    runc.create("again", folder)
    runc("delete", "--force", "again")
    assert runc("state", "again", check=False).returncode != 0


def test_what_the_image_says_of_its_gpu(runc: GpuRunc, warm: Warm) -> None:
    """Driver, model, memory and UUID of the GPU, and what each process had there."""
    gpu = json.loads(runc.node.smr("images", "inspect", warm.image, "--json").stdout)["config"]["gpu"]
    assert gpu["driver"].count(".") >= 1
    (one,) = gpu["gpus"]
    assert one["uuid"].startswith("GPU-")
    assert one["memory_bytes"] > 1 << 30
    (task,) = gpu["tasks"]
    assert task["vram_bytes"][one["uuid"]] > 2 << 30


def test_the_stages_of_gpu_work_are_recorded(runc: GpuRunc, warm: Warm) -> None:
    """`smr inspect` shows how long the GPU took, and `smr checkpoint --json` too."""
    runc.restore("again", warm.image, *WORDS)
    assert any("gpu" in name or "cuda" in name for name in runc.inspect("again")["stages_s"])
    assert any("gpu" in name or "cuda" in name for name in warm.said["stages_s"])


def test_a_container_that_is_left_running_goes_on(runc: GpuRunc) -> None:
    """Clients are answered again after the pause, with the same state; the pause that they saw is the one that is printed."""
    runc.start("source", *WORDS)
    runc.ready("source")
    check = runc.ask("source", "check")
    with Watch.over(runc.pid("source")) as watch:
        said = json.loads(runc.checkpoint("source", "gpu-left:1").stdout)
    assert watch.errors == []
    counts = [answer["count"] for answer in watch.answers]
    assert counts == list(range(counts[0], counts[0] + len(counts)))
    # What is printed begins before the first client waits: it may not be less than half of what they saw, nor much more.
    assert watch.longest_gap_s / 2 < said["pause_s"] < watch.longest_gap_s * 2
    assert runc.ask("source", "check") == check
    runc.ask("source", "churn")
    runc.drop("gpu-left:1")


def test_checkpoints_of_a_restored_container(runc: GpuRunc, warm: Warm) -> None:
    """A restored container is checkpointed and restored again, twice over, with what it did meanwhile."""
    image = warm.image
    for generation in ("second", "third"):
        runc.restore(generation, image, *WORDS)
        runc.ask(generation, "churn")
        check, count = runc.ask(generation, "check"), runc.ask(generation, "count")["count"]
        image = f"gpu-{generation}:1"
        runc.checkpoint(generation, image)
        runc.remove(generation)
    runc.restore("last", image, *WORDS)
    assert runc.ask("last", "check") == check
    assert runc.ask("last", "count")["count"] == count + 1
    runc.remove("last")
    runc.drop("gpu-second:1", "gpu-third:1")


def test_stop_ends_the_container_after_its_checkpoint(runc: GpuRunc) -> None:
    """`--stop`: nothing of it runs on, its GPU memory is free, and the image restores."""
    runc.start("source", *WORDS)
    runc.ready("source")
    check = runc.ask("source", "check")
    runc.checkpoint("source", "gpu-stop:1", "--stop")
    eventually(lambda: runc("state", "source", check=False).returncode != 0 or not runc.running("source"), what="it has ended")
    runc.remove("source")
    runc.restore("again", "gpu-stop:1", *WORDS)
    assert runc.ask("again", "check") == check
    runc.remove("again")
    runc.drop("gpu-stop:1")


def test_lazy_pages(runc: GpuRunc, warm: Warm) -> None:
    """With `smr.pages=lazy` the process comes back through missing pages, the GPU's among them, and all is as before."""
    runc.restore("again", warm.image, *WORDS, annotations={"smr.pages": "lazy"})
    assert runc.ask("again", "check") == warm.check


def _thread_states(pid: int) -> set[str]:
    return {(task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()}
