"""What a root that is no overlay was made from, and when its container was created: asked of the engine that made it.

podman (containers/storage): GRAPHROOT/vfs/dir/LAYER and GRAPHROOT/btrfs/subvolumes/LAYER are roots, and so are their parents'
beside them; GRAPHROOT/DRIVER-layers/layers.json has the parents, GRAPHROOT/DRIVER-containers/*.json when a container was made,
which is after its layer was. containerd: `ctr` names the parent of a snapshot, and the directory of it by the mounts of a view,
which the native snapshotter makes without a copy. Answers are None and 0 where there is none: then less can be known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from smr.proto.errors import SmrError
from smr.proto.oci import as_list, as_object
from smr.shim import state
from smr.shim.config import Config
from smr.shim.engines import containerd
from smr.shim.engines.target import Engine, Target
from smr.shim.run import run

# Below GRAPHROOT: the folder that holds the layers' roots, by driver.
_DRIVERS = {"vfs": "vfs/dir", "btrfs": "btrfs/subvolumes"}


def base_of(target: Target) -> Path | None:
    """The directory that the root was copied or snapshotted from."""
    try:
        return _podman_parent(target.rootfs) or (_containerd_parent(target) if target.engine is Engine.CONTAINERD else None)
    except (SmrError, OSError, ValueError, KeyError):
        return None


def created_ns(target: Target, config: Config) -> int:
    """A time before which the container cannot have changed its root, in nanoseconds since the epoch; 0 where nobody knows.

    The earliest of: the engine's creation of the container, the runtime's, and SMR's own restore, which changes files before
    the runtime knows of the container.
    """
    found = []
    for ask in (_podman_created, _containerd_created, _runtime_created):
        with suppress(SmrError, OSError, ValueError, KeyError):
            found += [_ns(text) for text in ask(target)]
    record = state.find(config.run, target.runtime_args[1] if target.runtime_args else "", target.id)
    if record is not None and record.record.started:
        found.append(_ns(record.record.started))
    return min(found, default=0)


def _ns(text: str) -> int:
    """RFC 3339 with up to nine digits of a second."""
    moment = datetime.fromisoformat(text)
    fraction = text.partition(".")[2]
    digits = fraction[: len(fraction) - len(fraction.lstrip("0123456789"))][:9]
    return int(moment.replace(microsecond=0).timestamp()) * 10**9 + int(digits.ljust(9, "0") or 0)


def _podman_parent(rootfs: Path) -> Path | None:
    graph = _graph(rootfs)
    if graph is None:
        return None
    root, driver = graph
    for layer in _entries(root / f"{driver}-layers" / "layers.json", root / f"{driver}-layers" / "volatile-layers.json"):
        if layer.get("id") == rootfs.name:
            parent = rootfs.with_name(str(layer.get("parent") or ""))
            return parent if parent != rootfs.parent and parent.is_dir() else None
    return None


def _graph(rootfs: Path) -> tuple[Path, str] | None:
    """GRAPHROOT and driver of a root of containers/storage."""
    for driver, folder in _DRIVERS.items():
        if rootfs.parent.match(f"*/{folder}"):
            return rootfs.parents[2], driver
    return None


def _podman_created(target: Target) -> Iterator[str]:
    folders = target.bundle.parents[1:2] if target.bundle.name == "userdata" else ()
    for folder in folders:
        for entry in _entries(folder / "containers.json", folder / "volatile-containers.json"):
            if entry.get("id") == target.id:
                yield str(entry["created"])


def _entries(*files: Path) -> Iterator[dict[str, object]]:
    for file in files:
        with suppress(FileNotFoundError):
            yield from (as_object(entry, str(file)) for entry in as_list(json.loads(file.read_bytes()), str(file)))


def _containerd_created(target: Target) -> Iterator[str]:
    if target.engine is Engine.CONTAINERD:
        yield str(containerd.info(target.namespace, target.id)["CreatedAt"])


def _containerd_parent(target: Target) -> Path | None:
    found = containerd.info(target.namespace, target.id)
    snapshotter, key = str(found.get("Snapshotter") or ""), str(found.get("SnapshotKey") or "")
    if snapshotter != "native" or not key:
        return None
    said = containerd.snapshots(target.namespace, snapshotter, "info", key)
    parent = str(as_object(json.loads(said), "ctr snapshots info").get("Parent") or "")
    return _directory_of(target, snapshotter, parent) if parent else None


def _directory_of(target: Target, snapshotter: str, snapshot: str) -> Path | None:
    """The directory of a committed snapshot: a view is made, asked for its mounts, and removed."""
    view = f"smr-base-{target.id}"

    def ask(*words: str, check: bool = True) -> str:
        return containerd.snapshots(target.namespace, snapshotter, *words, check=check)

    ask("rm", view, check=False)  # of a process that was killed in between
    ask("view", view, snapshot)
    try:
        words = ask("mounts", "/nowhere", view).split()
    finally:
        ask("rm", view, check=False)
    # mount -t bind SOURCE /nowhere -o ro,rbind
    source = Path(words[words.index("/nowhere") - 1])
    return source if words[words.index("-t") + 1] == "bind" and source.is_dir() else None


def _runtime_created(target: Target) -> Iterator[str]:
    document = json.loads(run(target.runtime_command("state", target.id), timeout_s=20).stdout)
    yield str(document["created"])
