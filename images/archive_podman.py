"""Checkpoint archives of the shape that podman gave them; CRI-O and containerd's CRI write it too.

    checkpoint/             CRIU's images, and the runtime's descriptors.json
    config.dump             what the engine keeps about the container: names, image, runtime
    spec.dump               the OCI spec
    rootfs-diff.tar         new and changed files; containerd writes an OCI layer with whiteouts here, maybe compressed
    deleted.files           JSON array of paths that were removed (podman, CRI-O)
    devshm-checkpoint.tar   /dev/shm (podman)
    network.status, bind.mounts, status.dump, status, stats-dump, volumes/NAME.tar, ctr.log and other logs

Facts: podman pkg/checkpoint/crutils and libpod/container_internal_common.go (4.3 to 5.8), CRI-O internal/lib/checkpoint.go,
containerd internal/cri/server/container_checkpoint_linux.go (2.1). podman lists a directory that was removed and made again under
deleted.files, and its new content in the tar; its own restore then deletes that content. Here it becomes a whiteout before the
content.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from smr.images.archive_facts import Facts, addresses_of, annotation, make_config
from smr.images.archive_stage import read_document
from smr.images.criu_layers import add_criu_layers
from smr.images.ingest import Ingest
from smr.images.transcode import transcode_layer, transcode_tree
from smr.proto.checkpoint import MOUNT_ANNOTATION, CheckpointConfig, LayerType, Source
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Json, as_list, as_object

CHECKPOINT = "checkpoint"
CONFIG = "config.dump"
SPEC = "spec.dump"
ROOTFS = "rootfs-diff.tar"
DELETED = "deleted.files"
SHM = "devshm-checkpoint.tar"
NETWORK = "network.status"
# Files that are kept as they are, to be given back on export.
KEPT = (CONFIG, SPEC, NETWORK, "bind.mounts", "status.dump", "status", "ctr.log", "io.kubernetes.cri-o.LogPath", "container.log")


_IMAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,98}")


def is_podman_shape(staged: Path) -> bool:
    """Whether a staged archive looks like one of these."""
    return (staged / CONFIG).is_file() or (staged / CHECKPOINT).is_dir()


def add_podman(staged: Path, ingest: Ingest, annotations: Mapping[str, str] | None = None) -> CheckpointConfig:
    """Hand the files of a staged archive to `ingest` as layers; the config to commit them with.

    `annotations` are those of the OCI image that the archive came in, if it did. Raises ARCHIVE_INVALID, ARCHIVE_UNSAFE,
    UNSUPPORTED.
    """
    document = _object(staged, CONFIG)
    spec = _object(staged, SPEC)
    facts = _facts(staged, document, spec, annotations or {})
    config = make_config(facts, staged / CHECKPOINT)
    add_criu(staged / CHECKPOINT, ingest)
    _add_rootfs(staged, ingest, whiteouts=facts.source.engine == "containerd")
    _add_shm(staged, ingest)
    _add_kept(staged, ingest)
    return config


def add_criu(checkpoint: Path, ingest: Ingest) -> None:
    """Add CRIU's images, the bulk of the pages as segments."""
    if any(not path.is_file() or not _IMAGE_NAME.fullmatch(path.name) for path in checkpoint.iterdir()):
        raise SmrError(
            "the archive's CRIU images are not plain files in one directory, named as CRIU names them", code=Code.ARCHIVE_INVALID
        )
    add_criu_layers(checkpoint, ingest)


def _facts(staged: Path, document: Json, spec: Json, annotations: Mapping[str, str]) -> Facts:
    source = Source(
        engine=_engine(staged, document, annotations),
        container_id=_text(document, "id"),
        container_name=_text(document, "name") or annotation(annotations, "name"),
        image=_text(document, "rootfsImageName", "rootfsImage") or annotation(annotations, "rootfsImageName"),
        image_digest=_digest(_text(document, "rootfsImageID", "rootfsImageRef")),
        rootfs=_text(document, "rootfs"),
    )
    return Facts(
        source=source,
        spec=spec,
        created=_text(document, "checkpointedTime"),
        addresses=_addresses(staged),
        runtime=_text(document, "runtime"),
        annotations=annotations,
    )


def _engine(staged: Path, document: Json, annotations: Mapping[str, str]) -> str:
    named = annotation(annotations, "engine.name")
    if named:
        return named
    if (staged / "status.dump").exists() or (staged / "status").exists():
        return "containerd"
    return "podman" if "lockID" in document or "staticDir" in document else "cri-o"


def _digest(image: str) -> str:
    """An image's id as a digest: bare hexadecimal digits, sha256:HEX, or NAME@sha256:HEX."""
    if len(image) == 64 and not image.strip("0123456789abcdef"):
        return f"sha256:{image}"
    tail = image.rpartition("@")[2]
    return tail if tail.startswith("sha256:") else ""


def _addresses(staged: Path) -> tuple[str, ...]:
    try:
        return addresses_of(read_document(staged / NETWORK))
    except SmrError as error:
        raise SmrError(f"{NETWORK} of the archive: {error.message}", code=Code.ARCHIVE_INVALID) from error


def _add_rootfs(staged: Path, ingest: Ingest, *, whiteouts: bool) -> None:
    changed = staged / ROOTFS
    deleted = [str(path) for path in _array(staged, DELETED)]
    if not changed.exists() and not deleted:
        return
    out = ingest.path / "rootfs.tar"
    transcode_layer(changed if changed.exists() else None, out, deleted=deleted, whiteouts=whiteouts)
    ingest.add(out, LayerType.ROOTFS)
    changed.unlink(missing_ok=True)


def _add_shm(staged: Path, ingest: Ingest) -> None:
    if (staged / SHM).exists():
        transcode_tree(staged / SHM, ingest.path / "shm.tar")
        ingest.add(ingest.path / "shm.tar", LayerType.TMPFS, annotations={MOUNT_ANNOTATION: "/dev/shm"})


def _add_kept(staged: Path, ingest: Ingest) -> None:
    volumes = staged / "volumes"
    names = [f"volumes/{path.name}" for path in sorted(volumes.iterdir()) if path.is_file()] if volumes.is_dir() else []
    for name in (*KEPT, *names):
        if (staged / name).is_file():
            ingest.add(staged / name, LayerType.ENGINE, title=name)


def _object(staged: Path, name: str) -> Json:
    document = read_document(staged / name)
    if document is None:
        raise SmrError(
            f"the archive has no {name}: it is no checkpoint of podman, CRI-O or containerd", code=Code.ARCHIVE_INVALID
        )
    try:
        return as_object(document, name)
    except SmrError as error:
        raise SmrError(f"{name} of the archive: {error.message}", code=Code.ARCHIVE_INVALID) from error


def _array(staged: Path, name: str) -> list[object]:
    try:
        return list(as_list(read_document(staged / name), name))
    except SmrError as error:
        raise SmrError(f"{name} of the archive: {error.message}", code=Code.ARCHIVE_INVALID) from error


def _text(document: Json, *keys: str) -> str:
    return next((str(document[key]) for key in keys if document.get(key)), "")
