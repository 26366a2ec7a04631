"""A checkpoint's GPUs against the container's and the node's: each finding says what differs, and what to do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from smr.proto.checkpoint import CudaTask, Gpu, GpuState
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec, parse_spec
from smr.shim.gpu import compare
from smr.shim.gpu.inventory import Inventory, NodeGpu
from tests.fakes.nvml import DRIVER, H200_BYTES, uuid

GIB = 1 << 30


def gpu(digit: int, minor: int) -> Gpu:
    """An H200."""
    return Gpu(uuid=uuid(digit), name="NVIDIA H200", memory_bytes=H200_BYTES, minor=minor, compute_capability="9.0")


STATE = GpuState(
    driver=DRIVER,
    gpus=(gpu(1, 0),),
    tasks=(CudaTask(pid=7, vram_bytes={uuid(1): 8 * GIB}), CudaTask(pid=8, vram_bytes={})),
)
NODE = Inventory(
    driver=DRIVER,
    gpus=(
        NodeGpu(gpu=gpu(1, 0), index=0, free_bytes=140 * GIB),
        NodeGpu(gpu=gpu(2, 1), index=1, free_bytes=140 * GIB),
    ),
)


def spec(*minors: int) -> Spec:
    """A container with these GPUs."""
    return parse_spec(
        {"linux": {"devices": [{"path": f"/dev/nvidia{m}", "type": "c", "major": 195, "minor": m} for m in minors]}}
    )


def node(**changes: object) -> Inventory:
    """The node, its GPU 0 changed."""
    return replace(NODE, gpus=(replace(NODE.gpus[0], **changes), NODE.gpus[1]))


def failure(inventory: Inventory = NODE, state: GpuState = STATE, container: Spec | None = None) -> SmrError:
    """The error of a restore that must not begin."""
    with pytest.raises(SmrError) as caught:
        compare.compare(state, container or spec(0), "auto", inventory)
    assert caught.value.hint
    return caught.value


def test_the_same_gpu_and_another() -> None:
    """Both fit; the pairs say which."""
    assert compare.compare(STATE, spec(0), "auto", NODE) == ((uuid(1), uuid(1)),)
    assert compare.compare(STATE, spec(1), "auto", NODE) == ((uuid(1), uuid(2)),)
    assert compare.compare(STATE, spec(0, 1), f"0={uuid(2)}", NODE) == ((uuid(1), uuid(2)),)


def test_another_driver() -> None:
    """Exactly the same release is needed: libraries are mapped."""
    error = failure(replace(NODE, driver="580.159.05"))
    assert error.code is Code.GPU_DRIVER
    assert "580.159.04" in error.message
    assert "580.159.05" in error.message


def test_container_without_a_gpu() -> None:
    """Found and needed."""
    error = failure(container=parse_spec({}))
    assert error.code is Code.GPU_MISSING
    assert "checkpoint has 1 GPU, this container has no GPU" in error.message


@pytest.mark.parametrize("change", [{"name": "NVIDIA H100 80GB HBM3"}, {"compute_capability": "10.0"}])
def test_another_model(change: dict[str, str]) -> None:
    """By name and by compute capability."""
    error = failure(node(gpu=replace(NODE.gpus[0].gpu, **change)))
    assert error.code is Code.GPU_MISMATCH
    assert "NVIDIA H200" in error.message
    assert next(iter(change.values())) in error.message


def test_a_checkpoint_that_does_not_know_its_capability() -> None:
    """Then the name decides."""
    state = replace(STATE, gpus=(replace(STATE.gpus[0], compute_capability=""),))
    assert compare.compare(state, spec(1), "auto", NODE) == ((uuid(1), uuid(2)),)


def test_less_memory_in_all() -> None:
    """Of the same name."""
    error = failure(node(gpu=replace(NODE.gpus[0].gpu, memory_bytes=H200_BYTES - GIB)))
    assert error.code is Code.GPU_MISMATCH
    assert "139.4 GiB in all" in error.message


def test_too_little_free_memory() -> None:
    """What is free, what is needed, and who has the rest."""
    error = failure(node(free_bytes=3 * GIB, used_bytes={812: 130 * GIB, 5: GIB}))
    assert error.code is Code.GPU_MEMORY
    assert "has 3.0 GiB free, the checkpoint needs 8.0 GiB (process 812 has 130.0 GiB, 5 has 1.0 GiB)" in error.message


def test_memory_that_the_driver_did_not_tell_is_a_context() -> None:
    """0 is not nothing."""
    state = replace(STATE, tasks=(CudaTask(pid=7, vram_bytes={uuid(1): 0}),))
    assert failure(node(free_bytes=100 << 20), state).code is Code.GPU_MEMORY
    assert compare.compare(state, spec(0), "auto", node(free_bytes=GIB))


def test_a_gpu_without_memory_of_its_own() -> None:
    """It shares the machine's, which others look after."""
    shared = replace(NODE.gpus[0].gpu, memory_bytes=0)
    state = replace(STATE, gpus=(shared,))
    assert compare.compare(state, spec(0), "auto", node(gpu=shared, free_bytes=0)) == ((uuid(1), uuid(1)),)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"fault": "GPU requires reset"}, "GPU requires reset"),
        ({"mig": True}, "MIG mode"),
        ({"compute_mode": 2}, "Prohibited"),
        ({"compute_mode": 3, "used_bytes": {99: GIB}}, "process 99 has it"),
    ],
)
def test_a_gpu_that_lets_nobody_in(changes: dict[str, object], word: str) -> None:
    """Each with the command that ends it."""
    error = failure(node(**changes))
    assert error.code is Code.GPU_BUSY
    assert word in error.message
    assert "nvidia-smi" in error.hint


def test_an_exclusive_gpu_takes_one_process() -> None:
    """One of the checkpoint may have it, two may not."""
    assert compare.compare(STATE, spec(0), "auto", node(compute_mode=3))
    state = replace(STATE, tasks=tuple(CudaTask(pid=pid, vram_bytes={uuid(1): GIB}) for pid in (7, 8)))
    assert "the checkpoint has 2 processes on it" in failure(node(compute_mode=3), state).message


def test_all_findings() -> None:
    """For people who ask: the driver's first, then each GPU's."""
    found, _ = compare.look(STATE, spec(0), "auto", replace(node(free_bytes=0, compute_mode=2), driver="570.1"))
    assert [error.code for error in found] == [Code.GPU_DRIVER, Code.GPU_BUSY, Code.GPU_MEMORY]


def test_without_a_container() -> None:
    """A node is looked at for GPUs that would do: its own place first, another when that is taken."""
    assert compare.look(STATE, None, "auto", NODE) == ([], ((uuid(1), uuid(1)),))
    assert compare.look(STATE, None, "auto", node(free_bytes=0)) == ([], ((uuid(1), uuid(2)),))
    lost = NodeGpu(gpu=Gpu(uuid="", name="", memory_bytes=0), index=0, fault="GPU is lost")
    assert compare.look(STATE, None, "auto", replace(NODE, gpus=(lost, NODE.gpus[1]))) == ([], ((uuid(1), uuid(2)),))
    two = replace(STATE, gpus=(*STATE.gpus, gpu(9, 5)))
    (error,), _ = compare.look(two, None, "auto", replace(NODE, gpus=NODE.gpus[:1]))
    assert "checkpoint has 2 GPUs" in error.message
