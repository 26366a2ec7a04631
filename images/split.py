"""Take the pages that SMR delivers itself out of a dump, and make segments of them.

    folder/pagemap-PID.img, pages-N.img    what is left to CRIU: a dump that is whole but for those pages
    folder/mm-PID.img                      VMAs that are nearly full of them ask for huge pages
    out/segment-NNNNN                      the pages, cut into chunks; the page table says where they belong

The pages are read, held against zeros and against each other, hashed and written in one pass by several threads, each on a
segment of its own; what was read is punched out of pages-N.img at once, so that neither disk nor page cache hold them twice.
Blocks of zeros are dropped: memory that nobody writes reads as zeros. A chunk never crosses a border between huge pages.

After a failure `folder` and `out` are of no use: both belong to an ingest, which drops them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from smr.images.criu_files import write_messages
from smr.images.eligible import Memory, choose, may_move, span_of
from smr.images.files import writing
from smr.images.pagemap import Entry, read_vmas, write_pagemap
from smr.images.pagetable import CHUNK_PAGES, PAGE_BYTES, Chunk, Codec, PageTable, Run
from smr.images.spans import Span, intersect, total

# Below this CRIU restores as fast as another program starts.
MIN_SPLIT_BYTES = 16 << 20
_SEGMENT_BYTES = (32 << 20, 1 << 30)
_SEGMENTS = 64
_ZERO_PAGES = 16
_ZEROS = bytearray(_ZERO_PAGES * PAGE_BYTES)
_MADV_HUGEPAGE, _MADV_NOHUGEPAGE = 1 << 14, 1 << 15
# Of the huge pages of a VMA, the share that must be ours before it is made of huge pages only.
_DENSE = 0.875
_DENSE_PAGES = 8 * CHUNK_PAGES
_PUNCH_HOLE_KEEP_SIZE = 0x2 | 0x1
# What was read is freed so often, lest the kernel takes us for a writer of too much and slows us down to the disk.
_FREE_PIECES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A segment that was written. `digest`: sha256:HEX of the file."""

    path: Path
    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What came of it. Without segments nothing was changed."""

    table: PageTable
    segments: Sequence[Segment]

    @property
    def stored_bytes(self) -> int:
        """Size of the segments."""
        return sum(segment.size_bytes for segment in self.segments)


_NOTHING = Split(table=PageTable(segments=(), chunks=(), runs=()), segments=())


def split(folder: Path, out: Path, *, compress: bool = False, threads: int | None = None) -> Split:
    """Split the dump in `folder`; segments are written to the directory `out`, on any file system.

    Raises IMAGE_CORRUPT when CRIU's images do not fit together, DISK_FULL.
    """
    memories = choose(folder)
    moved_bytes = sum(total(memory.moved) for memory in memories) * PAGE_BYTES
    if moved_bytes < MIN_SPLIT_BYTES:
        return _NOTHING
    moved = [memory for memory in memories if memory.moved]
    with writing(out, moved_bytes):
        for memory in moved:
            _copy_kept(memory)
        job = _Job(out=out, compress=compress)
        with ExitStack() as stack:
            files = {memory.pid: _open(stack, memory.pagemap.pages_path) for memory in moved}
            count = threads or min(16, len(os.sched_getaffinity(0)))
            with ThreadPoolExecutor(count, thread_name_prefix="smr-split") as pool:
                shares = list(_shares(moved, _segment_bytes(moved_bytes, count)))
                list(pool.map(lambda item: job.write(item[0], item[1], files), enumerate(shares)))
        for memory in moved:
            _strip(folder, memory)
    return job.result()


@dataclass(frozen=True, slots=True)
class _Piece:
    """Up to a chunk of pages, one run of a pages file: page `first` of it is page `begin` of the process."""

    pid: int
    flags: int
    begin: int
    first: int
    pages: int


def _segment_bytes(moved_bytes: int, threads: int) -> int:
    """Enough segments for all threads, and not so many that a manifest grows long."""
    smallest, largest = _SEGMENT_BYTES
    return max(smallest, min(largest, moved_bytes // max(_SEGMENTS, 4 * threads)))


def _pieces(memory: Memory) -> Iterator[_Piece]:
    for entry in memory.moved_entries():
        at = entry.begin
        while at < entry.end:
            end = min(entry.end, at - at % CHUNK_PAGES + CHUNK_PAGES)
            yield _Piece(memory.pid, entry.flags, at, entry.first + at - entry.begin, end - at)
            at = end


def _shares(memories: Sequence[Memory], size_bytes: int) -> Iterator[list[_Piece]]:
    """The pieces of each segment."""
    share: list[_Piece] = []
    pages = 0
    for memory in memories:
        for piece in _pieces(memory):
            share.append(piece)
            pages += piece.pages
            if pages * PAGE_BYTES >= size_bytes:
                yield share
                share, pages = [], 0
    if share:
        yield share


@dataclass(slots=True, kw_only=True)
class _Job:
    """What the threads share: chunks by digest, and the segments that are done."""

    out: Path
    compress: bool
    known: dict[tuple[bytes, int], tuple[int, int]] = field(default_factory=dict)
    done: dict[int, _Written] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, number: int, pieces: list[_Piece], files: dict[int, int]) -> None:
        """Make one segment, and free what it was made of."""
        written = _Written(number=number, path=self.out / f"segment-{number:05}")
        fd = os.open(written.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            buffer = memoryview(bytearray(CHUNK_PAGES * PAGE_BYTES))
            for at in range(0, len(pieces), _FREE_PIECES):
                some = pieces[at : at + _FREE_PIECES]
                for piece in some:
                    view = buffer[: piece.pages * PAGE_BYTES]
                    _read(files[piece.pid], view, piece.first * PAGE_BYTES)
                    for begin, end in _without_zeros(view, piece.pages):
                        self._add(written, fd, piece, begin, view[begin * PAGE_BYTES : end * PAGE_BYTES])
                for pid, (begin, end) in _freed(some):
                    _punch(files[pid], begin, end)
        finally:
            os.close(fd)
        self.done[number] = written

    def _add(self, written: _Written, fd: int, piece: _Piece, begin: int, pages: memoryview) -> None:
        import xxhash

        digest = xxhash.xxh3_128_digest(pages)
        key = (digest, len(pages))
        with self.lock:
            place = self.known.setdefault(key, (written.number, len(written.chunks)))
        if place == (written.number, len(written.chunks)):
            codec, stored = self._encode(pages)
            written.chunks.append((codec, written.size_bytes, len(stored), len(pages) // PAGE_BYTES, digest))
            written.write(fd, stored)
        written.runs.append((piece.pid, piece.flags, (piece.begin + begin) * PAGE_BYTES, place))

    def _encode(self, pages: memoryview) -> tuple[Codec, memoryview | bytes]:
        if not self.compress:
            return Codec.RAW, pages
        from smr.images.codec import encode

        return encode(pages)

    def result(self) -> Split:
        """The table of all segments; one that stayed empty, since its pages are all elsewhere or zeros, is dropped."""
        order = [self.done[number] for number in sorted(self.done)]
        full = [written for written in order if written.chunks]
        for written in order:
            if not written.chunks:
                written.path.unlink()
        first: dict[int, int] = {}
        chunks: list[Chunk] = []
        for index, written in enumerate(full):
            first[written.number] = len(chunks)
            chunks += [Chunk(index, *row) for row in written.chunks]
        runs = sorted(
            Run(pid, flags, address, first[number] + chunk)
            for written in order
            for pid, flags, address, (number, chunk) in written.runs
        )
        runs.sort(key=lambda run: (run.pid, run.address))
        segments = [Segment(path=w.path, digest=f"sha256:{w.hash.hexdigest()}", size_bytes=w.size_bytes) for w in full]
        table = PageTable(segments=[segment.size_bytes for segment in segments], chunks=chunks, runs=runs)
        return Split(table=table, segments=segments)


@dataclass(slots=True, kw_only=True)
class _Written:
    """A segment being written by one thread."""

    number: int
    path: Path
    size_bytes: int = 0
    chunks: list[tuple[int, int, int, int, bytes]] = field(default_factory=list)
    runs: list[tuple[int, int, int, tuple[int, int]]] = field(default_factory=list)
    hash: hashlib._Hash = field(default_factory=hashlib.sha256)

    def write(self, fd: int, stored: memoryview | bytes) -> None:
        """Append a chunk, up to the next page border."""
        for part in (stored, bytes(-len(stored) % PAGE_BYTES)):
            if part:
                self.hash.update(part)
                _write(fd, part)
                self.size_bytes += len(part)


def _without_zeros(view: memoryview, pages: int) -> Iterator[Span]:
    """The spans of pages that are left when blocks of zeros are dropped."""
    begin = 0
    # One call for the first word of each block: a look at all of them takes the interpreter's lock for too long.
    words = view.cast("Q")[:: _ZERO_PAGES * PAGE_BYTES // 8].tolist()
    for number, word in enumerate(words):
        if word:
            continue
        at = number * _ZERO_PAGES
        end = min(at + _ZERO_PAGES, pages)
        block = view[at * PAGE_BYTES : end * PAGE_BYTES]
        zeros = _ZEROS if end - at == _ZERO_PAGES else _ZEROS[: len(block)]
        if zeros == block:
            if begin < at:
                yield begin, at
            begin = end
    if begin < pages:
        yield begin, pages


def _freed(pieces: list[_Piece]) -> Iterator[tuple[int, Span]]:
    """The pieces' places in their pages files, those that touch joined."""
    pid, begin, end = 0, 0, 0
    for piece in pieces:
        if (piece.pid, piece.first) != (pid, end):
            if end:
                yield pid, (begin, end)
            pid, begin = piece.pid, piece.first
        end = piece.first + piece.pages
    if end:
        yield pid, (begin, end)


