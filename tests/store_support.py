"""Small checkpoint images for tests of the store: real in form, with bytes of our own in place of CRIU's."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from smr.images.criutar import pack_criu
from smr.images.image import Image
from smr.images.ingest import Ingest
from smr.images.store import Store
from smr.proto.checkpoint import MOUNT_ANNOTATION, CheckpointConfig, Host, LayerType, Source, Task

CRIU_FILES: Mapping[str, bytes] = {
    "inventory.img": b"inventory",
    "core-1.img": b"core" * 999,
    "descriptors.json": b'["/dev/null"]',
}
PAGES: Mapping[str, bytes] = {"pages-1.img": b"one" * 5000, "pages-2.img": b"two" * 3000}


def make_config(created: str = "2025-03-01T10:00:00.000+00:00") -> CheckpointConfig:
    """The config of a container of podman."""
    return CheckpointConfig(
        created=created,
        host=Host(architecture="x86_64", kernel="6.8.1", criu="4.1.1", runtime="runc version 1.1.5", cgroup="v2"),
        source=Source(engine="podman", container_id="f" * 64, container_name="llama", image="docker.io/library/llama:1"),
        spec={"process": {"args": ["serve"]}},
        tasks=(Task(pid=1, ppid=0, command="serve"),),
    )


def fill(ingest: Ingest, *, pages: Mapping[str, bytes] = PAGES, criu: Mapping[str, bytes] = CRIU_FILES) -> None:
    """Add the layers of a checkpoint: pages, CRIU's files, a root difference and a /dev/shm."""
    folder = ingest.path / "criu"
    folder.mkdir()
    for name, data in {**criu, **pages}.items():
        (folder / name).write_bytes(data)
    for name in pages:
        ingest.add(folder / name, LayerType.PAGES, title=name)
    pack_criu(folder, ingest.path / "criu.tar")
    ingest.add(ingest.path / "criu.tar", LayerType.CRIU)
    (ingest.path / "rootfs.tar").write_bytes(b"rootfs")
    ingest.add(ingest.path / "rootfs.tar", LayerType.ROOTFS)
    (ingest.path / "shm.tar").write_bytes(b"shm")
    ingest.add(ingest.path / "shm.tar", LayerType.TMPFS, annotations={MOUNT_ANNOTATION: "/dev/shm"})


def commit(
    store: Store,
    name: str,
    *,
    pages: Mapping[str, bytes] = PAGES,
    criu: Mapping[str, bytes] = CRIU_FILES,
    config: CheckpointConfig | None = None,
    replace: bool = True,
) -> Image:
    """Make an image."""
    with store.ingest() as ingest:
        fill(ingest, pages=pages, criu=criu)
        return ingest.commit(name, config or make_config(), replace=replace)


def files_of(store: Store) -> set[str]:
    """Every file of the store but its lock, by path in it; also the directories of ingests."""
    found = {
        str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file() or path.parent.name == "ingest"
    }
    return found - {"lock"}


def files_needed(store: Store) -> set[str]:
    """What the images of the store need, and no more."""
    blobs = {f"blobs/sha256/{d.digest[7:]}" for image in store.images() for _, d in image.contents()}
    return blobs | {"oci-layout", "index.json"}


def rewrite_blob(path: Path, data: bytes) -> None:
    """Change a blob behind the store's back, read-only as it is."""
    path.unlink()
    path.write_bytes(data)
    path.chmod(0o444)


def is_digest_of(path: Path) -> bool:
    """Whether a blob's name is the digest of its content."""
    return hashlib.sha256(path.read_bytes()).hexdigest() == os.fspath(path.name)
