"""The NVIDIA driver's checkpoint calls in libcuda.so.1 (driver 570 and newer), by ctypes, behind a small typed API.

The library is opened by `open_driver`, not by importing this module. Calls release the interpreter's lock, so several processes
can be worked on from several threads. They take pids as this process sees them; none has a time limit but `lock`. A failed call
raises `CudaError`, with the driver's own name and sentence for it. Standard library only.

SMR_CUDA_LIBRARY names another library, for nodes whose driver lies in a container's folder that is not in _FOLDERS.
"""

from __future__ import annotations

import ctypes
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from smr.proto.errors import Code, SmrError

LIBRARY = "libcuda.so.1"
LIBRARY_VARIABLE = "SMR_CUDA_LIBRARY"
OLDEST_RELEASE = 570

# Where drivers lie that are not installed in the node's own system: NVIDIA's GPU operator, GKE.
_FOLDERS = (
    "/run/nvidia/driver/usr/lib64",
    "/run/nvidia/driver/usr/lib/x86_64-linux-gnu",
    "/run/nvidia/driver/usr/lib/aarch64-linux-gnu",
    "/home/kubernetes/bin/nvidia/lib64",
)
_RELEASE_FILES = (Path("/sys/module/nvidia/version"), Path("/proc/driver/nvidia/version"))
_AMD_DEVICE = Path("/dev/kfd")
_CHECKPOINT_CALLS = (
    "cuCheckpointProcessGetState",
    "cuCheckpointProcessGetRestoreThreadId",
    "cuCheckpointProcessLock",
    "cuCheckpointProcessCheckpoint",
    "cuCheckpointProcessRestore",
    "cuCheckpointProcessUnlock",
)
# The argument structures of CUDA 12.8 to 13.x have 64 to 72 bytes, unused ones zero; a longer one of zeros is right for all.
_ARGUMENT_BYTES = 128
_MOST_MS = 0xFFFFFFFF

NO_DEVICE = 100
NOT_READY = 600
SYSTEM_DRIVER_MISMATCH = 803


class CudaState(IntEnum):
    """CUprocessState: what a process with CUDA is in. FAILED is the driver's word for one that it cannot bring back."""

    RUNNING = 0
    LOCKED = 1
    CHECKPOINTED = 2
    FAILED = 3


class CudaError(SmrError):
    """A call failed: `number` is its CUresult, `name` and `text` are the driver's for it."""

    def __init__(self, call: str, number: int, name: str, text: str) -> None:
        super().__init__(f"{call}: {name} ({number}): {text}", code=Code.GPU_FAILED, call=call, number=number)
        self.number = number
        self.name = name
        self.text = text


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPair:
    """A GPU of the checkpoint and the one that takes its place, as NVML writes them: GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx."""

    old: str
    new: str


class Driver:
    """The calls of one opened library. `init` comes before all others but `version`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def init(self) -> None:
        """cuInit, about 0.2 s. Raises SmrError GPU_MISSING when there is no GPU, GPU_DRIVER when library and module differ."""
        try:
            self._call("cuInit", ctypes.c_uint(0))
        except CudaError as error:
            raise _init_error(error) from error

    def version(self) -> int:
        """The newest CUDA that the driver knows: 1000 * major + 10 * minor."""
        value = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(value))
        return value.value

    def get_state(self, pid: int) -> CudaState:
        """The state of a process with CUDA."""
        value = ctypes.c_int(-1)
        self._call("cuCheckpointProcessGetState", pid, ctypes.byref(value))
        return CudaState(value.value)

    def restore_thread(self, pid: int) -> int:
        """The thread of the process that does what `checkpoint`, `restore` and `unlock` ask for; it has to be able to run."""
        value = ctypes.c_int()
        self._call("cuCheckpointProcessGetRestoreThreadId", pid, ctypes.byref(value))
        return value.value

    def lock(self, pid: int, timeout_s: float) -> None:
        """No new CUDA call of the process begins, those under way end. Fails with NOT_READY, unlocked, after `timeout_s`."""
        arguments = bytearray(_ARGUMENT_BYTES)
        milliseconds = min(max(int(timeout_s * 1000), 1), _MOST_MS)
        arguments[:4] = milliseconds.to_bytes(4, "little")
        self._call("cuCheckpointProcessLock", pid, bytes(arguments))

    def checkpoint(self, pid: int) -> None:
        """Bring a locked process's GPU memory into its own memory and let go of the GPU."""
        self._call("cuCheckpointProcessCheckpoint", pid, None)

    def restore(self, pid: int, pairs: Sequence[GpuPair] = ()) -> None:
        """Bring it back; the process is locked then. `pairs`: empty, or one for every GPU of the checkpoint (driver 580)."""
        if not pairs:
            self._call("cuCheckpointProcessRestore", pid, None)
            return
        table = ctypes.create_string_buffer(b"".join(_uuid_bytes(pair.old) + _uuid_bytes(pair.new) for pair in pairs))
        arguments = bytearray(_ARGUMENT_BYTES)
        arguments[:8] = ctypes.addressof(table).to_bytes(8, "little")
        arguments[8:12] = len(pairs).to_bytes(4, "little")
        self._call("cuCheckpointProcessRestore", pid, bytes(arguments))

    def unlock(self, pid: int) -> None:
        """CUDA calls go on."""
        self._call("cuCheckpointProcessUnlock", pid, None)

    def _call(self, name: str, *arguments: object) -> None:
        number = int(getattr(self._library, name)(*arguments))
        if number != 0:
            raise CudaError(name, number, self._text("cuGetErrorName", number), self._text("cuGetErrorString", number))

    def _text(self, call: str, number: int) -> str:
        value = ctypes.c_char_p()
        if getattr(self._library, call)(number, ctypes.byref(value)) != 0 or value.value is None:
            return f"CUDA error {number}"
        return value.value.decode(errors="replace")


