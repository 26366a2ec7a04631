"""Read an image into the page cache before CRIU asks for it, several pieces at a time.

As a program: `python -I -m smr.images.prefetch STORE REFERENCE [CANCEL]`, started while the engine still mounts and wires, killed
or cancelled (a file CANCEL appears) when the restore is done. It changes nothing but the page cache, holds no lease, and never
takes more than a share of the memory that is free: a restore without its help is slower, not wrong.
Standard library only.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from smr.images.image import Image
from smr.images.pagecache import available_bytes, cached_bytes, cached_bytes_of
from smr.proto.checkpoint import LayerType
from smr.proto.errors import Code, SmrError, exit_status

PIECE_BYTES = 8 << 20
# The kernel cuts a longer request to the disk's largest transfer, silently (force_page_cache_ra in mm/readahead.c).
_ADVICE_BYTES = 256 << 10
# What is read is thrown away at once: a buffer that stays in the processor's cache costs least.
_BUFFER_BYTES = 512 << 10
_THREADS = 8
# Those that a restore reads from begin to end, in the order in which it does.
_ORDER = (LayerType.CRIU, LayerType.ROOTFS, LayerType.TMPFS, LayerType.PAGES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefetched:
    """What came of it, in bytes: of `total`, what was `cached` before, was `read`, and was `left` for want of memory or time."""

    total_bytes: int
    cached_bytes: int
    read_bytes: int
    left_bytes: int
    cancelled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    path: Path
    offset: int
    size_bytes: int


@dataclass(kw_only=True)
class _Job:
    """What the threads share. `budget_bytes` is what may still be read."""

    pieces: Iterator[_Piece]
    budget_bytes: int
    cancel: Path | None
    cached_bytes: int = 0
    read_bytes: int = 0
    cancelled: bool = False
    errors: list[OSError] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> _Piece | None:
        """The next piece to look at; None when there is no more to do."""
        with self.lock:
            if self.cancel is not None and not self.cancelled:
                self.cancelled = self.cancel.exists()
            return None if self.cancelled or self.errors else next(self.pieces, None)

    def allow(self, size_bytes: int) -> bool:
        """Whether so much more may be read; if so it counts as read."""
        with self.lock:
            if size_bytes > self.budget_bytes:
                return False
            self.budget_bytes -= size_bytes
            self.read_bytes += size_bytes
            return True

    def work(self) -> None:
        """What each thread does."""
        buffer = bytearray(_BUFFER_BYTES)
        try:
            while piece := self.take():
                self._read(piece, buffer)
        except OSError as error:
            self.errors.append(error)

    def _read(self, piece: _Piece, buffer: bytearray) -> None:
        fd = os.open(piece.path, os.O_RDONLY)
        try:
            cached = cached_bytes(fd, piece.offset, piece.size_bytes)
            with self.lock:
                self.cached_bytes += cached
            if cached < piece.size_bytes and self.allow(piece.size_bytes - cached):
                _read_ahead(fd, piece, buffer)
        finally:
            os.close(fd)


def prefetch(image: Image, *, threads: int = _THREADS, cancel: Path | None = None, share: float = 0.5) -> Prefetched:
    """Read what a restore of `image` will read, until done, out of memory (`share` of what is free), or `cancel` exists.

    Raises IMAGE_CORRUPT when a blob cannot be read.
    """
    pieces = list(_pieces(image))
    job = _Job(pieces=iter(pieces), budget_bytes=int(share * available_bytes()), cancel=cancel)
    workers = [threading.Thread(target=job.work, name=f"smr-prefetch-{number}", daemon=True) for number in range(max(1, threads))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if job.errors:
        raise SmrError(
            f"cannot read image {image.reference}: {job.errors[0]}",
            hint=f"'smr images verify {image.reference}' says what is damaged",
            code=Code.IMAGE_CORRUPT,
            image=image.reference,
        ) from job.errors[0]
    total = sum(piece.size_bytes for piece in pieces)
    return Prefetched(
        total_bytes=total,
        cached_bytes=job.cached_bytes,
        read_bytes=job.read_bytes,
        left_bytes=total - job.cached_bytes - job.read_bytes,
        cancelled=job.cancelled,
    )


def cached_share(image: Image) -> float:
    """The share of the image's layers that is in memory, 0 to 1; 1 for an image without bytes."""
    sizes = {layer.path: layer.size_bytes for layer in image.layers}
    total = sum(sizes.values())
    return sum(cached_bytes_of(path) for path in sizes) / total if total else 1.0


def _pieces(image: Image) -> Iterator[_Piece]:
    seen = set()
    for layer in (layer for kind in _ORDER for layer in image.layers_of(kind)):
        if layer.path in seen:
            continue
        seen.add(layer.path)
        for offset in range(0, layer.size_bytes, PIECE_BYTES):
            yield _Piece(path=layer.path, offset=offset, size_bytes=min(PIECE_BYTES, layer.size_bytes - offset))


def _read_ahead(fd: int, piece: _Piece, buffer: bytearray) -> None:
    """Ask for the whole piece, then read it, which waits for the disk: so a thread has one piece under way, not the file."""
    end = piece.offset + piece.size_bytes
    for offset in range(piece.offset, end, _ADVICE_BYTES):
        os.posix_fadvise(fd, offset, min(_ADVICE_BYTES, end - offset), os.POSIX_FADV_WILLNEED)
    offset = piece.offset
    while offset < end:
        count = os.preadv(fd, [memoryview(buffer)[: min(len(buffer), end - offset)]], offset)
        if not count:
            return  # shorter than its manifest says: the restore's own check reports it
        offset += count


def main(argv: list[str]) -> int:
    """The program. Exit status as the `smr` command's."""
    from smr.images.store import Store

    if len(argv) not in {2, 3}:
        sys.stderr.write("usage: python -I -m smr.images.prefetch STORE REFERENCE [CANCEL]\n")
        return exit_status(Code.USAGE)
    try:
        image = Store(Path(argv[0])).resolve(argv[1])
        prefetch(image, cancel=Path(argv[2]) if len(argv) == 3 else None)
    except SmrError as error:
        sys.stderr.write(f"smr-prefetch: {error}\n")
        return exit_status(error.code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
