"""OCI archives (a tar of an OCI image layout): images of ours, containerd's checkpoints, and podman's checkpoint images.

    ours         a manifest whose artifactType is ours: layers are taken over as they are
    containerd   an index (`ctr containers checkpoint` or `ctr tasks checkpoint`, then `ctr images export`) that names CRIU's tar,
                 the spec (a protobuf Any holding JSON) and the writable layer by media type
    podman       (and buildah) an image with one layer, which holds an archive as in `smr.images.archive_podman`; its annotations
                 say that it is a checkpoint

Blobs are checked against their digests. Media types: containerd core/images/mediatypes.go; index annotations:
client/container.go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from smr.images.archive_facts import Facts, make_config, wire_fields
from smr.images.archive_podman import add_criu, add_podman, is_podman_shape
from smr.images.archive_stage import read_document, stage
from smr.images.blobs import digest_file
from smr.images.checkpoint_annotations import CRIO, CRIU, PODMAN
from smr.images.ingest import Ingest
from smr.images.manifest import INDEX_TYPE, MANIFEST_TYPE, Descriptor, parse_descriptor, parse_manifest
from smr.images.transcode import transcode_layer
from smr.proto.checkpoint import ARTIFACT_TYPE, TITLE_ANNOTATION, CheckpointConfig, LayerType, Source, parse_config
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Json, as_list, as_object

_CTD = "application/vnd.containerd.container."
_CTD_CRIU = _CTD + "criu.checkpoint.criu.tar"
_CTD_SPEC = _CTD + "checkpoint.config.v1+proto"
_LAYERS = ("application/vnd.oci.image.layer.v1.tar", "application/vnd.docker.image.rootfs.diff.tar")
_INDEXES = (INDEX_TYPE, "application/vnd.docker.distribution.manifest.list.v2+json")
_IMAGES = (MANIFEST_TYPE, "application/vnd.docker.distribution.manifest.v2+json")
_MAX_NESTED = 8


@dataclass(frozen=True, slots=True)
class _Layout:
    """A staged layout."""

    root: Path

    def path(self, descriptor: Descriptor) -> Path:
        """Where a blob is, unchecked. ARCHIVE_INVALID when it is missing."""
        path = self.root / "blobs" / "sha256" / descriptor.digest.removeprefix("sha256:")
        if not path.is_file():
            raise SmrError(f"the archive lacks its blob {descriptor.digest}", code=Code.ARCHIVE_INVALID)
        return path

    def blob(self, descriptor: Descriptor) -> Path:
        """A blob, its digest checked. ARCHIVE_INVALID when it is missing or altered."""
        path = self.path(descriptor)
        if (found := digest_file(path)) != descriptor.digest:
            raise SmrError(
                f"a blob of the archive is altered: found {found}, needed {descriptor.digest}", code=Code.ARCHIVE_INVALID
            )
        return path

    def document(self, descriptor: Descriptor) -> Json:
        """A blob that is a JSON object."""
        return _object(read_document(self.blob(descriptor)), descriptor.digest[:19])


def is_oci_layout(staged: Path) -> bool:
    """Whether a staged archive is one."""
    return (staged / "oci-layout").is_file() and (staged / "index.json").is_file()


def add_oci(staged: Path, ingest: Ingest) -> CheckpointConfig:
    """Hand the one checkpoint of a staged OCI layout to `ingest`; the config to commit it with.

    Raises ARCHIVE_INVALID, ARCHIVE_UNSAFE, UNSUPPORTED (no checkpoint, or several).
    """
    layout = _Layout(staged)
    index = _object(read_document(staged / "index.json"), "index.json")
    found = list(_checkpoints(layout, index, depth=0))
    if len(found) != 1:
        raise SmrError(
            f"the OCI archive holds {len(found)} checkpoints: needed one",
            hint="export one checkpoint image; 'ctr images ls' shows which are checkpoints" if not found else "",
            code=Code.UNSUPPORTED,
        )
    document = found[0]
    if document.get("artifactType") == ARTIFACT_TYPE:
        return _add_ours(layout, document, ingest)
    if "manifests" in document:
        return _add_containerd(layout, document, ingest)
    return _add_image(layout, document, ingest)


def _checkpoints(layout: _Layout, index: Json, *, depth: int) -> list[Json]:
    """The documents (manifests, or containerd's indexes) under an index that are checkpoints."""
    found: list[Json] = []
    descriptors = _descriptors(index, "manifests")
    if any(descriptor.media_type == _CTD_CRIU for descriptor in descriptors):
        return [index]
    for descriptor in descriptors:
        if descriptor.media_type in _INDEXES and depth < _MAX_NESTED:
            found += _checkpoints(layout, layout.document(descriptor), depth=depth + 1)
        elif descriptor.media_type in _IMAGES:
            document = layout.document(descriptor)
            if document.get("artifactType") == ARTIFACT_TYPE or _is_checkpoint_image(document):
                found.append(document)
    return found


def _is_checkpoint_image(document: Json) -> bool:
    return any(key.startswith((PODMAN, CRIO, CRIU)) for key in _annotations(document))


def _add_ours(layout: _Layout, document: Json, ingest: Ingest) -> CheckpointConfig:
    import json

    manifest = parse_manifest(json.dumps(document).encode(), "the archive's image")
    config = parse_config(layout.blob(manifest.config).read_bytes())
    for layer in manifest.layers:
        annotations = {key: value for key, value in layer.annotations.items() if key != TITLE_ANNOTATION}
        kind = LayerType(layer.media_type)
        ingest.add(layout.path(layer), kind, title=layer.title, annotations=annotations, expected=layer.digest)
    return config


def _add_containerd(layout: _Layout, index: Json, ingest: Ingest) -> CheckpointConfig:
    parts = {descriptor.media_type: descriptor for descriptor in _descriptors(index, "manifests")}
    if _CTD_SPEC not in parts:
        raise SmrError(
            "the containerd checkpoint has no spec: it was made with an image path, or is incomplete", code=Code.ARCHIVE_INVALID
        )
    checkpoint = ingest.path / "criu"
    checkpoint.mkdir()
    stage(layout.blob(parts[_CTD_CRIU]), checkpoint)
    layout.blob(parts[_CTD_CRIU]).unlink()
    config = make_config(_containerd_facts(layout, index, parts), checkpoint)
    add_criu(checkpoint, ingest)
    rw = next((parts[kind] for kind in parts if kind.startswith(_LAYERS)), None)
    if rw is not None:
        transcode_layer(layout.blob(rw), ingest.path / "rootfs.tar", whiteouts=True)
        ingest.add(ingest.path / "rootfs.tar", LayerType.ROOTFS)
    return config


def _containerd_facts(layout: _Layout, index: Json, parts: Mapping[str, Descriptor]) -> Facts:
    annotations = _annotations(index)
    image = next((parts[kind] for kind in parts if kind in (*_INDEXES, *_IMAGES)), None)
    name = annotations.get("image.name") or annotations.get("org.opencontainers.image.ref.name", "")
    spec = _spec(layout.blob(parts[_CTD_SPEC]).read_bytes())
    return Facts(
        source=Source(
            engine="containerd",
            container_id=_container_id(spec),
            image=name,
            image_digest=image.digest if image else "",
        ),
        spec=spec,
        runtime=annotations.get("io.containerd.checkpoint.runtime", ""),
    )


def _spec(message: bytes) -> Json:
    """The spec in a protobuf Any: field 2 is its JSON."""
    import json

    try:
        value = next(value for number, value in wire_fields(message) if number == 2)
        return _object(json.loads(value) if isinstance(value, bytes) else None, "spec")
    except (ValueError, StopIteration, RecursionError) as error:
        raise SmrError(f"the containerd checkpoint's spec cannot be read: {error}", code=Code.ARCHIVE_INVALID) from error


def _container_id(spec: Json) -> str:
    """The last part of the cgroup's path, /NAMESPACE/ID or SLICE:PREFIX:ID; nothing else in the image names the container."""
    linux = spec.get("linux")
    path = linux.get("cgroupsPath") if isinstance(linux, dict) else ""
    return re.split("[/:]", str(path or ""))[-1]


def _add_image(layout: _Layout, document: Json, ingest: Ingest) -> CheckpointConfig:
    layers = _descriptors(document, "layers")
    unpacked = ingest.path / "image"
    unpacked.mkdir()
    if len(layers) != 1 or not layers[0].media_type.startswith(_LAYERS):
        raise SmrError(f"the checkpoint image has {len(layers)} layers: needed one, of files", code=Code.UNSUPPORTED)
    stage(layout.blob(layers[0]), unpacked)
    layout.blob(layers[0]).unlink()
    if not is_podman_shape(unpacked):
        raise SmrError("the checkpoint image holds no checkpoint archive", code=Code.ARCHIVE_INVALID)
    return add_podman(unpacked, ingest, _annotations(document))


def _descriptors(document: Json, key: str) -> list[Descriptor]:
    try:
        return [parse_descriptor(value, f"{key}[]") for value in as_list(document.get(key), key)]
    except (ValueError, SmrError) as error:
        raise SmrError(f"the OCI archive's index cannot be read: {error}", code=Code.ARCHIVE_INVALID) from error


def _annotations(document: Json) -> dict[str, str]:
    return {key: str(value) for key, value in _object(document.get("annotations"), "annotations").items()}


def _object(value: object, what: str) -> Json:
    try:
        return as_object(value, what)
    except SmrError as error:
        raise SmrError(f"the archive cannot be read: {error.message}", code=Code.ARCHIVE_INVALID) from error
