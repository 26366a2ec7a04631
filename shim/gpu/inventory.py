"""The GPUs of this node, by NVML (libnvidia-ml.so.1 through `pynvml`): who they are, what is free, what stands in the way.

One `read` is one initialisation of NVML, which takes 20 ms and more, up to seconds on a GPU without persistence mode; so it is
asked for once per operation, and may run in a thread beside other work. The order is NVML's, that of the PCI bus, in which
CUDA numbers GPUs of one model. A GPU that has fallen off the bus, or waits for a reset, is listed with its `fault`.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from smr.proto.checkpoint import Gpu
from smr.proto.errors import Code, SmrError

_T = TypeVar("_T")

DRIVER_VERSION = Path("/proc/driver/nvidia/version")
AMD_DEVICE = Path("/dev/kfd")
NVIDIA_VENDOR = "0x10de"
PCI_DEVICES = Path("/sys/bus/pci/devices")
# nvidia-smi's words.
COMPUTE_MODES = ("Default", "Exclusive_Thread", "Prohibited", "Exclusive_Process")
DEFAULT_MODE = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeGpu:
    """One GPU of this node. `index` is nvidia-smi's number; `used_bytes` maps a host pid to its memory there (0: not known).

    `fault` is empty, or why the GPU cannot be used; then all else may be unknown. `persistent` is None where the driver does not
    say. `memory_bytes` and `free_bytes` are 0 where a GPU has no memory of its own.
    """

    gpu: Gpu
    index: int
    free_bytes: int = 0
    compute_mode: int = DEFAULT_MODE
    mig: bool = False
    persistent: bool | None = None
    used_bytes: Mapping[int, int] = field(default_factory=dict)
    fault: str = ""

    @property
    def label(self) -> str:
        """How messages name it: GPU 0 (NVIDIA H200, GPU-5f9c1e2a)."""
        known = [part for part in (self.gpu.name, short(self.gpu.uuid)) if part]
        return f"GPU {self.index}" + (f" ({', '.join(known)})" if known else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """All GPUs of the node, and the driver's version as text (580.159.04) and the highest CUDA version it knows (13000)."""

    driver: str
    cuda: int = 0
    gpus: tuple[NodeGpu, ...] = ()

    def by_uuid(self, uuid: str) -> NodeGpu | None:
        """The GPU of that UUID, or None."""
        return next((found for found in self.gpus if found.gpu.uuid == uuid), None)

    def vram(self, pids: Collection[int]) -> dict[int, dict[str, int]]:
        """What each of the host's `pids` has on each GPU, in bytes by UUID, its context included. Others are left out."""
        found: dict[int, dict[str, int]] = {}
        for one in self.gpus:
            for pid, used in one.used_bytes.items():
                if pid in pids:
                    found.setdefault(pid, {})[one.gpu.uuid] = used
        return found


def short(uuid: str) -> str:
    """The beginning of a UUID, as far as people read it."""
    return uuid[:12]


def vendor() -> str:
    """What this node has: "nvidia" (its driver is loaded), "amd", or "" for neither. Looks at files only."""
    if DRIVER_VERSION.exists():
        return "nvidia"
    return "amd" if AMD_DEVICE.exists() else ""


def has_idle_nvidia() -> bool:
    """Whether an NVIDIA GPU is on the PCI bus, whatever driver it has. For nodes whose `vendor` is not "nvidia"."""
    for device in PCI_DEVICES.glob("*"):
        with contextlib.suppress(OSError):
            if (device / "vendor").read_text().strip() == NVIDIA_VENDOR and (device / "class").read_text().startswith("0x03"):
                return True
    return False


def read() -> Inventory:
    """Ask NVML. Raises GPU_MISSING where there is no NVIDIA driver or GPU, GPU_DRIVER where library and driver do not fit."""
    nvml = _load()
    with _initialised(nvml):
        count = _value(nvml, nvml.nvmlDeviceGetCount, 0)
        gpus = tuple(_gpu(nvml, index) for index in range(count))
        if not gpus:
            raise _missing("the NVIDIA driver is loaded and shows no GPU")
        return Inventory(
            driver=_text(_value(nvml, nvml.nvmlSystemGetDriverVersion, "")),
            cuda=_value(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2, 0),
            gpus=gpus,
        )


def _load() -> ModuleType:
    # By name: nothing of NVIDIA's is needed to import this module, nor to check its types.
    try:
        return importlib.import_module("pynvml")
    except ImportError as error:
        raise SmrError(
            f"the Python package nvidia-ml-py cannot be loaded: {error}",
            hint="run install.sh again; it comes with SMR",
            code=Code.GPU_MISSING,
        ) from error


