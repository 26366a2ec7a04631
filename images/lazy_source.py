"""The bytes of chunks for a lazy restore: raw ones where the page cache has them, the others decoded, a few of them kept.

Segments are mapped, and a chunk's pages are taken into our memory only while they are copied, so that a server stays small
whatever the size of its image. Everything that is wrong with a segment is an SmrError before any of its bytes went to a process.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from smr.images import uffd
from smr.images.lazy_layout import Piece
from smr.images.pagetable import PAGE_BYTES, Chunk, Codec, PageTable
from smr.proto.errors import Code, SmrError

_KEPT = 8
_MAP_NORESERVE = 0x4000


class Source:
    """Open segments. `verify`: raw chunks are held against their digests too; the others always are."""

    def __init__(self, table: PageTable, segments: Sequence[Path], *, verify: bool = False) -> None:
        self._table = table
        self._verify = verify
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, mmap.mmap] = OrderedDict()
        if len(segments) != len(table.segments):
            what = f"the page table has {len(table.segments)} segments, {len(segments)} were given"
            raise SmrError(what, hint="smr images verify", code=Code.IMAGE_CORRUPT)
        self._paths = segments
        self._maps = [_map(path, size) for path, size in zip(segments, table.segments, strict=True)]
        self._addresses = [uffd.address_of(memory) if memory else 0 for memory in self._maps]

    def raw(self, chunk: int) -> bool:
        """Whether a part of a chunk costs no more than its share."""
        return self._table.chunks[chunk].codec == Codec.RAW and not self._verify

    @contextmanager
    def at(self, piece: Piece) -> Iterator[int]:
        """The address of a chunk's first byte; [skip, skip + length) of it is there while the context lasts."""
        chunk = self._table.chunks[piece.chunk]
        if chunk.codec != Codec.RAW:
            decoded = self._decoded(piece.chunk, chunk)
            yield uffd.address_of(decoded)
            return
        begin = self._addresses[chunk.segment] + chunk.offset
        start, size = begin + piece.skip, piece.end - piece.start
        if self._verify:
            start, size = begin, chunk.stored_bytes
        if code := uffd.populate(start, size):
            raise self._bad(chunk, os.strerror(code))
        try:
            if self._verify:
                self._check(chunk, memoryview(self._maps[chunk.segment])[chunk.offset : chunk.offset + size])  # type: ignore[arg-type]
            yield begin
        finally:
            uffd.forget(start, size)

    def _decoded(self, number: int, chunk: Chunk) -> mmap.mmap:
        with self._lock:
            if (found := self._kept.get(number)) is not None:
                self._kept.move_to_end(number)
                return found
        from smr.images.codec import decode

        memory = self._maps[chunk.segment]
        start = self._addresses[chunk.segment] + chunk.offset // PAGE_BYTES * PAGE_BYTES
        if memory is None or (code := uffd.populate(start, chunk.stored_bytes)):
            raise self._bad(chunk, os.strerror(code) if memory else "is empty")
        stored = memory[chunk.offset : chunk.offset + chunk.stored_bytes]
        uffd.forget(start, chunk.stored_bytes)
        try:
            pages = decode(chunk.codec, stored, chunk.pages * PAGE_BYTES)
        except SmrError as error:
            raise self._bad(chunk, error.message) from error
        self._check(chunk, pages)
        buffer = mmap.mmap(-1, len(pages))
        buffer[:] = pages
        with self._lock:
            self._kept[number] = buffer
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return buffer

    def _check(self, chunk: Chunk, pages: bytes | memoryview) -> None:
        import xxhash

        if xxhash.xxh3_128_digest(pages) != chunk.digest:
            raise self._bad(chunk, "has not the bytes of its digest")

    def _bad(self, chunk: Chunk, what: str) -> SmrError:
        return SmrError(
            f"segment {self._paths[chunk.segment]}: chunk at {chunk.offset} {what}",
            hint="smr images verify",
            code=Code.IMAGE_CORRUPT,
        )


def _map(path: Path, size_bytes: int) -> mmap.mmap | None:
    """A private, writable mapping of which nothing is ever written: only such a one says its address."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size_bytes:
                raise SmrError(
                    f"segment {path} has {found} bytes, needed {size_bytes}", hint="smr images verify", code=Code.IMAGE_CORRUPT
                )
            if not size_bytes:
                return None
            return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise SmrError(f"segment {path}: {error.strerror}", hint="smr images verify", code=Code.IMAGE_CORRUPT) from error
