"""A CDI specification of this machine's GPUs (Container Device Interface), and its edits applied to an OCI spec.

    {"cdiVersion": .., "kind": "nvidia.com/gpu", "containerEdits": {..of all..}, "devices": [{"name": "0", "containerEdits": ..}]}

Devices are named by index, by UUID, and `all`. The driver's libraries are mounted file by file, by each name that a program may
look for, as nvidia-ctk does; the links that it makes by a hook are mounts here, so no hook is needed. Standard library only.

`python -m tests.gpu.cdi FOLDER` writes FOLDER/nvidia.json.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KIND = "nvidia.com/gpu"
_Object = dict[str, Any]
# What a compute container needs of the driver; the others (OpenGL, Vulkan, video) are left out.
_LIBRARIES = re.compile(
    r"lib(cuda|cudadebugger|nvidia-(ml|ptxjitcompiler|nvvm|nvvm70|gpucomp|allocator|pkcs11[\w-]*))\.so(\.[\d.]+)?"
)
_MOUNT_OPTIONS = ("ro", "nosuid", "nodev", "rbind", "rprivate")
_SHARED_NODES = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset")

_PROBE = """
import ctypes, json
cuda = ctypes.CDLL("libcuda.so.1")
status = cuda.cuInit(0)
if status: raise SystemExit(f"cuInit answers {status}")
def number(call):
    value = ctypes.c_int()
    status = call(ctypes.byref(value))
    if status: raise SystemExit(f"{call.__name__} answers {status}")
    return value.value
paths = {line.split()[-1] for line in open("/proc/self/maps") if "/libcuda.so" in line}
print(json.dumps({"count": number(cuda.cuDeviceGetCount), "version": number(cuda.cuDriverGetVersion), "library": paths.pop()}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What CUDA says here: GPUs, its version (13000 for 13.0), and the file that libcuda.so.1 was loaded from."""

    gpus: int
    version: int
    library: Path


def probe() -> Probe:
    """Initialise CUDA in a process of its own. LookupError with the reason when that does not work or there is no GPU."""
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != 0:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise LookupError(f"CUDA does not work here: {said}")
    found = json.loads(done.stdout)
    if not found["count"]:
        raise LookupError("CUDA finds no GPU here")
    return Probe(gpus=found["count"], version=found["version"], library=Path(found["library"]))


def write(folder: Path, where: Probe) -> Path:
    """The specification in FOLDER/nvidia.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nvidia.json"
    path.write_text(json.dumps(specification(where), indent=1))
    return path


def specification(where: Probe) -> _Object:
    """The specification of this machine."""
    libraries = list(_libraries(where.library.parent))
    folder = str(where.library.parent)
    edits: _Object = {
        "env": ["NVIDIA_VISIBLE_DEVICES=void", f"LD_LIBRARY_PATH={folder}"],
        "deviceNodes": [_node(Path("/dev", name)) for name in _SHARED_NODES if Path("/dev", name).is_char_device()],
        "mounts": [
            {"hostPath": str(real), "containerPath": f"{folder}/{name}", "options": _MOUNT_OPTIONS} for name, real in libraries
        ],
    }
    gpus = _gpus()
    devices = [
        {"name": name, "containerEdits": {"deviceNodes": [_node(Path("/dev", f"nvidia{minor}"))]}}
        for index, (uuid, minor) in enumerate(gpus)
        for name in (str(index), uuid)
    ]
    every = [_node(Path("/dev", f"nvidia{minor}")) for _, minor in gpus]
    devices.append({"name": "all", "containerEdits": {"deviceNodes": every}})
    return {"cdiVersion": "0.6.0", "kind": KIND, "containerEdits": edits, "devices": devices}


def uuids() -> list[str]:
    """UUIDs of the GPUs, in NVML's order."""
    return [uuid for uuid, _ in _gpus()]


def _gpus() -> list[tuple[str, int]]:
    import pynvml  # type: ignore[import-untyped]

    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [(str(pynvml.nvmlDeviceGetUUID(handle)), int(pynvml.nvmlDeviceGetMinorNumber(handle))) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _libraries(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of each library of the driver; links of libraries lead to files of the same folder."""
    for path in sorted(folder.iterdir()):
        if _LIBRARIES.fullmatch(path.name) and path.is_file():
            yield path.name, path.resolve()


def _node(path: Path) -> _Object:
    status = path.stat()
    return {
        "path": str(path),
        "type": "c",
        "major": os.major(status.st_rdev),
        "minor": os.minor(status.st_rdev),
        "fileMode": stat.S_IMODE(status.st_mode),
        "permissions": "rw",
    }


def apply(spec: _Object, document: Mapping[str, Any], names: Sequence[str]) -> None:
    """The edits of the devices `names` in an OCI spec, as an engine makes them for `--device nvidia.com/gpu=NAME`."""
    devices = {device["name"]: device["containerEdits"] for device in document["devices"]}
    for edits in (document["containerEdits"], *(devices[name] for name in names)):
        spec["process"]["env"] += edits.get("env", [])
        for node in edits.get("deviceNodes", []):
            _add_node(spec["linux"], node)
        for mount in edits.get("mounts", []):
            entry = {
                "destination": mount["containerPath"],
                "source": mount["hostPath"],
                "type": "bind",
                "options": mount["options"],
            }
            spec["mounts"].append(entry)


def _add_node(linux: _Object, node: Mapping[str, Any]) -> None:
    known = linux.setdefault("devices", [])
    if any(device["path"] == node["path"] for device in known):
        return
    known.append({key: node[key] for key in ("path", "type", "major", "minor", "fileMode")} | {"uid": 0, "gid": 0})
    rules = linux.setdefault("resources", {}).setdefault("devices", [])
    rules.append({"allow": True, "type": "c", "major": node["major"], "minor": node["minor"], "access": node["permissions"]})


if __name__ == "__main__":
    print(write(Path(sys.argv[1]), probe()))
