"""Pages cut into the chunks of segments, by several threads: what `split` and `livesplit` have in common.

A job writes segments, each in one thread: the pages of its pieces are read, held against zeros and against each other, hashed
and written in one pass. Blocks of zeros are dropped: memory that nobody writes reads as zeros. A chunk never crosses a border
between huge pages. The page table of all of them is made in the end.
"""

from __future__ import annotations

import bisect
import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from smr.images.pagemap import Entry
from smr.images.pagetable import CHUNK_PAGES, PAGE_BYTES, Chunk, Codec, PageTable, Run
from smr.images.spans import Span, union

_SEGMENT_BYTES = (32 << 20, 1 << 30)
_SEGMENTS = 64
_ZERO_PAGES = 16
_MAP_NORESERVE = 0x4000
_ZEROS = bytearray(_ZERO_PAGES * PAGE_BYTES)
# What was read is given back so often.
_FREE_PIECES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A segment that was written. `digest`: sha256:HEX of the file, "" where there was no time for it."""

    path: Path
    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What came of it. Without segments nothing was taken out."""

    table: PageTable
    segments: Sequence[Segment]

    @property
    def stored_bytes(self) -> int:
        """Size of the segments."""
        return sum(segment.size_bytes for segment in self.segments)


NOTHING = Split(table=PageTable(segments=(), chunks=(), runs=()), segments=())


@dataclass(frozen=True, slots=True)
class Piece:
    """Up to a chunk of pages of a process, of one run. Where they lie in a pages file, the first is page `first` of it."""

    pid: int
    flags: int
    begin: int
    first: int
    pages: int


# A run before its chunk has a number in the table: pid, flags, address, (segment, chunk in it).
_Row = tuple[int, int, int, tuple[int, int]]
# Fills a view, as long as the piece, with its pages; false where that cannot be had, and need not be.
Read = Callable[[Piece, memoryview], bool]


def thread_count(threads: int | None) -> int:
    """`threads`, or as many as there are processors, up to 16."""
    return threads or min(16, len(os.sched_getaffinity(0)))


def pieces(pid: int, entries: Iterable[Entry]) -> Iterator[Piece]:
    """Entries, cut at the borders between huge pages."""
    for entry in entries:
        at = entry.begin
        while at < entry.end:
            end = min(entry.end, at - at % CHUNK_PAGES + CHUNK_PAGES)
            yield Piece(pid, entry.flags, at, entry.first + at - entry.begin, end - at)
            at = end


