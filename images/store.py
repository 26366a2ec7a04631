"""The store of a node: checkpoint images by name and digest. `layout` has what lies on disk and the invariants.

Readers (`resolve`, `images`, `lease`, `verify`) write nothing and take no lock but the lease, so they need no write access.
Writers (`ingest`, `remove`, `gc`) may run in any number of processes at once.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from smr.images.image import Image, Layer, read_image
from smr.images.layout import Entry, Layout
from smr.images.reference import Reference, parse_reference
from smr.proto.errors import Code, SmrError

# Making, collecting and verifying bring threads and more; a restore needs none of it.
if TYPE_CHECKING:
    from smr.images.collect import Collected
    from smr.images.ingest import Ingest
    from smr.images.verify import Progress, Verification

__all__ = ["Broken", "Image", "Layer", "Removed", "Store"]

_ATTEMPTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """What a removal did. `digest` is empty when only a name went and the image has others."""

    names: tuple[str, ...]
    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """An image of the index that cannot be read, and why."""

    reference: str
    digest: str
    error: SmrError


class Store:
    """The images under `root`. Nothing is made there before the first ingest; a root that is missing is an empty store."""

    def __init__(self, root: Path) -> None:
        self._layout = Layout(root)

    @property
    def root(self) -> Path:
        """Where the store is, absolute."""
        return self._layout.root

    def resolve(self, ref: str) -> Image:
        """The image that `ref` names: NAME[:TAG], sha256:HEX (6 digits or more) or NAME@sha256:HEX.

        Raises IMAGE_NOT_FOUND (with the closest names, or when a digest is ambiguous), ANNOTATION_INVALID, IMAGE_CORRUPT,
        IMAGE_VERSION, UNSUPPORTED.
        """
        return self._read(self._find(parse_reference(ref))[0])

    def images(self) -> list[Image]:
        """All images that can be read, newest first. `broken` has the others."""
        return [found for found in self._read_all() if isinstance(found, Image)]

    def broken(self) -> list[Broken]:
        """Images of the index that cannot be read; `remove` takes their reference."""
        return [found for found in self._read_all() if isinstance(found, Broken)]

    def tags(self, name: str) -> list[str]:
        """The tags that images of this name have."""
        return [entry.tag for entry in self._layout.entries() if entry.name == name]

    def ingest(self) -> AbstractContextManager[Ingest]:
        """Begin an image, and drop what dead makers left. Raises PERMISSION or DISK_FULL."""
        from smr.images.ingest import open_ingest, sweep

        sweep(self._layout)
        return open_ingest(self._layout)

    @contextmanager
    def lease(self, image: Image) -> Iterator[Image]:
        """Keep the blobs of `image` for as long as the block, or this process, lasts. IMAGE_NOT_FOUND when it has gone."""
        try:
            fd = os.open(image.blob(image.digest), os.O_RDONLY)
        except FileNotFoundError:
            raise _gone(image) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            # A removal that was quicker has taken it off the index, and gc is free to drop its blobs.
            if all(entry.digest != image.digest for entry in self._layout.entries()):
                raise _gone(image)
            yield image
        finally:
            os.close(fd)

    @contextmanager
    def leased(self, ref: str) -> Iterator[Image]:
        """Resolve and lease as one step, whatever is replaced meanwhile. Raises as `resolve`."""
        with ExitStack() as stack:
            yield self._lease_first(ref, stack)

    def remove(self, ref: str, *, force: bool = False) -> Removed:
        """Take the name away; with its last name, or by digest, the image and the blobs that no other image needs.

        Raises IMAGE_IN_USE for a leased image, unless `force`: then it has no name any more and goes when its users end.
        """
        from smr.images.collect import collect, lock_unused

        reference = parse_reference(ref)
        if not self._layout.entries():
            raise self._not_found(reference)
        with self._layout.exclusive(), ExitStack() as stack:
            doomed = self._find(reference)
            digest = doomed[0].digest
            left = [entry for entry in self._layout.entries() if entry not in doomed]
            last = all(entry.digest != digest for entry in left)
            if last and not lock_unused(self._layout.blob(digest), stack) and not force:
                raise _in_use(doomed[0])
            self._layout.save(left)
            stack.close()
            size_bytes = 0
            # Collecting may refuse because another image is damaged; the removal is done all the same.
            with suppress(SmrError):
                size_bytes = collect(self._layout).size_bytes
        return Removed(names=tuple(entry.reference for entry in doomed), digest=digest if last else "", size_bytes=size_bytes)

    def verify(self, image: Image, *, progress: Progress | None = None) -> Verification:
        """Read every blob of `image` and compare size and sha256. `Verification.check` raises what it found."""
        from smr.images.verify import verify

        return verify(image, progress)

    def gc(self) -> Collected:
        """Drop blobs that no image needs and ingests whose maker died. IMAGE_CORRUPT when an image cannot be read."""
        from smr.images.collect import Collected, collect
        from smr.images.ingest import sweep

        if not self.root.is_dir():
            return Collected()
        ingests = sweep(self._layout)
        with self._layout.exclusive():
            return replace(collect(self._layout), ingests=ingests)

    def _lease_first(self, ref: str, stack: ExitStack) -> Image:
        for _ in range(_ATTEMPTS - 1):
            with suppress(_GoneError):
                return stack.enter_context(self.lease(self.resolve(ref)))
        return stack.enter_context(self.lease(self.resolve(ref)))

    def _read(self, entry: Entry) -> Image:
        return read_image(self._layout.blobs, entry.digest, name=entry.name, tag=entry.tag)

    def _read_all(self) -> list[Image | Broken]:
        found: list[Image | Broken] = []
        for entry in self._layout.entries():
            try:
                found.append(self._read(entry))
            except SmrError as error:
                found.append(Broken(reference=entry.reference, digest=entry.digest, error=error))
        return sorted(found, key=lambda item: item.created if isinstance(item, Image) else "", reverse=True)

    def _find(self, reference: Reference) -> list[Entry]:
        """The entries a reference names: one for a name, every one of the image for a digest."""
        entries = self._layout.entries()
        if not reference.digest:
            found = [entry for entry in entries if (entry.name, entry.tag) == (reference.name, reference.tag)]
        else:
            found = [e for e in entries if e.digest.startswith(reference.digest) and reference.name in {"", e.name}]
        if not found:
            raise self._not_found(reference)
        digests = sorted({entry.digest for entry in found})
        if len(digests) > 1 and reference.digest:
            raise SmrError(
                f"{reference} is ambiguous: it begins {len(digests)} digests",
                hint="give more digits: " + ", ".join(digest[:24] for digest in digests[:4]),
                code=Code.IMAGE_NOT_FOUND,
                image=reference,
            )
        return found

    def _not_found(self, reference: Reference) -> SmrError:
        from smr.images.suggest import suggestion

        return SmrError(
            f"no image {reference} in {self.root}",
            hint=suggestion(reference, self._layout.entries()),
            code=Code.IMAGE_NOT_FOUND,
            image=reference,
            store=self.root,
        )


class _GoneError(SmrError):
    """An image was removed or replaced between its resolution and its lease; `leased` looks again."""


def _gone(image: Image) -> _GoneError:
    return _GoneError(
        f"image {image.reference} was removed or replaced meanwhile",
        hint="try again; 'smr images ls' lists what is there",
        code=Code.IMAGE_NOT_FOUND,
        image=image.reference,
    )


def _in_use(entry: Entry) -> SmrError:
    return SmrError(
        f"image {entry.reference} is in use by a restore",
        hint=f"try again when it is done, or 'smr images rm --force {entry.reference}'",
        code=Code.IMAGE_IN_USE,
        image=entry.reference,
    )
