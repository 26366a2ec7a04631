"""An image being made: a private directory of the store, which becomes an image whole or leaves nothing.

    ingest/ID/        flocked while its maker lives
      work/           `Ingest.path`, for the maker's own files: CRIU's image directory, tars
      blobs/N         what was added, moved out of the maker's reach; hashed and fsynced in threads meanwhile
      blobs/config, blobs/manifest

`commit` has all blobs durable before it takes the store's lock; under the lock it only renames them in and replaces index.json.
Whatever is killed before that last rename leaves a directory that nobody locks, or blobs that no manifest refers to: garbage,
which the next `ingest` and `gc` sweep.
"""

from __future__ import annotations

import os
import shutil
import stat
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from smr.images.blobs import digest_bytes, digest_file, mark
from smr.images.checkpoint_annotations import checkpoint_annotations
from smr.images.collect import collect
from smr.images.files import fsync_directory, try_lock, write_file, writing
from smr.images.image import Image, read_image
from smr.images.layout import Layout, new_entry
from smr.images.manifest import CREATED_ANNOTATION, MANIFEST_TYPE, Descriptor, Manifest, check_layers
from smr.images.reference import Reference, parse_name
from smr.proto.checkpoint import CONFIG_TYPE, TITLE_ANNOTATION, CheckpointConfig, LayerType
from smr.proto.errors import Code, SmrError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Added:
    """A file that was added: where it is, what it will be, and the work on it that goes on."""

    path: Path
    kind: LayerType
    size_bytes: int
    annotations: Mapping[str, str]
    digest: Future[str]
    expected: str
    synced: Future[None]

    def descriptor(self) -> Descriptor:
        """Wait for the work, and describe the blob. Raises what the work raised."""
        with writing(self.path, self.size_bytes):
            self.synced.result()
            digest = self.digest.result()
        if self.expected and digest != self.expected:
            raise SmrError(f"a layer is altered: found {digest}, needed {self.expected}", code=Code.ARCHIVE_INVALID)
        return Descriptor(media_type=self.kind, digest=digest, size_bytes=self.size_bytes, annotations=self.annotations)


class Ingest:
    """One image being made. `path` is an empty directory on the store's file system. Get one from `Store.ingest`."""

    def __init__(self, layout: Layout, directory: Path, pool: ThreadPoolExecutor) -> None:
        self.path = directory / "work"
        self._layout = layout
        self._blobs = directory / "blobs"
        self._pool = pool
        self._added: list[_Added] = []
        self._closed = threading.Event()
        with writing(directory):
            self.path.mkdir(mode=0o700)
            self._blobs.mkdir(mode=0o700)

    def add(
        self,
        file: Path,
        kind: LayerType,
        *,
        title: str = "",
        annotations: Mapping[str, str] | None = None,
        expected: str = "",
        digest: str = "",
    ) -> None:
        """Move a regular file in as a layer; from then on it is not the caller's. Layers keep the order of these calls.

        `digest` is that of a file that the caller hashed while writing it; any other is hashed here. Returns at once, unless
        the file has to be copied from another file system. When its digest turns out not to be `expected`, `commit` raises
        ARCHIVE_INVALID. Raises DISK_FULL.
        """
        self._check_open()
        size_bytes = _regular_size(file)
        path = self._blobs / str(len(self._added))
        with writing(path, size_bytes):
            shutil.move(file, path)
            path.chmod(0o444)
        self._added.append(
            _Added(
                path=path,
                kind=kind,
                size_bytes=size_bytes,
                annotations={**(annotations or {}), **({TITLE_ANNOTATION: title} if title else {})},
                digest=_known(digest) if digest else self._pool.submit(digest_file, path, self._stop_when_closed),
                expected=expected,
                synced=self._pool.submit(_fsync, path),
            )
        )

    def commit(self, name: str, config: CheckpointConfig, *, replace: bool = True) -> Image:
        """Make the image, durable and visible, under NAME[:TAG]. Afterwards the ingest is done.

        An image that loses its last name by `replace` goes, once nobody uses it. Raises IMAGE_EXISTS (without `replace`),
        DISK_FULL, ARCHIVE_INVALID (not one CRIU layer).
        """
        self._check_open()
        reference = parse_name(name)
        layers = tuple(added.descriptor() for added in self._added)
        check_layers(layers, str(reference))
        blobs = [(added.path, layer) for added, layer in zip(self._added, layers, strict=True)]
        blobs.append(self._write("config", config.to_json(), CONFIG_TYPE))
        annotations = {CREATED_ANNOTATION: config.created, **checkpoint_annotations(config)}
        manifest = Manifest(config=blobs[-1][1], layers=layers, annotations=annotations)
        blobs.append(self._write("manifest", manifest.to_json(), MANIFEST_TYPE))
        with self._layout.exclusive():
            self._publish(reference, blobs, replace=replace)
        self._closed.set()
        return read_image(self._layout.blobs, blobs[-1][1].digest, name=reference.name, tag=reference.tag)

    def close(self) -> None:
        """End the threads. What was not committed is the caller's to drop."""
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)

    def _publish(self, reference: Reference, blobs: list[tuple[Path, Descriptor]], *, replace: bool) -> None:
        """Rename the blobs in and replace the index; after a failure neither has changed. Needs the store's lock."""
        entries = self._layout.entries()
        others = [entry for entry in entries if (entry.name, entry.tag) != (reference.name, reference.tag)]
        replaced = len(others) != len(entries)
        if replaced and not replace:
            raise SmrError(
                f"image {reference} exists",
                hint=f"choose another tag, or remove it with 'smr images rm {reference}'",
                code=Code.IMAGE_EXISTS,
                image=reference,
            )
        manifest = blobs[-1][1]
        try:
            for path, descriptor in blobs:
                _place(path, self._layout.blob(descriptor.digest), descriptor.digest)
            fsync_directory(self._layout.blobs)
            self._layout.save([*others, new_entry(reference.name, reference.tag, manifest.digest, manifest.size_bytes)])
        except BaseException:
            with suppress(OSError, SmrError):
                collect(self._layout)
            raise
        if replaced:
            # The image is made; what cannot be dropped now, the next gc drops.
            with suppress(OSError, SmrError):
                collect(self._layout)

    def _write(self, name: str, data: bytes, media_type: str) -> tuple[Path, Descriptor]:
        path = self._blobs / name
        with writing(path, len(data)):
            write_file(path, data, mode=0o444)
        return path, Descriptor(media_type=media_type, digest=digest_bytes(data), size_bytes=len(data))

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise SmrError("this ingest is done: it takes no more files and no second commit", code=Code.INTERNAL)

    def _stop_when_closed(self, _bytes: int) -> None:
        if self._closed.is_set():
            raise SmrError("the ingest was given up", code=Code.INTERNAL)


@contextmanager
def open_ingest(layout: Layout) -> Iterator[Ingest]:
    """An ingest of this store, in a locked directory that goes with it, however the block ends."""
    layout.create()
    with writing(layout.ingests), _locked_directory(layout.ingests) as directory:
        ingest = Ingest(layout, directory, ThreadPoolExecutor(max_workers=_threads(), thread_name_prefix="smr-ingest"))
        try:
            yield ingest
        finally:
            ingest.close()


def sweep(layout: Layout) -> int:
    """Drop the directories of makers that died; returns how many. Those whose maker lives are locked, and stay."""
    try:
        found = list(layout.ingests.iterdir())
    except FileNotFoundError:
        return 0
    return sum(_drop_dead(directory) for directory in found)


def _drop_dead(directory: Path) -> bool:
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        if not try_lock(fd):
            return False
        shutil.rmtree(directory, ignore_errors=True)
        return True
    finally:
        os.close(fd)


@contextmanager
def _locked_directory(parent: Path) -> Iterator[Path]:
    """A new directory, flocked. A sweeper may take it between its making and its locking: then another is made."""
    while True:
        directory = Path(mkdtemp(dir=parent, prefix=""))
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        if try_lock(fd) and directory.exists():
            break
        os.close(fd)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(fd)


def _place(path: Path, target: Path, digest: str) -> None:
    """Rename a blob in. One that is there already with these bytes stays if it is small: somebody may hold a lease on it.

    A big one is replaced by its equal, which also heals a damaged one; who has the old open keeps the old.
    """
    if path.name == "manifest" and target.exists() and target.read_bytes() == path.read_bytes():
        return
    mark(path, digest)
    path.replace(target)


def _regular_size(file: Path) -> int:
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise SmrError(f"{file} is not a regular file", code=Code.INTERNAL, path=file)
    return status.st_size


def _known(digest: str) -> Future[str]:
    done: Future[str] = Future()
    done.set_result(digest)
    return done


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _threads() -> int:
    """Half of them wait for the disk, so twice the processors, within reason."""
    return min(16, 2 * (os.cpu_count() or 1))
