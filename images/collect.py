"""What is garbage among the blobs: all that neither the index nor a lease needs.

The directories of dead ingests are `ingest.sweep`'s.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from smr.images.blobs import MANIFEST_LIMIT_BYTES, is_digest, read_verified
from smr.images.files import temporary_of, try_lock
from smr.images.layout import Layout
from smr.images.manifest import Descriptor, descriptors_in
from smr.proto.errors import Code, SmrError


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What a collection dropped."""

    blobs: int = 0
    size_bytes: int = 0
    ingests: int = 0


def collect(layout: Layout) -> Collected:
    """Drop the blobs that nothing needs. The caller holds the store's lock, so no commit is between its blobs and its index.

    Raises IMAGE_CORRUPT, dropping nothing, when an image in the index cannot be read: then nobody knows what it needs.
    """
    needed = needed_by(layout, (entry.digest for entry in layout.entries()))
    spare = {f"sha256:{blob.name}": blob for blob in layout.blob_files() if f"sha256:{blob.name}" not in needed}
    leased = [digest for digest, blob in spare.items() if is_digest(digest) and _in_use(Path(blob.path))]
    for digest in leased:
        needed |= _needed_by_leased(layout, digest)
    dropped = {digest: blob.stat(follow_symlinks=False).st_size for digest, blob in spare.items() if digest not in needed}
    for digest in dropped:
        Path(spare[digest].path).unlink()
    temporary_of(layout.index).unlink(missing_ok=True)
    return Collected(blobs=len(dropped), size_bytes=sum(dropped.values()))


def needed_by(layout: Layout, digests: Iterable[str]) -> set[str]:
    """The digests of these manifests and of all they refer to, manifests of manifests included."""
    needed: set[str] = set()
    waiting = list(digests)
    while waiting:
        digest = waiting.pop()
        if digest in needed:
            continue
        needed.add(digest)
        for descriptor in _references(layout, digest):
            if descriptor.media_type.endswith(("image.manifest.v1+json", "image.index.v1+json")):
                waiting.append(descriptor.digest)
            else:
                needed.add(descriptor.digest)
    return needed


def lock_unused(path: Path, stack: ExitStack) -> bool:
    """Keep new leases off a manifest until `stack` ends; False when it is leased. A manifest that is missing has no leases."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    stack.callback(os.close, fd)
    return try_lock(fd)


def _references(layout: Layout, digest: str) -> list[Descriptor]:
    data = read_verified(layout.blob(digest), digest, "manifest", limit_bytes=MANIFEST_LIMIT_BYTES)
    try:
        return list(descriptors_in(data))
    except (ValueError, SmrError) as error:
        raise SmrError(
            f"manifest {digest} cannot be read: {error}", hint=f"remove it with 'smr images rm {digest}'", code=Code.IMAGE_CORRUPT
        ) from error


def _needed_by_leased(layout: Layout, digest: str) -> set[str]:
    """A leased image without a name keeps its blobs; what is locked and is no manifest keeps only itself."""
    with suppress(SmrError):
        return needed_by(layout, [digest])
    return {digest}


def _in_use(path: Path) -> bool:
    with ExitStack() as stack:
        return not lock_unused(path, stack)
