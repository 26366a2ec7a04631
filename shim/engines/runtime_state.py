"""What the OCI runtime itself knows of a container, the same for every engine."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from smr.proto.errors import Code, SmrError
from smr.proto.oci import Json, as_object
from smr.shim.run import run

DEFAULT_ROOTS = {"runc": Path("/run/runc"), "crun": Path("/run/crun")}


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeState:
    """`runtime state ID`, with the command that gave it."""

    runtime: str
    args: tuple[str, ...]
    pid: int
    status: str
    bundle: Path
    rootfs: Path


def query(runtime: str, root: str, container_id: str) -> RuntimeState:
    """Ask the real runtime. Raises CONTAINER_NOT_FOUND when it does not know the container."""
    args = ("--root", root) if root else ()
    document = _state(runtime, args, container_id)
    bundle = Path(str(document["bundle"]))
    rootfs = bundle / str(document.get("rootfs") or "rootfs")  # crun says it relative to the bundle
    return RuntimeState(
        runtime=runtime,
        args=args,
        pid=int(str(document["pid"])),
        status=str(document["status"]),
        bundle=bundle,
        rootfs=rootfs.resolve(),
    )


def status(runtime: str, args: tuple[str, ...], container_id: str) -> str:
    """The container's status now. Raises CONTAINER_NOT_FOUND."""
    return str(_state(runtime, args, container_id)["status"])


def _state(runtime: str, args: tuple[str, ...], container_id: str) -> Json:
    result = run([runtime, *args, "state", container_id], timeout_s=20, check=False, code=Code.RUNTIME_FAILED)
    if result.returncode != 0:
        raise SmrError(
            f"{Path(runtime).name} knows no container {container_id}: {result.stderr.strip()}",
            hint="'smr ps' and the engine's ps list containers",
            code=Code.CONTAINER_NOT_FOUND,
            container=container_id,
        )
    return as_object(json.loads(result.stdout), "state")


def by_default_root(container_id: str, configured: str) -> tuple[str, str] | None:
    """Runtime and root ("" is the default) of a container that was started without --root; None when nobody knows it."""
    for name, root in DEFAULT_ROOTS.items():
        if (root / container_id).is_dir():
            chosen = configured if Path(configured).name == name else shutil.which(name)
            if chosen:
                return chosen, ""
    return None
