"""The manifest of a checkpoint image: an OCI image manifest with our artifactType, a config, and layers by media type.

    {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "artifactType": ARTIFACT_TYPE,
     "config": {"mediaType": CONFIG_TYPE, "digest": "sha256:..", "size": N},
     "layers": [{"mediaType": LayerType, "digest": .., "size": .., "annotations": {TITLE_ANNOTATION: ..}}, ..],
     "annotations": {CREATED_ANNOTATION: .., and those of `checkpoint_annotations`}}

A parsed manifest is safe to use: digests are whole digests, a PAGES title is a name that CRIU gives, there is one CRIU layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from smr.images.blobs import is_digest
from smr.proto.checkpoint import ARTIFACT_TYPE, CONFIG_TYPE, TITLE_ANNOTATION, LayerType
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Json, as_list, as_object

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
CREATED_ANNOTATION = "org.opencontainers.image.created"
_ARTIFACT_FAMILY = ARTIFACT_TYPE.rpartition(".")[0] + "."
_PAGES_TITLE = re.compile(r"pages-[0-9]+\.img")


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """What an OCI document says of a blob."""

    media_type: str
    digest: str
    size_bytes: int
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The file name the blob stands for; empty when it has none."""
        return self.annotations.get(TITLE_ANNOTATION, "")

    def as_json(self) -> Json:
        """The descriptor as OCI writes it."""
        document: Json = {"mediaType": self.media_type, "digest": self.digest, "size": self.size_bytes}
        return document | ({"annotations": dict(self.annotations)} if self.annotations else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A checkpoint's manifest."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str]

    def to_json(self) -> bytes:
        """Canonical JSON; its digest is the image's."""
        document: Json = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": ARTIFACT_TYPE,
            "config": self.config.as_json(),
            "layers": [layer.as_json() for layer in self.layers],
            "annotations": dict(self.annotations),
        }
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def parse_descriptor(value: object, what: str) -> Descriptor:
    """Read one descriptor. Raises ValueError, or SPEC_INVALID, when it is none."""
    document = as_object(value, what)
    digest, size = document.get("digest"), document.get("size")
    if not isinstance(digest, str) or not is_digest(digest):
        raise ValueError(f"{what}: found digest {digest!r}, needed sha256 and 64 hexadecimal digits")
    if not isinstance(size, int) or size < 0:
        raise ValueError(f"{what}: found size {size!r}, needed a count of bytes")
    annotations = {key: str(value) for key, value in as_object(document.get("annotations"), what).items()}
    return Descriptor(media_type=str(document.get("mediaType", "")), digest=digest, size_bytes=size, annotations=annotations)


def parse_manifest(data: bytes, reference: str) -> Manifest:
    """Read and check a manifest. IMAGE_VERSION for a newer format, UNSUPPORTED for no checkpoint, else IMAGE_CORRUPT."""
    try:
        document = as_object(json.loads(data), "manifest")
        _check_artifact(document, reference)
        manifest = _parse(document)
    except (ValueError, SmrError) as error:
        if isinstance(error, SmrError) and error.code is not Code.SPEC_INVALID:
            raise
        raise SmrError(f"manifest of {reference} cannot be read: {error}", code=Code.IMAGE_CORRUPT, image=reference) from error
    check_layers(manifest.layers, reference)
    return manifest


def check_layers(layers: tuple[Descriptor, ...], reference: str) -> None:
    """Hold the invariants of a checkpoint's layers. IMAGE_VERSION for an unknown type, else ARCHIVE_INVALID."""
    known = {kind.value for kind in LayerType}
    for layer in layers:
        if layer.media_type not in known:
            raise _newer(reference, f"a layer of type {layer.media_type}")
    count = sum(layer.media_type == LayerType.CRIU for layer in layers)
    if count != 1:
        raise _invalid(reference, f"found {count} layers of CRIU's images, needed one")
    titles = [layer.title for layer in layers if layer.media_type == LayerType.PAGES]
    if bad := next((title for title in titles if not _PAGES_TITLE.fullmatch(title)), None):
        raise _invalid(reference, f"found pages named {bad!r}, needed pages-N.img")
    tables = sum(layer.media_type == LayerType.PAGETABLE for layer in layers)
    segments = sum(layer.media_type == LayerType.SEGMENT for layer in layers)
    if tables != min(segments, 1):
        raise _invalid(
            reference, f"found {segments} segments and {tables} page tables, needed one table where there are segments"
        )
    if len(set(titles)) != len(titles) or "" in titles:
        raise _invalid(reference, "found pages without a name of their own, needed pages-N.img once each")


def descriptors_in(data: bytes) -> Iterator[Descriptor]:
    """Every descriptor in any OCI manifest or index, ours or not. Raises ValueError or SPEC_INVALID when it is neither."""
    document = as_object(json.loads(data), "manifest")
    if "config" in document:
        yield parse_descriptor(document["config"], "config")
    for key in ("layers", "manifests"):
        for value in as_list(document.get(key), key):
            yield parse_descriptor(value, f"{key}[]")


def _parse(document: Json) -> Manifest:
    config = parse_descriptor(document.get("config"), "config")
    if config.media_type != CONFIG_TYPE:
        raise ValueError(f"found a config of type {config.media_type}, needed {CONFIG_TYPE}")
    layers = as_list(document.get("layers"), "layers")
    return Manifest(
        config=config,
        layers=tuple(parse_descriptor(layer, f"layers[{number}]") for number, layer in enumerate(layers)),
        annotations={key: str(value) for key, value in as_object(document.get("annotations"), "annotations").items()},
    )


def _check_artifact(document: Json, reference: str) -> None:
    found = str(document.get("artifactType", ""))
    if found == ARTIFACT_TYPE:
        return
    if found.startswith(_ARTIFACT_FAMILY):
        raise _newer(reference, f"artifact type {found}")
    raise SmrError(
        f"{reference} is not a checkpoint: found artifact type '{found}', needed {ARTIFACT_TYPE}",
        hint="'smr import' takes checkpoint archives of podman, CRI-O and containerd",
        code=Code.UNSUPPORTED,
        image=reference,
    )


def _newer(reference: str, what: str) -> SmrError:
    return SmrError(
        f"{reference} has {what}, this SMR reads {ARTIFACT_TYPE}",
        hint="install a newer SMR on this node",
        code=Code.IMAGE_VERSION,
        image=reference,
    )


def _invalid(reference: str, what: str) -> SmrError:
    return SmrError(f"{reference} is not a valid checkpoint: {what}", code=Code.ARCHIVE_INVALID, image=reference)
