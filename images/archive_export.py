"""An image as podman's archive, or as an OCI archive. `archive_podman` describes the former.

What podman's shape cannot say is returned as notes: an opaque directory (podman applies the tar first and deletes afterwards, so
what the source image has there stays visible), and the content of a tmpfs other than /dev/shm.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from smr.images.archive_libpod import config_dump, own_config, spec_dump
from smr.images.archive_output import compression_for, output_tar
from smr.images.archive_podman import CHECKPOINT, CONFIG, DELETED, KEPT, ROOTFS, SHM, SPEC
from smr.images.criu_layers import whole_directory
from smr.images.image import Image, Layer
from smr.images.manifest import INDEX_TYPE, MANIFEST_TYPE
from smr.images.pack import OPAQUE, WHITEOUT
from smr.images.tar import Entry, Kind, TarWriter
from smr.images.tar_reader import FileStream, TarReader
from smr.images.tarsafe import names, safe_parts
from smr.proto.checkpoint import ARTIFACT_TYPE, MOUNT_ANNOTATION, LayerType

_SHM_MOUNT = "/dev/shm"
_INVENTORY, _FILES = "inventory.img", "files.img"
_SMALL_LIMIT_BYTES = 64 << 20


def write_oci(image: Image, out: Path) -> tuple[str, ...]:
    """Write the image as an OCI archive, uncompressed: its blobs hold what is compressed already, or memory."""
    annotations = (
        {"org.opencontainers.image.ref.name": image.tag, "io.containerd.image.name": image.reference} if image.name else {}
    )
    index = {
        "schemaVersion": 2,
        "mediaType": INDEX_TYPE,
        "manifests": [
            {
                "mediaType": MANIFEST_TYPE,
                "artifactType": ARTIFACT_TYPE,
                "digest": image.digest,
                "size": image.manifest_size_bytes,
                "annotations": annotations,
            }
        ],
    }
    blobs = {descriptor.digest for _, descriptor in image.contents()}
    with output_tar(out, "") as writer:
        _document(writer, "oci-layout", {"imageLayoutVersion": "1.0.0"})
        _document(writer, "index.json", index)
        for digest in sorted(blobs):
            _file(writer, f"blobs/{digest.replace(':', '/')}", image.blob(digest))
    return ()


def write_podman(image: Image, out: Path) -> tuple[str, ...]:
    """Write the image in podman's shape; returns notes on what it cannot carry."""
    notes: list[str] = []
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch, output_tar(out, compression_for(out)) as writer:
        kept = {layer.title: layer for layer in image.layers_of(LayerType.ENGINE)}
        _documents(image, writer, kept)
        notes += _checkpoint(image, writer, Path(scratch))
        notes += _rootfs(image, writer, Path(scratch))
        notes += _tmpfs(image, writer)
        for title, layer in kept.items():
            if title.startswith("volumes/") or (title in KEPT and title not in (CONFIG, SPEC)):
                _file(writer, title, layer.path)
    return tuple(notes)


def _documents(image: Image, writer: TarWriter, kept: dict[str, Layer]) -> None:
    """config.dump and spec.dump: podman's own where it made the image, else such as podman would have written."""
    own = image.config.source.engine == "podman" and CONFIG in kept and SPEC in kept
    if own:
        _bytes(writer, CONFIG, own_config(image, kept[CONFIG]))
        _file(writer, SPEC, kept[SPEC].path)
        return
    spec = spec_dump(image.config.spec)
    _document(writer, CONFIG, config_dump(image, spec, kept.get("inspect.json")))
    _document(writer, SPEC, spec)


