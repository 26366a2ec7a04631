"""Put the pages that were split off back into CRIU's files: the stock way to restore, and what other tools can read.

The inverse of `smr.images.split`, but for blocks of zeros, which were dropped and are not missed, and for the wish for huge
pages, which stays. `folder` holds the stripped files, free to be written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from smr.images.files import writing
from smr.images.pagemap import Entry, Pagemap, read_pagemap, write_pagemap
from smr.images.pagetable import PAGE_BYTES, Chunk, Codec, PageTable, Run
from smr.proto.errors import Code, SmrError

_MAX_THREADS = 8


def join(folder: Path, table: PageTable, segments: Sequence[Path]) -> None:
    """Rewrite pagemap-PID.img and pages-N.img of each process that has runs. Raises IMAGE_CORRUPT, DISK_FULL."""
    with ExitStack() as stack, writing(folder, table.memory_bytes):
        files = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in segments]
        for fd in files:
            stack.callback(os.close, fd)
        with ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0))), thread_name_prefix="smr-join") as pool:
            for pid, runs in table.by_process():
                _join_process(read_pagemap(folder / f"pagemap-{pid}.img"), runs, table, files, pool)


def _join_process(
    pagemap: Pagemap, runs: Sequence[Run], table: PageTable, files: Sequence[int], pool: ThreadPoolExecutor
) -> None:
    merged = sorted([*_parts(pagemap.entries, runs, table)], key=lambda part: part[0].begin)
    _check(pagemap, [entry for entry, _ in merged])
    path = pagemap.pages_path
    new = path.with_name(f"{path.name}.joined")
    old = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    out = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        work, at = [], 0
        for entry, chunk in merged:
            work.append((entry, chunk, at))
            at += (entry.end - entry.begin) * PAGE_BYTES if entry.present else 0
        for _ in pool.map(lambda item: _put(item[0], item[1], item[2], old, files, out), work):
            pass
    finally:
        os.close(out)
        os.close(old)
    new.replace(path)
    write_pagemap(pagemap, [entry for entry, _ in merged])


def _parts(entries: Sequence[Entry], runs: Sequence[Run], table: PageTable) -> Iterator[tuple[Entry, Chunk | None]]:
    for entry in entries:
        yield entry, None
    for run in runs:
        begin = run.address // PAGE_BYTES
        yield Entry(begin, begin + table.pages(run), 0, run.flags), table.chunks[run.chunk]


def _check(pagemap: Pagemap, entries: Sequence[Entry]) -> None:
    for before, after in pairwise(entries):
        if before.end > after.begin:
            raise SmrError(
                f"the page table and {pagemap.path.name} both have the page at {after.begin * PAGE_BYTES:#x}",
                hint="make or import the image again",
                code=Code.IMAGE_CORRUPT,
            )


def _put(entry: Entry, chunk: Chunk | None, at: int, old: int, files: Sequence[int], out: int) -> None:
    """Copy the pages of one entry to their place."""
    if not entry.present:
        return
    size = (entry.end - entry.begin) * PAGE_BYTES
    if chunk is None:
        _copy(old, entry.first * PAGE_BYTES, out, at, size)
    elif chunk.codec == Codec.RAW:
        _copy(files[chunk.segment], chunk.offset, out, at, size)
    else:
        from smr.images.codec import decode

        stored = os.pread(files[chunk.segment], chunk.stored_bytes, chunk.offset)
        pages = decode(Codec(chunk.codec), stored, size)
        _write(out, pages, at)


def _copy(source: int, offset: int, out: int, at: int, size: int) -> None:
    """In the kernel, and without a copy where the file system shares extents."""
    end = offset + size
    while offset < end:
        count = os.copy_file_range(source, out, end - offset, offset, at)
        if not count:
            raise SmrError(f"pages end at byte {offset}, {end - offset} before their end", code=Code.IMAGE_CORRUPT)
        offset, at = offset + count, at + count


def _write(out: int, pages: bytes | bytearray | memoryview, at: int) -> None:
    done = 0
    while done < len(pages):
        done += os.pwrite(out, memoryview(pages)[done:], at + done)