def shares(all_pieces: Iterable[Piece], pages: int, threads: int) -> Iterator[list[Piece]]:
    """The pieces of each segment: enough for all threads, not so many that a manifest grows long. `pages`: of all pieces."""
    smallest, largest = _SEGMENT_BYTES
    size = max(smallest, min(largest, pages * PAGE_BYTES // max(_SEGMENTS, 4 * threads)))
    share: list[Piece] = []
    filled = 0
    for piece in all_pieces:
        share.append(piece)
        filled += piece.pages
        if filled * PAGE_BYTES >= size:
            yield share
            share, filled = [], 0
    if share:
        yield share


@dataclass(slots=True, kw_only=True)
class Job:
    """What the threads share: chunks by digest, and the segments that are done.

    `hashing`: segments are hashed while they are written, which is more than half of the work. `staged`: they are made in
    memory, see `staging`; raw ones, without digests.
    """

    out: Path
    compress: bool = False
    hashing: bool = True
    staged: bool = False
    known: dict[tuple[bytes, int], tuple[int, int]] = field(default_factory=dict)
    done: dict[int, _Written] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, number: int, share: Sequence[Piece], read: Read, free: Callable[[Sequence[Piece]], None]) -> None:
        """Make one segment; `free` is told now and then which pieces are no longer needed."""
        written = _Written(number=number, path=self.out / f"segment-{number:05}", hash=hashlib.sha256() if self.hashing else None)
        with ExitStack() as stack:
            if self.staged:
                written.memory = _memory(sum(piece.pages for piece in share) * PAGE_BYTES)
            else:
                written.fd = os.open(written.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                stack.callback(os.close, written.fd)
            buffer = memoryview(bytearray(0 if self.staged else CHUNK_PAGES * PAGE_BYTES))
            for at in range(0, len(share), _FREE_PIECES):
                some = share[at : at + _FREE_PIECES]
                for piece in some:
                    # Where it belongs, so that it is copied once only.
                    view = (written.rest() if self.staged else buffer)[: piece.pages * PAGE_BYTES]
                    written.read_at = written.size_bytes
                    if not read(piece, view):
                        continue
                    written.pieces.append((piece, len(written.runs)))
                    for begin, end in _without_zeros(view, piece.pages):
                        self._add(written, piece, begin, view[begin * PAGE_BYTES : end * PAGE_BYTES])
                free(some)
        self.done[number] = written

    def keep(self, spans: Mapping[int, Sequence[Span]]) -> dict[int, list[Span]]:
        """Forget the pieces that do not lie in `spans` as a whole; returns what is left, by pid.

        Chunks of forgotten pieces stay in the segments, and nothing names them.
        """
        allowed = {pid: union(found) for pid, found in spans.items()}
        begins = {pid: [begin for begin, _ in found] for pid, found in allowed.items()}
        kept: dict[int, list[Span]] = {}
        for written in self.done.values():
            runs: list[_Row] = []
            firsts = [*(first for _, first in written.pieces), len(written.runs)]
            for (piece, first), end in zip(written.pieces, firsts[1:], strict=True):
                at = bisect.bisect_right(begins.get(piece.pid, ()), piece.begin) - 1
                if at >= 0 and piece.begin + piece.pages <= allowed[piece.pid][at][1]:
                    kept.setdefault(piece.pid, []).append((piece.begin, piece.begin + piece.pages))
                    runs += written.runs[first:end]
            written.runs = runs
        return {pid: union(found) for pid, found in kept.items()}

    def in_memory(self) -> dict[Path, mmap.mmap]:
        """The staged segments, by the path that they are for; each has room for more than its size."""
        return {written.path: written.memory for written in self.done.values() if written.memory is not None}

    def _add(self, written: _Written, piece: Piece, begin: int, pages: memoryview) -> None:
        import xxhash

        digest = xxhash.xxh3_128_digest(pages)
        key = (digest, len(pages))
        with self.lock:
            place = self.known.setdefault(key, (written.number, len(written.chunks)))
        if place == (written.number, len(written.chunks)):
            codec, stored = self._encode(pages)
            written.chunks.append((codec, written.size_bytes, len(stored), len(pages) // PAGE_BYTES, digest))
            written.write(stored, written.read_at + begin * PAGE_BYTES)
        written.runs.append((piece.pid, piece.flags, (piece.begin + begin) * PAGE_BYTES, place))

    def _encode(self, pages: memoryview) -> tuple[Codec, memoryview | bytes]:
        if not self.compress:
            return Codec.RAW, pages
        from smr.images.codec import encode

        return encode(pages)

    def result(self) -> Split:
        """The table of all segments; one that nobody needs, since its pages are all elsewhere or zeros, is dropped."""
        order = [self.done[number] for number in sorted(self.done)]
        needed = {number for written in order for _, _, _, (number, _) in written.runs}
        full = [written for written in order if written.number in needed]
        for written in order:
            if written.number not in needed:
                written.drop()
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
        segments = [Segment(path=w.path, digest=w.digest, size_bytes=w.size_bytes) for w in full]
        table = PageTable(segments=[segment.size_bytes for segment in segments], chunks=chunks, runs=runs)
        return Split(table=table, segments=segments)


@dataclass(slots=True, kw_only=True)
class _Written:
    """A segment being written by one thread, to a file or to memory.

    `pieces`: what it was made of, each with the number of its first run. `read_at`: where in memory the last was read to.
    """

    number: int
    path: Path
    size_bytes: int = 0
    chunks: list[tuple[int, int, int, int, bytes]] = field(default_factory=list)
    runs: list[_Row] = field(default_factory=list)
    pieces: list[tuple[Piece, int]] = field(default_factory=list)
    hash: hashlib._Hash | None
    fd: int = -1
    memory: mmap.mmap | None = None
    read_at: int = 0

    def rest(self) -> memoryview:
        """The memory that is not used yet."""
        assert self.memory is not None
        return memoryview(self.memory)[self.size_bytes :]

    def drop(self) -> None:
        """Nobody needs it."""
        if self.memory is None:
            self.path.unlink()
        else:
            self.memory = None

    @property
    def digest(self) -> str:
        """sha256:HEX of what was written, or ""."""
        return f"sha256:{self.hash.hexdigest()}" if self.hash is not None else ""

    def write(self, stored: memoryview | bytes, source: int) -> None:
        """Append a chunk, up to the next page border. In memory it is whole pages, and is at `source` already."""
        if self.memory is not None:
            if source != self.size_bytes:
                self.memory.move(self.size_bytes, source, len(stored))
            self.size_bytes += len(stored)
            return
        for part in (stored, bytes(-len(stored) % PAGE_BYTES)):
            if part:
                if self.hash is not None:
                    self.hash.update(part)
                _write(self.fd, part)
                self.size_bytes += len(part)


def _memory(size_bytes: int) -> mmap.mmap:
    """Anonymous memory, of huge pages where there are some: it is made several times as fast."""
    found = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    with suppress(OSError):
        found.madvise(mmap.MADV_HUGEPAGE)
    return found


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


def _write(fd: int, data: memoryview | bytes) -> None:
    done = 0
    while done < len(data):
        done += os.write(fd, memoryview(data)[done:])
