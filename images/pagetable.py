"""The page table of an image: which chunk of which segment belongs at which address of which process.

    header     8s magic "SMRPAGES", u32 version, u32 segments, u32 chunks, u32 runs
    segments   u64 size_bytes, in the order of the manifest's SEGMENT layers
    chunks     u32 segment, u32 codec, u64 offset, u32 stored_bytes, u32 pages, 16s XXH3-128 of the pages; by segment, offset
    runs       u32 pid, u32 flags, u64 address, u32 chunk, 4 bytes of nothing; by pid, address

All little endian. A run is a whole chunk at an address; two runs with the same bytes share a chunk. Pages are 4096 bytes. `pid`
is the process's in the container's pid namespace, `flags` are those of CRIU's pagemap entry that the run was cut from. Chunks
begin at multiples of 4096 in their segment, so that they can be read past the page cache.

A table that was parsed is safe to use: runs do not overlap, name chunks that are there, and chunks lie inside their segments, do
not overlap and say a length that their codec can have. Whether the process has such an address is asked of the process.
Standard library only.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import NamedTuple

from smr.proto.errors import Code, SmrError

PAGE_BYTES = 4096
# A chunk is at most what one huge page holds.
CHUNK_PAGES = 512
VERSION = 1
_MAGIC = b"SMRPAGES"
_HEADER = struct.Struct("<8sIIII")
_SEGMENT = struct.Struct("<Q")
_CHUNK = struct.Struct("<IIQII16s")
_RUN = struct.Struct("<IIQI4x")
_ADDRESS_END = 1 << 57


class Codec(IntEnum):
    """How a chunk is stored: RAW, ZSTD, or ZSTD after its bytes were sorted into two planes (bf16 and fp16 weights)."""

    RAW = 0
    ZSTD = 1
    ZSTD_PLANES = 2


class Chunk(NamedTuple):
    """Pages as they lie in a segment. `digest` is XXH3-128 of the pages, canonical form."""

    segment: int
    codec: int
    offset: int
    stored_bytes: int
    pages: int
    digest: bytes


class Run(NamedTuple):
    """A chunk at an address of a process."""

    pid: int
    flags: int
    address: int
    chunk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTable:
    """All of them. `segments` are sizes in bytes."""

    segments: Sequence[int]
    chunks: Sequence[Chunk]
    runs: Sequence[Run]

    @property
    def memory_bytes(self) -> int:
        """Memory that the runs fill."""
        return sum(self.chunks[run.chunk].pages for run in self.runs) * PAGE_BYTES

    def pages(self, run: Run) -> int:
        """Length of a run."""
        return self.chunks[run.chunk].pages

    def by_process(self) -> Iterator[tuple[int, Sequence[Run]]]:
        """The runs of each process."""
        begin = 0
        for end in range(1, len(self.runs) + 1):
            if end == len(self.runs) or self.runs[end].pid != self.runs[begin].pid:
                yield self.runs[begin].pid, self.runs[begin:end]
                begin = end

    def part(self, chosen: Callable[[Run], Run | None]) -> PageTable:
        """The same with other runs: what `chosen` makes of each, in the order of pid and address."""
        runs = [run for before in self.runs if (run := chosen(before)) is not None]
        return PageTable(segments=self.segments, chunks=self.chunks, runs=sorted(runs, key=lambda run: (run.pid, run.address)))

    def to_bytes(self) -> bytes:
        """The blob."""
        parts = [_HEADER.pack(_MAGIC, VERSION, len(self.segments), len(self.chunks), len(self.runs))]
        parts += [_SEGMENT.pack(size) for size in self.segments]
        parts += [_CHUNK.pack(*chunk) for chunk in self.chunks]
        parts += [_RUN.pack(*run) for run in self.runs]
        return b"".join(parts)


def parse_table(data: bytes, what: str = "page table") -> PageTable:
    """Read a blob. Raises IMAGE_VERSION for a newer format, IMAGE_CORRUPT for one that is cut or that lies."""
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise _corrupt(what, "does not begin as one")
    _, version, segments, chunks, runs = _HEADER.unpack_from(data)
    if version > VERSION:
        raise SmrError(
            f"{what} has format version {version}, this SMR reads up to {VERSION}",
            hint="install a newer SMR on this node",
            code=Code.IMAGE_VERSION,
        )
    ends = [_HEADER.size]
    for count, record in ((segments, _SEGMENT), (chunks, _CHUNK), (runs, _RUN)):
        ends.append(ends[-1] + count * record.size)
    if ends[-1] != len(data):
        raise _corrupt(what, f"has {len(data)} bytes, its header says {ends[-1]}")
    view = memoryview(data)
    table = PageTable(
        segments=[size for (size,) in _SEGMENT.iter_unpack(view[ends[0] : ends[1]])],
        # Not Chunk._make, which is Python: a restore waits for this, and there are 500 of each in a GiB.
        chunks=list(map(partial(tuple.__new__, Chunk), _CHUNK.iter_unpack(view[ends[1] : ends[2]]))),
        runs=list(map(partial(tuple.__new__, Run), _RUN.iter_unpack(view[ends[2] : ends[3]]))),
    )
    _check_chunks(table, what)
    _check_runs(table, what)
    return table


def _check_chunks(table: PageTable, what: str) -> None:
    last, end = -1, 0
    room = 0
    for number, chunk in enumerate(table.chunks):
        segment, codec, offset, stored, pages, _ = chunk
        if (
            segment == last
            and codec == 0
            and 0 < pages <= CHUNK_PAGES
            and stored == pages * PAGE_BYTES
            and end <= offset <= room - stored
            and offset % PAGE_BYTES == 0
        ):
            end = offset + stored
            continue  # as nearly all are; the rest says what is wrong, if anything is
        if chunk.segment != last:
            if not last < chunk.segment < len(table.segments):
                raise _corrupt(what, f"chunk {number} is of segment {chunk.segment} of {len(table.segments)}, after {last}")
            last, end, room = chunk.segment, 0, table.segments[chunk.segment]
        if not 0 < chunk.pages <= CHUNK_PAGES or chunk.codec not in (0, 1, 2):
            raise _corrupt(what, f"chunk {number} has {chunk.pages} pages and codec {chunk.codec}")
        full = chunk.pages * PAGE_BYTES
        if not (chunk.stored_bytes == full if chunk.codec == Codec.RAW else 0 < chunk.stored_bytes < full):
            raise _corrupt(what, f"chunk {number} has {chunk.stored_bytes} bytes for {chunk.pages} pages")
        if chunk.offset % PAGE_BYTES or not end <= chunk.offset <= room - chunk.stored_bytes:
            raise _corrupt(what, f"chunk {number} is at {chunk.offset} of a segment of {room} bytes")
        end = chunk.offset + chunk.stored_bytes


def _check_runs(table: PageTable, what: str) -> None:
    count = len(table.chunks)
    pages = [chunk.pages for chunk in table.chunks]
    last, end = -1, 0
    for pid, _, address, chunk in table.runs:
        if chunk >= count or address % PAGE_BYTES or not 0 < address < _ADDRESS_END:
            raise _corrupt(what, f"a run of process {pid} is at {address:#x}, of chunk {chunk} of {count}")
        if pid < last or (pid == last and address < end):
            raise _corrupt(what, f"runs of process {pid} overlap or are not in order at {address:#x}")
        last, end = pid, address + pages[chunk] * PAGE_BYTES


def _corrupt(what: str, found: str) -> SmrError:
    return SmrError(f"{what}: {found}", hint="make or import the image again", code=Code.IMAGE_CORRUPT)
