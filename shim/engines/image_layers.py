"""Which files a container's image has, whatever it is called: the OCI chain id of its layers, which no tag can move.

An image's digest names more and less than that: podman has the config's, containerd the manifest's, by a name that may have been
given to another image since. The chain id is the same under every engine and registry, and is known where an engine keeps the
digests of the unpacked layers: containers/storage in GRAPHROOT/DRIVER-layers/layers.json, containerd in the names of snapshots.
https://github.com/opencontainers/image-spec/blob/main/config.md#layer-chainid
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from smr.proto.errors import SmrError
from smr.proto.oci import as_list, as_object
from smr.shim.engines import containerd

_CHAIN = re.compile(r"sha256:[0-9a-f]{64}")


def layers_of_bundle(bundle: Path, container_id: str) -> str:
    """The chain id of the container in a bundle, "" where it cannot be known. Never raises: then there is less to compare."""
    with suppress(SmrError, OSError, ValueError, KeyError):
        return _podman(bundle, container_id) if bundle.name == "userdata" else _containerd(bundle, container_id)
    return ""


def chain_id(diff_ids: list[str]) -> str:
    """Of unpacked layers' digests, the lowest first."""
    chain = diff_ids[0]
    for diff_id in diff_ids[1:]:
        chain = f"sha256:{hashlib.sha256(f'{chain} {diff_id}'.encode()).hexdigest()}"
    return chain


def _podman(bundle: Path, container_id: str) -> str:
    containers = bundle.parent.parent
    graph, driver = containers.parent, containers.name.removesuffix("-containers")
    image = _entry(container_id, containers / "containers.json", containers / "volatile-containers.json").get("image")
    top = _entry(str(image), graph / f"{driver}-images" / "images.json").get("layer")
    layers = {str(entry["id"]): entry for entry in _entries(graph / f"{driver}-layers" / "layers.json")}
    diff_ids: list[str] = []
    while top:
        layer = layers[str(top)]
        diff_ids.insert(0, str(layer["diff-digest"]))  # KeyError: nobody has unpacked all of it
        top = layer.get("parent")
    return chain_id(diff_ids) if diff_ids else ""


def _entry(name: str, *files: Path) -> dict[str, object]:
    return next((entry for file in files for entry in _entries(file) if entry.get("id") == name), {})


def _entries(file: Path) -> Iterator[dict[str, object]]:
    with suppress(FileNotFoundError):
        yield from (as_object(entry, str(file)) for entry in as_list(json.loads(file.read_bytes()), str(file)))


def _containerd(bundle: Path, container_id: str) -> str:
    if not containerd.is_bundle(bundle):
        return ""
    namespace, socket = bundle.parent.name, containerd.socket_of(bundle)
    found = containerd.info(namespace, container_id, socket=socket)
    snapshotter, key = str(found.get("Snapshotter") or ""), str(found.get("SnapshotKey") or "")
    if not key:
        return ""
    said = containerd.snapshots(namespace, snapshotter, "info", key, socket=socket)
    parent = str(as_object(json.loads(said), "ctr snapshots info").get("Parent") or "")
    return parent if _CHAIN.fullmatch(parent) else ""