def open_driver(library: str = "") -> Driver:
    """Load the library: `library`, else SMR_CUDA_LIBRARY, else libcuda.so.1 of the loader's folders, then of driver containers.

    Raises SmrError GPU_MISSING when there is none, GPU_DRIVER when it is too old for the checkpoint calls.
    """
    named = library or os.environ.get(LIBRARY_VARIABLE, "")
    names = [named] if named else [LIBRARY, *(f"{folder}/{LIBRARY}" for folder in _FOLDERS)]
    failed = ""
    for name in names:
        try:
            return Driver(_with_calls(ctypes.CDLL(name)))
        except OSError as error:
            failed = failed or str(error)
    raise _missing(failed)


def release() -> str:
    """The release of the kernel's NVIDIA driver, such as 580.159.04; empty where it is not loaded."""
    for file in _RELEASE_FILES:
        try:
            words = file.read_text().split()
        except OSError:
            continue
        # The first file is the number alone; the other is a sentence that has it after "Kernel Module".
        for word in words:
            parts = word.split(".")
            if len(parts) in (2, 3) and all(part.isdigit() for part in parts):
                return word
    return ""


def _with_calls(library: ctypes.CDLL) -> ctypes.CDLL:
    absent = [name for name in _CHECKPOINT_CALLS if not hasattr(library, name)]
    if not absent:
        return library
    raise SmrError(
        f"the NVIDIA driver {release() or '(release unknown)'} has no {absent[0]}: needed {OLDEST_RELEASE} or newer",
        hint=f"install an NVIDIA driver of the {OLDEST_RELEASE} branch or newer on this node; 'smr check' shows what is there",
        code=Code.GPU_DRIVER,
        driver=release(),
    )


def _missing(reason: str) -> SmrError:
    if _AMD_DEVICE.exists() and not release():
        return SmrError(
            f"no NVIDIA driver on this node, which has an AMD GPU ({_AMD_DEVICE}): only NVIDIA GPUs can be checkpointed",
            hint="run this container on a node with an NVIDIA GPU, or start it cold",
            code=Code.GPU_MISSING,
        )
    if release():
        return SmrError(
            f"the NVIDIA driver {release()} is loaded, but its library cannot be: {reason}",
            hint=f"set {LIBRARY_VARIABLE} to the path of the driver's {LIBRARY}",
            code=Code.GPU_MISSING,
        )
    return SmrError(
        f"no NVIDIA driver on this node: {reason}",
        hint=f"install NVIDIA's driver, {OLDEST_RELEASE} or newer; 'smr check' shows what is there",
        code=Code.GPU_MISSING,
    )


def _init_error(error: CudaError) -> SmrError:
    if error.number == NO_DEVICE:
        hint = "'nvidia-smi -L' lists the GPUs that the driver sees; none: see 'dmesg', lines with NVRM"
        return SmrError(f"the NVIDIA driver finds no GPU on this node: {error.message}", hint=hint, code=Code.GPU_MISSING)
    if error.number == SYSTEM_DRIVER_MISMATCH:
        message = f"the NVIDIA library and the loaded kernel module {release()} are of different releases: {error.message}"
        return SmrError(message, hint="reboot, or load the installed driver's module again", code=Code.GPU_DRIVER)
    return SmrError(f"CUDA cannot be initialised: {error.message}", hint="see 'dmesg', lines with NVRM", code=Code.GPU_FAILED)


def _uuid_bytes(text: str) -> bytes:
    try:
        return uuid.UUID(text.removeprefix("GPU-")).bytes
    except ValueError:
        message = f"'{text}' is not a GPU's UUID: needed GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx"
        raise SmrError(message, hint="'nvidia-smi -L' shows them", code=Code.GPU_MISMATCH) from None
