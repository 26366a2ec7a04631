"""Take the pages that SMR delivers itself out of a dump, and make segments of them.

    folder/pagemap-PID.img, pages-N.img    what is left to CRIU: a dump that is whole but for those pages
    folder/mm-PID.img                      VMAs that are nearly full of them ask for huge pages
    out/segment-NNNNN                      the pages, cut into chunks; the page table says where they belong

What was read is punched out of pages-N.img at once, so that neither disk nor page cache hold it twice. How segments are made:
`cutting`. The same from the processes themselves, without a copy in CRIU's files: `livesplit`.

After a failure `folder` and `out` are of no use: both belong to an ingest, which drops them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from smr.images.criu_files import write_messages
from smr.images.cutting import NOTHING, Job, Piece, Segment, Split, pieces, shares, thread_count
from smr.images.eligible import Memory, choose, may_move, span_of
from smr.images.files import writing
from smr.images.pagemap import Entry, read_vmas, write_pagemap
from smr.images.pagetable import CHUNK_PAGES, PAGE_BYTES
from smr.images.spans import Span, intersect, total

__all__ = ["MIN_SPLIT_BYTES", "Segment", "Split", "ask_for_huge_pages", "kept_path", "split"]

# Below this CRIU restores as fast as another program starts.
MIN_SPLIT_BYTES = 16 << 20
_MADV_HUGEPAGE, _MADV_NOHUGEPAGE = 1 << 14, 1 << 15
# Of the huge pages of a VMA, the share that must be ours before it is made of huge pages only.
_DENSE = 0.875
_DENSE_PAGES = 8 * CHUNK_PAGES
_PUNCH_HOLE_KEEP_SIZE = 0x2 | 0x1


def split(folder: Path, out: Path, *, compress: bool = False, threads: int | None = None) -> Split:
    """Split the dump in `folder`; segments are written to the directory `out`, on any file system.

    Raises IMAGE_CORRUPT when CRIU's images do not fit together, DISK_FULL.
    """
    memories = choose(folder)
    moved_pages = sum(total(memory.moved) for memory in memories)
    if moved_pages * PAGE_BYTES < MIN_SPLIT_BYTES:
        return NOTHING
    moved = [memory for memory in memories if memory.moved]
    with writing(out, moved_pages * PAGE_BYTES):
        for memory in moved:
            _copy_kept(memory)
        job = Job(out=out, compress=compress)
        with ExitStack() as stack:
            files = {memory.pid: _open(stack, memory.pagemap.pages_path) for memory in moved}

            def read(piece: Piece, view: memoryview) -> bool:
                _read(files[piece.pid], view, piece.first * PAGE_BYTES)
                return True

            def free(some: Sequence[Piece]) -> None:
                for pid, (begin, end) in _freed(some):
                    _punch(files[pid], begin, end)

            count = thread_count(threads)
            every = (piece for memory in moved for piece in pieces(memory.pid, memory.moved_entries()))
            with ThreadPoolExecutor(count, thread_name_prefix="smr-split") as pool:
                work = enumerate(shares(every, moved_pages, count))
                list(pool.map(lambda item: job.write(item[0], item[1], read, free), list(work)))
        for memory in moved:
            write_pagemap(memory.pagemap, list(memory.kept_entries()))
            kept_path(memory).replace(memory.pagemap.pages_path)
            ask_for_huge_pages(folder, memory)
    return job.result()


def kept_path(memory: Memory) -> Path:
    """Where the pages that stay are gathered, before they replace the old file."""
    path = memory.pagemap.pages_path
    return path.with_name(f"{path.name}.kept")


def ask_for_huge_pages(folder: Path, memory: Memory) -> None:
    """VMAs that are nearly full of pages of ours are made of huge pages by the restore."""
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


def _copy_kept(memory: Memory) -> None:
    """The pages that stay, in a file beside the old one, which is about to get holes."""
    with memory.pagemap.pages_path.open("rb") as source, kept_path(memory).open("xb") as target:
        for entry in memory.kept_entries():
            _send(source.fileno(), target.fileno(), entry)


def _send(source: int, target: int, entry: Entry) -> None:
    offset, left = entry.first * PAGE_BYTES, (entry.end - entry.begin) * PAGE_BYTES
    while left:
        count = os.sendfile(target, source, offset, left)
        if not count:
            raise EOFError(f"pages end at {offset}")  # the length was checked: somebody else writes here
        offset, left = offset + count, left - count


def _freed(pieces: Sequence[Piece]) -> Iterator[tuple[int, Span]]:
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


def _punch(fd: int, begin: int, end: int) -> None:
    """Free pages of a file; where the file system cannot, they go with the file."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
    libc.fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, begin * PAGE_BYTES, (end - begin) * PAGE_BYTES)
