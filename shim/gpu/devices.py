"""The GPUs of a container, from its spec: never from a checkpoint's image, and not from what a process says.

Device nodes are what counts: a container sees the GPUs whose /dev/nvidiaN it has, whoever put them into the spec (CDI through
containerd, podman or nvidia-container-runtime; --device; a privileged container's list of all). Only with the old
nvidia-container-runtime-hook the spec has none; then NVIDIA_VISIBLE_DEVICES says which ones the hook brings. Processes see them
in the order of the PCI bus, which is the inventory's; CUDA_VISIBLE_DEVICES in the spec chooses among them and orders them.

`device_nodes` makes a restored container's nodes those of its spec, `device_mounts` knows the driver's mounts; both are here too.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath

from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec, as_list, as_object
from smr.shim.gpu.device_mounts import dump_externals, is_device_mount, nvidia_mounts, restore_externals
from smr.shim.gpu.device_nodes import Changes, entries_of, fix_devices
from smr.shim.gpu.inventory import Inventory, NodeGpu

__all__ = [
    "Changes",
    "dump_externals",
    "fix_devices",
    "gpus_of",
    "has_gpus",
    "is_device_mount",
    "is_legacy",
    "nvidia_mounts",
    "restore_externals",
]

VISIBLE = "NVIDIA_VISIBLE_DEVICES"
CUDA_VISIBLE = "CUDA_VISIBLE_DEVICES"
# nvidia-container-runtime's hook, by its name of today and the one before 1.4.
_HOOKS = frozenset({"nvidia-container-runtime-hook", "nvidia-container-toolkit"})
# A way to ask for devices without the environment: /dev/null mounted at a path that names each.
_DEVICE_LIST = "/var/run/nvidia-container-devices/"
_GPU_NODE = re.compile(r"/dev/nvidia(\d+)")
_NONE = frozenset({"", "void", "none"})


def is_legacy(spec: Spec) -> bool:
    """Whether nvidia-container-runtime-hook brings devices and libraries, so that neither is in the spec."""
    hooks = as_object(spec.document.get("hooks"), "hooks")
    return any(
        PurePosixPath(str(as_object(entry, "hooks[]").get("path", ""))).name in _HOOKS
        for kind in ("prestart", "createRuntime", "createContainer")
        for entry in as_list(hooks.get(kind), f"hooks.{kind}")
    )


def has_gpus(spec: Spec) -> bool:
    """Whether the container may see a GPU at all, judged without NVML; a privileged container counts on any node."""
    return _sees_host_dev(spec) or bool(_minors(spec)) or (is_legacy(spec) and not set(_requested(spec)) <= _NONE)


def gpus_of(spec: Spec, inventory: Inventory, used: Collection[str] = ()) -> tuple[NodeGpu, ...]:
    """The container's GPUs in the order in which its processes see them.

    `used` are UUIDs that are known to be in use by its processes: they follow, where CUDA_VISIBLE_DEVICES hides them, since a
    process may have set that itself. Raises GPU_MISSING for a device node without a GPU, GPU_BUSY for one with a fault,
    GPU_UNSUPPORTED for MIG devices.
    """
    there = _attached(spec, inventory)
    seen = _cuda_visible(spec, there)
    return (*seen, *(one for one in there if one.gpu.uuid in used and one not in seen))


def environment_of(spec: Spec, name: str) -> str | None:
    """A variable of the container's process; the last one counts."""
    process = as_object(spec.document.get("process"), "process")
    found = [str(entry) for entry in as_list(process.get("env"), "process.env")]
    return next((entry.partition("=")[2] for entry in reversed(found) if entry.startswith(f"{name}=")), None)


def _attached(spec: Spec, inventory: Inventory) -> tuple[NodeGpu, ...]:
    if _sees_host_dev(spec):
        return tuple(one for one in inventory.gpus if one.gpu.uuid)
    minors = _minors(spec)
    if minors:
        return _by_minor(minors, inventory)
    return _legacy(spec, inventory) if is_legacy(spec) else ()


def _sees_host_dev(spec: Spec) -> bool:
    """The host's /dev as a whole, as privileged containers are sometimes given it."""
    return any(
        mount.destination.rstrip("/") == "/dev" and (mount.type == "devtmpfs" or (mount.is_bind and mount.source == "/dev"))
        for mount in spec.mounts
    )


