"""A module in the place of `pynvml`: GPUs that a test describes, with the driver's refusals and losses."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest

UNINITIALIZED, NOT_SUPPORTED, DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND = 1, 3, 9, 12
LOST, RESET_REQUIRED, VERSION_MISMATCH, GPU_NOT_FOUND = 15, 16, 18, 28
H200_BYTES = 150_754_820_096
DRIVER = "580.159.04"


class NVMLError(Exception):
    """As pynvml's: a number, and NVML's words for it."""

    def __init__(self, value: int) -> None:
        words = {15: "GPU is lost", 16: "GPU requires reset", 3: "Not Supported", 12: "NVML Shared Library Not Found"}
        super().__init__(words.get(value, f"NVML error {value}"))
        self.value = value


@dataclass(kw_only=True)
class FakeGpu:
    """One GPU as NVML tells of it; `error` is what every question about it gets, `refuses` those it does not support."""

    uuid: str
    minor: int = 0
    name: str = "NVIDIA H200"
    capability: tuple[int, int] = (9, 0)
    total: int = H200_BYTES
    free: int = H200_BYTES
    mode: int = 0
    mig: int = 0
    persistence: int = 1
    processes: dict[int, int | None] = field(default_factory=dict)
    recovery: int = 0
    error: int = 0
    refuses: frozenset[str] = frozenset()


def uuid(digit: int) -> str:
    """A GPU's UUID made of one hexadecimal digit."""
    d = f"{digit:x}"
    return f"GPU-{d * 8}-{d * 4}-{d * 4}-{d * 4}-{d * 12}"


class FakeNvml(ModuleType):
    """The module. `initialised` counts, so that a test sees whether each initialisation is ended."""

    NVMLError = NVMLError
    NVML_SUCCESS = 0
    NVML_ERROR_GPU_IS_LOST, NVML_ERROR_RESET_REQUIRED = LOST, RESET_REQUIRED
    NVML_ERROR_LIBRARY_NOT_FOUND, NVML_ERROR_DRIVER_NOT_LOADED = LIBRARY_NOT_FOUND, DRIVER_NOT_LOADED
    NVML_ERROR_LIB_RM_VERSION_MISMATCH, NVML_ERROR_GPU_NOT_FOUND = VERSION_MISMATCH, GPU_NOT_FOUND
    NVML_FI_DEV_GET_GPU_RECOVERY_ACTION = 230

    def __init__(self, gpus: list[FakeGpu], init_error: int = 0) -> None:
        super().__init__("pynvml")
        self.gpus, self.init_error = gpus, init_error
        self.initialised = self.inits = 0

    def nvmlInit(self) -> None:  # noqa: N802
        """Fails as told."""
        if self.init_error:
            raise NVMLError(self.init_error)
        self.initialised += 1
        self.inits += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        """One end for each beginning."""
        self.initialised -= 1

    def _of(self, handle: int, question: str) -> FakeGpu:
        gpu = self.gpus[handle]
        if not self.initialised:
            raise NVMLError(UNINITIALIZED)
        if gpu.error or question in gpu.refuses:
            raise NVMLError(gpu.error or NOT_SUPPORTED)
        return gpu

    def __getattr__(self, name: str) -> object:
        answers = {
            "nvmlDeviceGetCount": lambda: len(self.gpus),
            "nvmlSystemGetDriverVersion": lambda: DRIVER,
            "nvmlSystemGetCudaDriverVersion_v2": lambda: 13000,
            "nvmlDeviceGetHandleByIndex": lambda index: index if self._of(index, "handle") else None,
            "nvmlDeviceGetCudaComputeCapability": lambda h: self._of(h, "capability").capability,
            "nvmlDeviceGetUUID": lambda h: self._of(h, "uuid").uuid,
            "nvmlDeviceGetName": lambda h: self._of(h, "name").name.encode(),
            "nvmlDeviceGetMinorNumber": lambda h: self._of(h, "minor").minor,
            "nvmlDeviceGetMemoryInfo": lambda h: SimpleNamespace(
                total=self._of(h, "memory").total, free=self.gpus[h].free, used=self.gpus[h].total - self.gpus[h].free
            ),
            "nvmlDeviceGetComputeMode": lambda h: self._of(h, "mode").mode,
            "nvmlDeviceGetMigMode": lambda h: [self._of(h, "mig").mig, 0],
            "nvmlDeviceGetPersistenceMode": lambda h: self._of(h, "persistence").persistence,
            "nvmlDeviceGetComputeRunningProcesses": lambda h: [
                SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self._of(h, "processes").processes.items()
            ],
            "nvmlDeviceGetFieldValues": lambda h, _fields: [
                SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=self._of(h, "recovery").recovery))
            ],
        }
        if name not in answers:
            raise AttributeError(name)
        return answers[name]


def install(monkeypatch: pytest.MonkeyPatch, *gpus: FakeGpu, init_error: int = 0) -> FakeNvml:
    """Put it where `import pynvml` finds it."""
    fake = FakeNvml(list(gpus), init_error)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake
