"""An image of the store, as its readers see it: immutable, its manifest verified, its blobs where they lie.

An `Image` says that its manifest was whole when it was resolved. Who keeps using it holds a lease (`Store.lease`), so that its
blobs stay. Nothing here changes the store, which may be read where it cannot be written; only `materialize` needs a directory
that can be written on the store's mount, because it links the pages.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from smr.images import criutar
from smr.images.blobs import CONFIG_LIMIT_BYTES, MANIFEST_LIMIT_BYTES, check_blob, corrupt, digest_stream, read_verified
from smr.images.files import writing
from smr.images.manifest import CREATED_ANNOTATION, Descriptor, Manifest, parse_manifest
from smr.proto.checkpoint import CheckpointConfig, LayerType, parse_config
from smr.proto.errors import Code, SmrError


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer: its descriptor and its blob file, which is never to be written."""

    descriptor: Descriptor
    path: Path

    @property
    def kind(self) -> LayerType:
        """What the layer holds."""
        return LayerType(self.descriptor.media_type)

    @property
    def digest(self) -> str:
        """sha256:HEX."""
        return self.descriptor.digest

    @property
    def size_bytes(self) -> int:
        """Size of the blob."""
        return self.descriptor.size_bytes

    @property
    def title(self) -> str:
        """The file name the layer stands for; empty when it has none."""
        return self.descriptor.title

    @property
    def annotations(self) -> Mapping[str, str]:
        """The layer's annotations, title included."""
        return self.descriptor.annotations


@dataclass(frozen=True, kw_only=True)
class Image:
    """A checkpoint image. `name` and `tag` are empty for an image that only a digest names."""

    name: str
    tag: str
    digest: str
    manifest: Manifest
    manifest_size_bytes: int
    blobs: Path

    @property
    def reference(self) -> str:
        """NAME:TAG, or the digest."""
        return f"{self.name}:{self.tag}" if self.name else self.digest

    @property
    def created(self) -> str:
        """When the checkpoint was made, RFC 3339 UTC."""
        return self.manifest.annotations.get(CREATED_ANNOTATION, "")

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, in the manifest's order."""
        return tuple(Layer(descriptor=layer, path=self.blob(layer.digest)) for layer in self.manifest.layers)

    def layers_of(self, kind: LayerType) -> tuple[Layer, ...]:
        """The layers of one kind."""
        return tuple(layer for layer in self.layers if layer.kind is kind)

    @property
    def size_bytes(self) -> int:
        """Bytes on disk; a blob that stands for two layers counts once."""
        return sum({descriptor.digest: descriptor.size_bytes for _, descriptor in self.contents()}.values())

    @cached_property
    def config(self) -> CheckpointConfig:
        """The config, read and verified once. Raises IMAGE_CORRUPT or IMAGE_VERSION."""
        digest = self.manifest.config.digest
        return parse_config(read_verified(self.blob(digest), digest, "config", limit_bytes=CONFIG_LIMIT_BYTES))

    def blob(self, digest: str) -> Path:
        """The file of a blob."""
        return self.blobs / digest.removeprefix("sha256:")

    def contents(self) -> Iterator[tuple[str, Descriptor]]:
        """Every blob with a word for what it is: manifest, config, layers."""
        yield "manifest", Descriptor(media_type="", digest=self.digest, size_bytes=self.manifest_size_bytes)
        yield "config", self.manifest.config
        for layer in self.manifest.layers:
            yield LayerType(layer.media_type).name.lower(), layer

    def check(self) -> None:
        """Every blob is there with its size and was not written since it was hashed; manifest and config have their digests.

        Cheap, but for a blob that was written or copied, which is hashed. Raises IMAGE_CORRUPT.
        """
        for what, descriptor in self.contents():
            check_blob(self.blob(descriptor.digest), descriptor.digest, descriptor.size_bytes, what)
        read_verified(self.blob(self.digest), self.digest, "manifest", limit_bytes=MANIFEST_LIMIT_BYTES)
        _ = self.config

    def materialize(self, target: Path) -> None:
        """Make a CRIU image directory in `target`, which exists and is empty; after a failure it is empty again.

        `target` is on the store's file system: CRIU's small images are files of their own, free to be edited, pages are hard
        links to the blobs, read-only. Symbolic links would not do: CRIU opens pages after it has changed its root, where their
        targets do not exist. Raises IMAGE_CORRUPT, ARCHIVE_UNSAFE, ARCHIVE_INVALID, DISK_FULL, PERMISSION.
        """
        self.check()
        if any(target.iterdir()):
            raise SmrError(f"{target} is not empty: needed an empty directory", code=Code.INTERNAL, path=target)
        try:
            with writing(target, self.layers_of(LayerType.CRIU)[0].size_bytes):
                self._fill(target)
        except BaseException:
            for path in target.iterdir():
                path.unlink()
            raise

    def _fill(self, target: Path) -> None:
        (small,) = self.layers_of(LayerType.CRIU)
        with small.path.open("rb") as tar:
            if (found := digest_stream(tar)) != small.digest:
                raise corrupt(small.path, "criu", found, small.digest)
            names = set(criutar.unpack(tar, target))
        for pages in self.layers_of(LayerType.PAGES):
            if pages.title in names:
                raise corrupt(small.path, "criu", f"a file {pages.title}", "none, since there is a layer of that name")
            _link(pages.path, target / pages.title)


def _link(blob: Path, path: Path) -> None:
    try:
        path.hardlink_to(blob)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        raise SmrError(
            f"{path.parent} is not on the file system (and mount) of the store {blob.parents[2]}: pages cannot be linked there",
            hint="restore into a directory beside the store",
            code=Code.INTERNAL,
            path=path,
        ) from error


def read_image(blobs: Path, digest: str, *, name: str = "", tag: str = "") -> Image:
    """Read the image with this manifest. Raises IMAGE_CORRUPT, IMAGE_VERSION or UNSUPPORTED."""
    path = blobs / digest.removeprefix("sha256:")
    data = read_verified(path, digest, "manifest", limit_bytes=MANIFEST_LIMIT_BYTES)
    reference = f"{name}:{tag}" if name else digest
    return Image(
        name=name,
        tag=tag,
        digest=digest,
        manifest=parse_manifest(data, reference),
        manifest_size_bytes=len(data),
        blobs=blobs,
    )
