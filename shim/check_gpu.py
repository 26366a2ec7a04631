"""The GPU's part of `smr check`: what this node has of GPUs and how containers get them, and whether an image's fit."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

from smr.proto.checkpoint import GpuState
from smr.proto.errors import Code, SmrError
from smr.shim.check import Finding, Level
from smr.shim.gpu import compare, inventory
from smr.shim.gpu.inventory import COMPUTE_MODES, DEFAULT_MODE, Inventory, NodeGpu

TOOLKIT = Path("/etc/nvidia-container-runtime/config.toml")
CDI_FOLDERS = (Path("/etc/cdi"), Path("/var/run/cdi"))
# The first driver that has the checkpoint calls.
DRIVER_MINIMUM = 570
_CDI_KIND = "nvidia.com/gpu"


def node_findings() -> Iterator[Finding]:
    """Driver, GPUs, and the ways to give them to containers; one line where there is none. None of it is an error here."""
    if inventory.vendor() != "nvidia" and not inventory.has_idle_nvidia():
        found = "AMD (/dev/kfd): only NVIDIA's can be checkpointed" if inventory.vendor() == "amd" else "none"
        yield Finding(code="gpu", level=Level.INFO, what="GPU", found=found)
        return
    try:
        node = inventory.read()
    except SmrError as error:
        # Containers without a GPU can be restored all the same.
        yield Finding(code=error.code.value, level=Level.WARNING, what="GPU", found=error.message, fix=error.hint)
        return
    yield _driver(node)
    for one in node.gpus:
        yield from _gpu(one)
    yield from _toolkit()
    yield from _cdi(node.driver)


def image_findings(state: GpuState) -> Iterator[Finding]:
    """What stands against a restore of an image with GPUs on this node, in a container that gets those that fit best."""
    try:
        node = inventory.read()
    except SmrError as error:
        yield Finding(code=error.code.value, level=Level.ERROR, what="GPU", found=error.message, fix=error.hint)
        return
    problems, pairs = compare.look(state, None, "auto", node)
    for problem in problems:
        yield Finding(code=problem.code.value, level=Level.ERROR, what="GPU", found=problem.message, fix=problem.hint)
    if not problems:
        labels = [one.label for _, new in pairs if (one := node.by_uuid(new)) is not None]
        needed = ", ".join(gpu.name for gpu in state.gpus)
        yield Finding(
            code="gpu", level=Level.INFO, what="GPU", found=", ".join(labels), needed=f"{needed}, driver {state.driver}"
        )


def _driver(node: Inventory) -> Finding:
    major = node.driver.partition(".")[0]
    old = major.isdigit() and int(major) < DRIVER_MINIMUM
    return Finding(
        code=Code.GPU_DRIVER.value,
        level=Level.WARNING if old else Level.INFO,
        what="NVIDIA driver",
        found=f"{node.driver}, CUDA {node.cuda // 1000}.{node.cuda % 1000 // 10}",
        needed=f"{DRIVER_MINIMUM} or newer, on a restore the release of the checkpoint",
        fix=f"install driver {DRIVER_MINIMUM} or newer" if old else "",
    )


def _gpu(one: NodeGpu) -> Iterator[Finding]:
    blocked = _blocked(one)
    size, free = one.gpu.memory_bytes / (1 << 30), one.free_bytes / (1 << 30)
    yield Finding(
        code=Code.GPU_BUSY.value if blocked else "gpu",
        level=Level.WARNING if blocked else Level.INFO,
        what=f"GPU {one.index}",
        found=f"{one.label}: {blocked or f'{free:.1f} of {size:.1f} GiB free'}",
        needed="whole, in compute mode Default" if blocked else "",
        fix=_remedy(one) if blocked else "",
    )
    if one.persistent is False:
        yield Finding(
            code="gpu_persistence",
            level=Level.INFO,
            what=f"GPU {one.index}",
            found="persistence mode is off",
            needed="on: the driver else starts the GPU anew for every restore on an idle node, which takes seconds",
            fix=f"nvidia-smi -i {one.index} -pm 1, or run nvidia-persistenced",
        )


def _blocked(one: NodeGpu) -> str:
    if one.fault:
        return one.fault
    if one.mig:
        return "MIG mode"
    if one.compute_mode != DEFAULT_MODE:
        return f"compute mode {dict(enumerate(COMPUTE_MODES)).get(one.compute_mode, one.compute_mode)}"
    return ""


def _remedy(one: NodeGpu) -> str:
    if one.fault:
        return f"nvidia-smi --gpu-reset -i {one.index}, or reboot; dmesg has the reason (NVRM)"
    return f"nvidia-smi -i {one.index} -mig 0" if one.mig else f"nvidia-smi -i {one.index} -c 0"


def _toolkit() -> Iterator[Finding]:
    """nvidia-container-runtime's mode, where its configuration is there."""
    try:
        settings = tomllib.loads(TOOLKIT.read_text())
    except OSError:
        return
    except ValueError as error:
        yield Finding(code="gpu_toolkit", level=Level.WARNING, what=str(TOOLKIT), found=f"cannot be read: {error}")
        return
    section = settings.get("nvidia-container-runtime")
    mode = str(section.get("mode", "auto")) if isinstance(section, dict) else "auto"
    legacy = mode == "legacy"
    yield Finding(
        code="gpu_toolkit",
        level=Level.WARNING if legacy else Level.INFO,
        what="nvidia-container-runtime",
        found=f"mode {mode}",
        needed="mode cdi: in legacy mode a hook brings devices and libraries, and a restore needs runc 1.2 or newer"
        if legacy
        else "",
        fix="nvidia-ctk config --in-place --set nvidia-container-runtime.mode=cdi" if legacy else "",
    )


def _cdi(driver: str) -> Iterator[Finding]:
    """CDI specs for NVIDIA GPUs, and whether they are of the loaded driver."""
    generate = "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
    specs = {path: text for folder in CDI_FOLDERS for path in sorted(folder.glob("*")) if _CDI_KIND in (text := _text(path))}
    if not specs:
        folders = " or ".join(map(str, CDI_FOLDERS))
        yield Finding(code="gpu_cdi", level=Level.INFO, what="CDI", found=f"no spec for {_CDI_KIND} in {folders}", fix=generate)
    for path, text in specs.items():
        stale = "libcuda.so." in text and f"libcuda.so.{driver}" not in text
        yield Finding(
            code="gpu_cdi",
            level=Level.WARNING if stale else Level.INFO,
            what="CDI",
            found=f"{path}{', of another driver' if stale else ''}",
            needed=f"driver {driver}" if stale else "",
            fix=generate if stale else "",
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
