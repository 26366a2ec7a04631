"""Content-addressed files: `blobs/sha256/HEX`, mode 0444, each holding exactly the bytes whose sha256 is its name.

Who reads a small blob as a whole gets it verified. A big one is not hashed at each restore: its modification time is set to a
time that its digest gives when its content was hashed, and any write sets another. So a blob whose time is not that one is
hashed before it is used, and one that was only copied gets its mark again. What a disk loses without a write, `verify` finds.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from smr.proto.errors import Code, SmrError

MANIFEST_LIMIT_BYTES = 4 << 20
CONFIG_LIMIT_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

Progress = Callable[[int], object]
"""Called with the bytes done since the last call, from any thread. It may raise to stop the work."""


def is_digest(text: str) -> bool:
    """Whether `text` is a whole digest; only then may it become part of a path."""
    return _DIGEST.fullmatch(text) is not None


def digest_bytes(data: bytes) -> str:
    """The digest of `data`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def digest_stream(file: BinaryIO, progress: Progress | None = None) -> str:
    """The digest of the rest of `file`, read in pieces; hashing a piece releases the GIL."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    while count := file.readinto(buffer):  # type: ignore[attr-defined]  # typing.BinaryIO lacks it
        digest.update(view[:count])
        if progress:
            progress(count)
    return f"sha256:{digest.hexdigest()}"


def digest_file(path: Path, progress: Progress | None = None) -> str:
    """The digest of a file."""
    with path.open("rb", buffering=0) as file:
        return digest_stream(file, progress)


def corrupt(path: Path, what: str, found: object, needed: object) -> SmrError:
    """The error for a blob that is not what its image says."""
    return SmrError(
        f"{what} blob {path.name[:12]} is damaged: found {found}, needed {needed}",
        hint="remove the image with 'smr images rm' and make or import it again; 'smr images verify' checks the others",
        code=Code.IMAGE_CORRUPT,
        blob=path,
    )


def check_size(path: Path, size_bytes: int, what: str) -> None:
    """Raise IMAGE_CORRUPT unless the blob is there with its size."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise corrupt(path, what, "no file", f"{size_bytes} bytes") from None
    if found != size_bytes:
        raise corrupt(path, what, f"{found} bytes", f"{size_bytes} bytes")


def mark(path: Path, digest: str) -> None:
    """Note in its modification time that the blob's content has been hashed. Raises OSError."""
    os.utime(path, ns=(path.stat().st_atime_ns, _marked_time(digest) * 1_000_000_000))


def check_blob(path: Path, digest: str, size_bytes: int, what: str) -> None:
    """Raise IMAGE_CORRUPT unless the blob is there, has its size, and was not written since it was hashed."""
    check_size(path, size_bytes, what)
    if int(path.stat().st_mtime) == _marked_time(digest):
        return
    if (found := digest_file(path)) != digest:
        raise corrupt(path, what, found, digest)
    with contextlib.suppress(OSError):  # a store that cannot be written: hashed again next time
        mark(path, digest)


def _marked_time(digest: str) -> int:
    """Seconds since 1970: between 2001 and 2010, when no blob was written."""
    return 1_000_000_000 + int(digest.removeprefix("sha256:")[:7], 16)


def read_verified(path: Path, digest: str, what: str, *, limit_bytes: int) -> bytes:
    """The content of a small blob, whose digest was checked. Raises IMAGE_CORRUPT."""
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except FileNotFoundError:
        raise corrupt(path, what, "no file", digest) from None
    if len(data) > limit_bytes:
        raise corrupt(path, what, f"more than {limit_bytes} bytes", "a small document")
    if (found := digest_bytes(data)) != digest:
        raise corrupt(path, what, found, digest)
    return data