@contextlib.contextmanager
def _initialised(nvml: ModuleType) -> Iterator[None]:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise _no_nvml(nvml, error) from error
    try:
        yield
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _no_nvml(nvml: ModuleType, error: Exception) -> SmrError:
    value = getattr(error, "value", None)
    if value == nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        return SmrError(
            "the NVIDIA driver's libraries are of another version than its loaded kernel module",
            hint="reboot, or unload and load the nvidia kernel modules, so that the updated driver is used",
            code=Code.GPU_DRIVER,
        )
    if value in {nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED, nvml.NVML_ERROR_GPU_NOT_FOUND}:
        return _missing(f"NVML says: {error}")
    return SmrError(f"NVML does not start: {error}", hint="try nvidia-smi; see dmesg for NVRM", code=Code.GPU_FAILED)


def _missing(why: str) -> SmrError:
    kind = vendor()
    if kind == "amd":
        return SmrError(
            "this node has AMD GPUs (/dev/kfd) and no NVIDIA driver: SMR checkpoints and restores NVIDIA GPUs only",
            hint="use a node with an NVIDIA GPU; containers without a GPU can be restored here",
            code=Code.GPU_MISSING,
        )
    if kind == "nvidia":
        return SmrError(f"this node's NVIDIA GPUs cannot be used: {why}", hint="try nvidia-smi", code=Code.GPU_MISSING)
    if has_idle_nvidia():
        return SmrError(
            f"this node has an NVIDIA GPU and its driver is not loaded ({why})",
            hint="install NVIDIA's driver 570 or newer, then: modprobe nvidia",
            code=Code.GPU_MISSING,
        )
    return SmrError(
        f"this node has no NVIDIA GPU ({why})",
        hint="use a node with an NVIDIA GPU; containers without a GPU can be restored here",
        code=Code.GPU_MISSING,
    )


def _gpu(nvml: ModuleType, index: int) -> NodeGpu:
    try:
        return _healthy(nvml, index)
    except nvml.NVMLError as error:
        # The words of NVML: "GPU is lost", "GPU requires reset".
        return NodeGpu(gpu=Gpu(uuid="", name="", memory_bytes=0), index=index, fault=str(error))


def _healthy(nvml: ModuleType, index: int) -> NodeGpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    memory = _value(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle), None)
    persistent = _value(nvml, lambda: nvml.nvmlDeviceGetPersistenceMode(handle), None)
    return NodeGpu(
        gpu=Gpu(
            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
            name=_text(nvml.nvmlDeviceGetName(handle)),
            memory_bytes=int(memory.total) if memory else 0,
            minor=nvml.nvmlDeviceGetMinorNumber(handle),
            compute_capability=f"{major}.{minor}",
        ),
        index=index,
        free_bytes=int(memory.free) if memory else 0,
        compute_mode=_value(nvml, lambda: nvml.nvmlDeviceGetComputeMode(handle), DEFAULT_MODE),
        mig=bool(_value(nvml, lambda: nvml.nvmlDeviceGetMigMode(handle), [0, 0])[0]),
        persistent=None if persistent is None else bool(persistent),
        used_bytes=_used(nvml, handle),
        fault=_pending(nvml, handle),
    )


def _used(nvml: ModuleType, handle: object) -> dict[int, int]:
    found: list[Any] = _value(nvml, lambda: list(nvml.nvmlDeviceGetComputeRunningProcesses(handle)), [])
    return {int(process.pid): int(process.usedGpuMemory or 0) for process in found}


def _pending(nvml: ModuleType, handle: object) -> str:
    """What the driver says must be done before the GPU is used again; "" for nothing, or where it does not say (before 565)."""
    wanted = getattr(nvml, "NVML_FI_DEV_GET_GPU_RECOVERY_ACTION", None)
    if wanted is None:
        return ""
    values: list[Any] = _value(nvml, lambda: list(nvml.nvmlDeviceGetFieldValues(handle, [wanted])), [])
    if not values or values[0].nvmlReturn != nvml.NVML_SUCCESS:
        return ""
    action = int(values[0].value.uiVal)
    words = {1: "a reset is pending", 2: "the node must be rebooted", 3: "peer-to-peer must be drained", 4: "a reset is pending"}
    return words.get(action, f"recovery action {action} is pending") if action else ""


def _value(nvml: ModuleType, ask: Callable[[], _T], default: _T) -> _T:
    """What NVML says, or `default` for what this GPU or driver does not support. A lost GPU stays an error."""
    try:
        return ask()
    except nvml.NVMLError as error:
        fatal = {nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED}
        if getattr(error, "value", None) in fatal:
            raise
        return default


def _text(value: object) -> str:
    # Older releases of pynvml return bytes.
    return value.decode() if isinstance(value, bytes) else str(value)
