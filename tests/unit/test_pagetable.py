"""The page table's binary form, and the lies it may tell."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from smr.images.pagetable import PAGE_BYTES, Chunk, Codec, PageTable, Run, parse_table
from smr.proto.errors import Code, SmrError

DIGEST = bytes(range(16))
CHUNKS = [
    Chunk(0, Codec.RAW, 0, 2 * PAGE_BYTES, 2, DIGEST),
    Chunk(0, Codec.ZSTD, 2 * PAGE_BYTES, 100, 3, DIGEST),
    Chunk(1, Codec.RAW, 0, PAGE_BYTES, 1, DIGEST),
]
RUNS = [Run(1, 6, 0x10000, 0), Run(1, 6, 0x12000, 1), Run(7, 4, 0x10000, 2), Run(7, 4, 0x11000, 2)]
TABLE = PageTable(segments=[3 * PAGE_BYTES, PAGE_BYTES], chunks=CHUNKS, runs=RUNS)


def changed(**members: object) -> bytes:
    """The blob of the table with other members."""
    return dataclasses.replace(TABLE, **members).to_bytes()


def test_a_table_is_read_as_it_was_written():
    """Segments, chunks and runs, and what follows from them."""
    table = parse_table(TABLE.to_bytes())
    assert (list(table.segments), list(table.chunks), list(table.runs)) == ([12288, 4096], CHUNKS, RUNS)
    assert table.memory_bytes == 7 * PAGE_BYTES
    assert [(pid, len(runs)) for pid, runs in table.by_process()] == [(1, 2), (7, 2)]


def test_an_empty_table_is_one():
    """No segment, no chunk, no run."""
    table = parse_table(PageTable(segments=[], chunks=[], runs=[]).to_bytes())
    assert table.memory_bytes == 0
    assert list(table.by_process()) == []


@pytest.mark.parametrize(
    ("what", "blob"),
    [
        ("cut", TABLE.to_bytes()[:-1]),
        ("longer", TABLE.to_bytes() + b"\0"),
        ("no table", b"x" * 64),
        ("empty", b""),
        ("runs overlap", changed(runs=[RUNS[0], Run(1, 6, 0x11000, 1)])),
        ("runs out of order", changed(runs=[RUNS[2], RUNS[0]])),
        ("the same run twice", changed(runs=[RUNS[0], RUNS[0]])),
        ("a run of no chunk", changed(runs=[Run(1, 6, 0x10000, 3)])),
        ("a run at no page", changed(runs=[Run(1, 6, 0x10001, 0)])),
        ("a run at zero", changed(runs=[Run(1, 6, 0, 0)])),
        ("a run beyond all addresses", changed(runs=[Run(1, 6, 1 << 57, 0)])),
        ("a chunk behind its segment", changed(segments=[2 * PAGE_BYTES, PAGE_BYTES])),
        ("a chunk of no segment", changed(segments=[3 * PAGE_BYTES])),
        ("chunks overlap", changed(chunks=[CHUNKS[0], CHUNKS[1]._replace(offset=PAGE_BYTES), CHUNKS[2]])),
        ("a chunk at no page", changed(chunks=[CHUNKS[0], CHUNKS[1]._replace(offset=2 * PAGE_BYTES + 512), CHUNKS[2]])),
        ("a raw chunk of another length", changed(chunks=[CHUNKS[0]._replace(stored_bytes=PAGE_BYTES), *CHUNKS[1:]])),
        ("a frame longer than its pages", changed(chunks=[CHUNKS[0], CHUNKS[1]._replace(stored_bytes=12289), CHUNKS[2]])),
        ("a chunk of no pages", changed(chunks=[CHUNKS[0]._replace(pages=0, stored_bytes=0), *CHUNKS[1:]])),
        ("a chunk of too many pages", changed(chunks=[*CHUNKS[:2], CHUNKS[2]._replace(pages=513, stored_bytes=513 * 4096)])),
        ("a codec that nobody knows", changed(chunks=[CHUNKS[0]._replace(codec=3), *CHUNKS[1:]])),
    ],
)
def test_a_table_that_lies_is_refused(what, blob):
    """Each lie by itself is IMAGE_CORRUPT, and none reaches a process."""
    with pytest.raises(SmrError) as caught:
        parse_table(blob, "page table of app:1")
    assert caught.value.code is Code.IMAGE_CORRUPT, what
    assert caught.value.message.startswith("page table of app:1")


def test_a_newer_format_is_said_to_be_one():
    """IMAGE_VERSION, so that the user updates and does not throw the image away."""
    blob = bytearray(TABLE.to_bytes())
    struct.pack_into("<I", blob, 8, 2)
    with pytest.raises(SmrError) as caught:
        parse_table(bytes(blob))
    assert caught.value.code is Code.IMAGE_VERSION
