"""podman: containers by `podman inspect`; the image of a bundle by the storage's own JSON.

SMR_PODMAN may hold podman's command line with global options ("podman --root /srv/containers").
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from smr.proto.errors import Code, SmrError
from smr.proto.oci import as_list, as_object, load_spec
from smr.shim.engines import runtime_state
from smr.shim.engines.target import Engine, Target
from smr.shim.run import run


def command() -> list[str]:
    """podman with its global options."""
    return shlex.split(os.environ.get("SMR_PODMAN", "podman"))


def available() -> bool:
    """Whether podman is installed."""
    return shutil.which(command()[0]) is not None


def find(name: str, runtime: str) -> Target | None:
    """A container by name or id; None when podman does not know it. `runtime` is the configured real runtime."""
    if not available():
        return None
    result = run([*command(), "container", "inspect", name], timeout_s=30, check=False, code=Code.ENGINE_FAILED)
    if result.returncode != 0:
        return None
    document = as_object(as_list(json.loads(result.stdout), "podman inspect")[0], "podman inspect")
    container_id = str(document["Id"])
    where = runtime_state.by_default_root(container_id, runtime)
    if where is None:
        raise SmrError(
            f"podman container {name} is not running",
            hint=f"start it: podman start {name}",
            code=Code.CONTAINER_STATE,
            container=name,
        )
    state = runtime_state.query(*where, container_id)
    image = str(document.get("ImageName") or "")
    digest = str(document.get("Image") or "")
    return Target(
        engine=Engine.PODMAN,
        id=container_id,
        name=str(document.get("Name", "")),
        runtime=state.runtime,
        runtime_args=state.args,
        bundle=state.bundle,
        rootfs=state.rootfs,
        pid=state.pid,
        status=state.status,
        spec=load_spec(state.bundle),
        image=image,
        image_digest=f"sha256:{digest}" if digest and ":" not in digest else digest,
        engine_files={"inspect.json": json.dumps(document).encode()},
    )


def stop(target: Target) -> None:
    """End a container at once, through podman, so that its restart policy does not start it again."""
    run([*command(), "stop", "-t", "0", target.id], timeout_s=60, code=Code.ENGINE_FAILED)


def source_of_bundle(bundle: Path, container_id: str) -> tuple[str, str] | None:
    """Image name and id of the container whose bundle is GRAPHROOT/DRIVER-containers/ID/userdata; None for other bundles."""
    if bundle.name != "userdata" or not bundle.parent.parent.name.endswith("-containers"):
        return None
    containers = bundle.parent.parent
    driver = containers.name.removesuffix("-containers")
    for entry in _entries(containers / "containers.json", containers / "volatile-containers.json"):
        if entry.get("id") == container_id:
            image = str(entry.get("image") or "")
            return (
                (_image_name(containers.parent / f"{driver}-images" / "images.json", image), f"sha256:{image}") if image else None
            )
    return None


def _image_name(images: Path, image_id: str) -> str:
    for entry in _entries(images):
        if entry.get("id") == image_id:
            return str(next(iter(as_list(entry.get("names"), "names")), image_id))
    return image_id


def _entries(*files: Path) -> Iterator[dict[str, object]]:
    for file in files:
        try:
            yield from (as_object(entry, str(file)) for entry in as_list(json.loads(file.read_bytes()), str(file)))
        except OSError:
            continue
