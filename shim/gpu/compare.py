"""A checkpoint's GPUs against those that a container gets here: what a restore must not find out halfway.

The driver restores onto the same model of GPU with the same driver release: the processes have its libraries mapped, and CRIU
holds files to their build ids. Each finding is an error that says what was found and needed, the gravest first; a restore
raises the first, `smr check` shows all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from smr.proto.checkpoint import Gpu, GpuState
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec
from smr.shim.gpu import remap
from smr.shim.gpu.devices import gpus_of
from smr.shim.gpu.inventory import COMPUTE_MODES, DEFAULT_MODE, Inventory, NodeGpu, short
from smr.shim.gpu.remap import Pairs

# A process whose memory the driver did not tell has a context at the least.
CONTEXT_BYTES = 512 << 20


def compare(state: GpuState, spec: Spec, gpu_map: str, inventory: Inventory) -> Pairs:
    """The pairs for a restore of `state` into a container with `spec`; raises the first finding."""
    found, pairs = look(state, spec, gpu_map, inventory)
    if found:
        raise found[0]
    return pairs


def look(state: GpuState, spec: Spec | None, gpu_map: str, inventory: Inventory) -> tuple[list[SmrError], Pairs]:
    """All findings, and the pairs as far as they could be made. Without a `spec`, of a container with the GPUs that fit best."""
    found = list(_driver(state, inventory))
    try:
        # The driver wants every GPU in the map that the processes can open, whether CUDA shows it to them or not.
        there = [one.gpu.uuid for one in inventory.gpus]
        new = gpus_of(spec, inventory, there) if spec is not None else best(state, inventory)
        pairs = remap.pairs(state.gpus, [one.gpu for one in new], gpu_map)
    except SmrError as error:
        return [*found, error], ()
    old = {gpu.uuid: gpu for gpu in state.gpus}
    for before, now in pairs:
        one = next(one for one in new if one.gpu.uuid == now)
        found += _gpu(old[before], one, state)
    return found, pairs


def best(state: GpuState, inventory: Inventory) -> tuple[NodeGpu, ...]:
    """The node's GPUs for a container that takes what fits: its old ones in their places, then those with fewest findings."""
    usable = [one for one in inventory.gpus if one.gpu.uuid]
    chosen: dict[str, NodeGpu] = {}
    for before in state.gpus:
        left = [one for one in usable if one not in chosen.values()]
        if left:
            chosen[before.uuid] = min(left, key=lambda one: _rank(before, one, state))
    return tuple(chosen.values())


def vram_needed(state: GpuState, uuid: str) -> int:
    """Bytes that the checkpoint's processes need on the GPU that had this UUID."""
    return sum(task.vram_bytes[uuid] or CONTEXT_BYTES for task in state.tasks if uuid in task.vram_bytes)


def _rank(before: Gpu, one: NodeGpu, state: GpuState) -> tuple[int, bool, int]:
    return len(list(_gpu(before, one, state))), one.gpu.uuid != before.uuid, -one.free_bytes


def _driver(state: GpuState, inventory: Inventory) -> Iterator[SmrError]:
    if state.driver != inventory.driver:
        yield SmrError(
            f"checkpoint was made with NVIDIA driver {state.driver}, this node has {inventory.driver}: "
            "needed the same, since its processes have the driver's libraries loaded",
            hint=f"restore on a node with driver {state.driver}, or checkpoint again with {inventory.driver}",
            code=Code.GPU_DRIVER,
        )


def _gpu(old: Gpu, one: NodeGpu, state: GpuState) -> Iterator[SmrError]:
    """What is wrong with `one` in the place of `old`."""
    if one.fault:
        yield SmrError(
            f"{one.label} cannot be used: {one.fault}",
            hint=f"nvidia-smi --gpu-reset -i {one.index}, or reboot the node; dmesg has the reason (NVRM)",
            code=Code.GPU_BUSY,
        )
        return
    if one.mig:
        yield SmrError(
            f"{one.label} is in MIG mode: SMR restores to whole GPUs only",
            hint=f"nvidia-smi -i {one.index} -mig 0, or use another GPU",
            code=Code.GPU_BUSY,
        )
    yield from _model(old, one)
    yield from _mode(one, sum(old.uuid in task.vram_bytes for task in state.tasks))
    yield from _memory(one, vram_needed(state, old.uuid))


def _model(old: Gpu, one: NodeGpu) -> Iterator[SmrError]:
    new = one.gpu
    if old.name != new.name or (old.compute_capability and old.compute_capability != new.compute_capability):
        yield SmrError(
            f"{one.label} has compute capability {new.compute_capability}, "
            f"the checkpoint's was {old.name} ({short(old.uuid)}) with {old.compute_capability or 'one that is not known'}",
            hint=f"restore on {old.name}",
            code=Code.GPU_MISMATCH,
        )
    elif 0 < new.memory_bytes < old.memory_bytes:
        yield SmrError(
            f"{one.label} has {_gib(new.memory_bytes)} in all, the checkpoint's {old.name} had {_gib(old.memory_bytes)}",
            hint="restore on a GPU of the same size; ECC takes some (nvidia-smi -q -d ECC)",
            code=Code.GPU_MISMATCH,
        )


def _mode(one: NodeGpu, processes: int) -> Iterator[SmrError]:
    """A compute mode that does not let `processes` of the checkpoint in, beside those that are there."""
    if one.compute_mode == DEFAULT_MODE:
        return
    name = COMPUTE_MODES[one.compute_mode] if one.compute_mode < len(COMPUTE_MODES) else str(one.compute_mode)
    exclusive = name.startswith("Exclusive")
    if exclusive and not one.used_bytes and processes <= 1:
        return
    if one.used_bytes:
        why = f"process {next(iter(one.used_bytes))} has it"
    else:
        why = f"the checkpoint has {processes} processes on it" if exclusive else "no process may use it"
    yield SmrError(
        f"{one.label} is in compute mode {name}, and {why}",
        hint=f"nvidia-smi -i {one.index} -c 0, or use another GPU",
        code=Code.GPU_BUSY,
    )


def _memory(one: NodeGpu, needed_bytes: int) -> Iterator[SmrError]:
    if not one.gpu.memory_bytes or one.free_bytes >= needed_bytes:
        return
    users = ", ".join(f"{pid} has {_gib(used)}" for pid, used in _largest(one))
    yield SmrError(
        f"{one.label} has {_gib(one.free_bytes)} free, the checkpoint needs {_gib(needed_bytes)}"
        + (f" (process {users})" if users else ""),
        hint="end what uses the GPU, or give the container another",
        code=Code.GPU_MEMORY,
    )


def _largest(one: NodeGpu) -> Sequence[tuple[int, int]]:
    return sorted(one.used_bytes.items(), key=lambda item: -item[1])[:3]


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.1f} GiB"
