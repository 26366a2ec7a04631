"""Several processes: two with CUDA below a parent without, children forked after CUDA's initialisation, compile workers."""

from __future__ import annotations

import pytest

from tests.gpu.container import GpuRunc

SIZE = ("--vram-gib", "0.5")


def test_two_cuda_processes_below_a_parent_without(runc: GpuRunc) -> None:
    """Both are checkpointed and restored, with the parent that waits for them; the image names both."""
    words = ("pair", *SIZE)
    runc.start("source", *words)
    before = {port: (runc.ready("source", port)["boot"], runc.ask("source", "check", port)) for port in (8000, 8001)}
    runc.checkpoint("source", "gpu-pair:1")
    assert {port: runc.ask("source", "check", port) for port in before} == {port: check for port, (_, check) in before.items()}
    runc.remove("source")
    runc.restore("again", "gpu-pair:1", *words)
    assert {port: (runc.ask("again", "count", port)["boot"], runc.ask("again", "check", port)) for port in before} == before
    runc.remove("again")
    runc.drop("gpu-pair:1")


def test_workers_forked_after_cuda_was_initialised(runc: GpuRunc) -> None:
    """DataLoader workers have the GPU's files from their parent and no CUDA of their own; the iterator goes on where it was."""
    words = ("loader", *SIZE)
    runc.start("source", *words)
    runc.ready("source")
    check = runc.ask("source", "check")
    # Batch k holds the numbers 128 k to 128 k + 127; the server took batch 0 itself.
    sums = [128 * 128 * k + 127 * 64 for k in range(4)]
    assert runc.ask("source", "next")["sum"] == sums[1]
    runc.checkpoint("source", "gpu-loader:1")
    assert runc.ask("source", "next")["sum"] == sums[2]
    runc.remove("source")
    runc.restore("again", "gpu-loader:1", *words)
    following = [runc.ask("again", "next") for _ in range(2)]
    assert [each["sum"] for each in following] == sums[2:], f"batches {following}, expected {sums[2:]}"
    assert following[0]["workers"] >= 2
    assert runc.ask("again", "check") == check
    runc.remove("again")
    runc.drop("gpu-loader:1")


@pytest.mark.timeout(400)
def test_torch_compile_with_its_workers_alive(runc: GpuRunc) -> None:
    """The compiled model gives the same, and the compiler compiles a new shape after the restore, with its workers."""
    words = ("compiled", *SIZE)
    # Two at least, whatever the machine has.
    env = ("TORCHINDUCTOR_COMPILE_THREADS=4",)
    runc.start("source", *words, env=env)
    runc.ready("source")
    before = runc.ask("source", "compiled")
    assert before["workers"] > 0
    runc.checkpoint("source", "gpu-compiled:1")
    # Not how many workers there are: idle ones end by themselves.
    assert runc.ask("source", "compiled")["value"] == before["value"]
    runc.remove("source")
    runc.restore("again", "gpu-compiled:1", *words, env=env)
    assert runc.ask("again", "compiled")["value"] == before["value"]
    assert isinstance(runc.ask("again", "recompile")["value"], float)
    runc.remove("again")
    runc.drop("gpu-compiled:1")