def _checkpoint(image: Image, writer: TarWriter, scratch: Path) -> Iterator[str]:
    """CRIU's files.

    podman restores without --tcp-close, which CRIU refuses for a dump that had it: where no connection was open the inventory
    can say that it had not.
    """
    from smr.images.criu_files import dumped_with_tcp_close, has_connections, without_tcp_close

    small = {name: data for layer in image.layers_of(LayerType.CRIU) for name, data in _small(layer, _INVENTORY, _FILES)}
    inventory = small.get(_INVENTORY, b"")
    if inventory and dumped_with_tcp_close(inventory):
        if has_connections(small.get(_FILES, b"")):
            yield "TCP connections were open at the checkpoint: podman cannot restore the archive, smr import can use it"
        else:
            inventory = without_tcp_close(inventory)
    writer.add(Entry(name=f"{CHECKPOINT}/", kind=Kind.DIRECTORY, mode=0o700))
    with whole_directory(image, scratch) as folder:
        for path in sorted(Path(folder).iterdir()):
            if path.name == _INVENTORY:
                _bytes(writer, f"{CHECKPOINT}/{path.name}", inventory)
            else:
                _file(writer, f"{CHECKPOINT}/{path.name}", path)


def _small(layer: Layer, *wanted: str) -> Iterator[tuple[str, bytes]]:
    """Some members of CRIU's tar, whole."""
    with _reading(layer.path) as reader:
        for entry in reader:
            if entry.name in wanted:
                yield entry.name, reader.read(entry, _SMALL_LIMIT_BYTES)


def _rootfs(image: Image, writer: TarWriter, scratch: Path) -> Iterator[str]:
    """The layers' changes and deletions; yields a note for each opaque directory."""
    layers = image.layers_of(LayerType.ROOTFS)
    deleted: list[str] = []
    written: set[str] = set()
    fd = os.open(scratch / ROOTFS, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with TarWriter(fd) as changes:
            for layer in layers:
                with _reading(layer.path) as reader:
                    yield from _changes(reader, changes, deleted, written)
    finally:
        os.close(fd)
    # podman deletes after it has unpacked: what was removed and made again must not be on that list
    present = {parent for name in written for parent in _with_parents(name)}
    deleted = [path for path in deleted if path not in present]
    if written:
        _file(writer, ROOTFS, scratch / ROOTFS)
    if deleted:
        _document(writer, DELETED, deleted)


def _with_parents(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition("/")[0]


def _changes(reader: TarReader, changes: TarWriter, deleted: list[str], written: set[str]) -> Iterator[str]:
    for entry in reader:
        parts = safe_parts(entry.name)
        if not parts:
            changes.add(entry)  # the root's own mode, which CRIU compares
        elif parts[-1] == OPAQUE:
            yield f"{names(parts[:-1])} was emptied and filled again: what the image has there will be visible"
        elif parts[-1].startswith(WHITEOUT):
            deleted.append(names((*parts[:-1], parts[-1].removeprefix(WHITEOUT))))
        elif entry.kind in (Kind.CHAR, Kind.BLOCK):
            yield f"{names(parts)} is a device node, and left out"
        elif entry.kind is not Kind.SOCKET:  # CRIU makes those that are bound
            written.add(names(parts))
            if entry.kind is Kind.FILE:
                changes.add_stored(entry, reader.read_some)
            else:
                changes.add(entry)


def _tmpfs(image: Image, writer: TarWriter) -> Iterator[str]:
    for layer in image.layers_of(LayerType.TMPFS):
        if layer.annotations.get(MOUNT_ANNOTATION) == _SHM_MOUNT:
            _file(writer, SHM, layer.path)
        else:
            yield f"the content of {layer.annotations.get(MOUNT_ANNOTATION)} is left out"


def _document(writer: TarWriter, name: str, value: object) -> None:
    _bytes(writer, name, json.dumps(value, indent=2).encode())


def _bytes(writer: TarWriter, name: str, data: bytes) -> None:
    writer.add_bytes(_plain(name, len(data)), data)


def _file(writer: TarWriter, name: str, path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        writer.add(_plain(name, os.fstat(fd).st_size), fd)
    finally:
        os.close(fd)


def _plain(name: str, size: int) -> Entry:
    return Entry(name=name, kind=Kind.FILE, mode=stat.S_IRUSR | stat.S_IWUSR, size=size)


@contextmanager
def _reading(path: Path) -> Iterator[TarReader]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield TarReader(FileStream(fd), what=path.name)
    finally:
        os.close(fd)