def _minors(spec: Spec) -> list[int]:
    """Minor numbers of the container's /dev/nvidiaN, each once, in the spec's order."""
    found = [_minor(str(node.get("path", "")), node.get("minor")) for node in entries_of(spec)]
    found += [_minor(mount.destination, _minor_of_file(mount.source)) for mount in spec.mounts if mount.is_bind]
    return list(dict.fromkeys(minor for minor in found if minor is not None))


def _minor(path: str, minor: object) -> int | None:
    """By the node's number, since a node may have any name in the container; without one, by its name."""
    match = _GPU_NODE.fullmatch(path)
    if match is None:
        return None
    return minor if isinstance(minor, int) else int(match[1])


def _minor_of_file(source: str) -> int | None:
    if not _GPU_NODE.fullmatch(source):
        return None
    try:
        found = Path(source).stat()
    except OSError:
        return None
    return os.minor(found.st_rdev) if stat.S_ISCHR(found.st_mode) else None


def _by_minor(minors: Iterable[int], inventory: Inventory) -> tuple[NodeGpu, ...]:
    wanted = set(minors)
    absent = sorted(wanted - {one.gpu.minor for one in inventory.gpus})
    if absent:
        faults = [f"{one.label}: {one.fault}" for one in inventory.gpus if one.fault and not one.gpu.uuid]
        raise SmrError(
            f"the container has /dev/nvidia{absent[0]}, for which the driver shows no GPU" + "".join(f"; {f}" for f in faults),
            hint="see nvidia-smi and dmesg (NVRM); a CDI spec may be stale: nvidia-ctk cdi generate",
            code=Code.GPU_BUSY if faults else Code.GPU_MISSING,
        )
    return tuple(one for one in inventory.gpus if one.gpu.minor in wanted)


def _requested(spec: Spec) -> list[str]:
    """What the old hook is asked for, by mounts or by NVIDIA_VISIBLE_DEVICES."""
    mounts = [mount.destination.removeprefix(_DEVICE_LIST) for mount in spec.mounts if mount.destination.startswith(_DEVICE_LIST)]
    return mounts or [word.strip() for word in (environment_of(spec, VISIBLE) or "").split(",")]


def _legacy(spec: Spec, inventory: Inventory) -> tuple[NodeGpu, ...]:
    words = _requested(spec)
    if "all" in words:
        return tuple(one for one in inventory.gpus if one.gpu.uuid)
    if set(words) <= _NONE or "void" in words:
        return ()
    chosen = [_named(inventory.gpus, word, VISIBLE) for word in words if word]
    unknown = next((word for word, one in zip([word for word in words if word], chosen, strict=True) if one is None), None)
    if unknown is not None:
        raise SmrError(
            f"{VISIBLE} names {unknown}, which this node does not have",
            hint="nvidia-smi -L lists the node's GPUs",
            code=Code.GPU_MISSING,
        )
    return tuple(one for one in inventory.gpus if one in chosen)


def _cuda_visible(spec: Spec, there: Sequence[NodeGpu]) -> tuple[NodeGpu, ...]:
    """CUDA's own rules: the list ends at the first entry that is no GPU, and one that comes twice leaves none."""
    value = environment_of(spec, CUDA_VISIBLE)
    if value is None:
        return tuple(there)
    found: list[NodeGpu] = []
    for word in value.split(","):
        one = _named(there, word.strip(), CUDA_VISIBLE)
        if one is None:
            break
        if one in found:
            return ()
        found.append(one)
    return tuple(found)


def _named(gpus: Sequence[NodeGpu], word: str, variable: str) -> NodeGpu | None:
    """By position in `gpus` or by the beginning of a UUID; None where that is not exactly one."""
    if word.upper().startswith("MIG-") or re.fullmatch(r"\d+:\d+", word):
        raise SmrError(
            f"{variable} names the MIG device {word}: SMR checkpoints and restores whole GPUs only",
            hint="give the container a whole GPU (nvidia-smi -i N -mig 0)",
            code=Code.GPU_UNSUPPORTED,
        )
    if word.isascii() and word.isdigit():
        return gpus[int(word)] if int(word) < len(gpus) else None
    fits = [one for one in gpus if word.upper().startswith("GPU-") and one.gpu.uuid.upper().startswith(word.upper())]
    return fits[0] if len(fits) == 1 else None