def _kept_path(memory: Memory) -> Path:
    path = memory.pagemap.pages_path
    return path.with_name(f"{path.name}.kept")


def _copy_kept(memory: Memory) -> None:
    """The pages that stay, in a file beside the old one, which is about to get holes."""
    with memory.pagemap.pages_path.open("rb") as source, _kept_path(memory).open("xb") as target:
        for entry in memory.kept_entries():
            _send(source.fileno(), target.fileno(), entry)


def _send(source: int, target: int, entry: Entry) -> None:
    offset, left = entry.first * PAGE_BYTES, (entry.end - entry.begin) * PAGE_BYTES
    while left:
        count = os.sendfile(target, source, offset, left)
        if not count:
            raise EOFError(f"pages end at {offset}")  # the length was checked: somebody else writes here
        offset, left = offset + count, left - count


def _strip(folder: Path, memory: Memory) -> None:
    write_pagemap(memory.pagemap, list(memory.kept_entries()))
    _kept_path(memory).replace(memory.pagemap.pages_path)
    magic, mm = read_vmas(folder, memory.pid)
    if mm.thp_disabled:
        return
    for vma in mm.vmas:
        if may_move(vma) and not vma.madv & _MADV_NOHUGEPAGE and _dense(span_of(vma), memory.moved):
            vma.madv |= _MADV_HUGEPAGE
    write_messages(folder / f"mm-{memory.pid}.img", magic, [mm])


def _dense(vma: Span, moved: Sequence[Span]) -> bool:
    """Whether a VMA is large and nearly all of it is ours, so that huge pages take hardly more memory."""
    size = vma[1] - vma[0]
    return size >= _DENSE_PAGES and total(intersect([vma], moved)) >= _DENSE * size


def _open(stack: ExitStack, path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def _read(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if not count:
            raise EOFError(f"pages end at {offset + done}")  # the length was checked: somebody else writes here
        done += count


def _write(fd: int, data: memoryview | bytes) -> None:
    done = 0
    while done < len(data):
        done += os.write(fd, memoryview(data)[done:])


def _punch(fd: int, begin: int, end: int) -> None:
    """Free pages of a file; where the file system cannot, they go with the file."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
    libc.fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, begin * PAGE_BYTES, (end - begin) * PAGE_BYTES)
