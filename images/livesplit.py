"""Segments straight from processes that hold still, where CRIU's dump has left their pages out.

A dump with --lazy-pages writes all of CRIU's files, and of memory that can be lazy only where it is (pagemap entries with PE_LAZY
and without PE_PRESENT). The pages are still in the processes. They are read from there by many threads, into the very segments
and files that `split` would have made of a whole dump; there is no second copy to write and to free.

    before CRIU      the tree holds still: `begin` reads plain memory in the background, in a guess of what will be ours
    CRIU's dump      runs beside that
    `finish`         what is ours is said by CRIU's images (`eligible`), as for any dump; guesses that are not exactly that are
                     forgotten, what is missing is read; pages that stay CRIU's are put into pages-N.img

The folder is then a stripped dump as `split` leaves it. Segments have no digest yet: processes wait, and hashing takes longer
than all the rest. `complete` puts all pages into CRIU's files instead: a whole dump.
Between the dump and these, nothing of the tree may run: the caller sees to that, and asks afterwards whether it was so.
After a failure the folder and `out` are of no use; the processes were only read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from smr.images.cutting import NOTHING, Job, Piece, Split, pieces, shares, thread_count
from smr.images.eligible import MIN_RUN_PAGES, Memory, choose, read_memories
from smr.images.files import writing
from smr.images.live import Live
from smr.images.pagemap import PE_LAZY, PE_PRESENT, Entry, write_pagemap
from smr.images.pagetable import CHUNK_PAGES, PAGE_BYTES
from smr.images.spans import Span, intersect, subtract, total
from smr.images.split import MIN_SPLIT_BYTES, ask_for_huge_pages, kept_path
from smr.images.staging import Staged
from smr.proto.errors import Code, SmrError

_TAKEN = PE_LAZY | PE_PRESENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What came of it. `memory_bytes`: how large the pages files of a whole dump would have been."""

    split: Split
    memory_bytes: int
    staged: Staged

    def land(self) -> Split:
        """The split of a whole dump, its segments in their files: when nobody waits any more, once. Raises DISK_FULL."""
        return self.staged.land(self.split)


class LiveSplit:
    """One dump of a tree that holds still. A context manager: what was begun is over when it is left."""

    def __init__(self, out: Path, pids: Mapping[int, int], *, staged: bool = False, threads: int | None = None) -> None:
        """`out`: a directory for the segments; `pids`: image pid -> host pid, of all processes; `staged`: they wait in memory.

        Raises CHECKPOINT_FAILED.
        """
        self._out, self._threads = out, thread_count(threads)
        self._live = Live(pids)
        self._job = Job(out=out, hashing=False, staged=staged)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="smr-live")
        self._early: list[Future[None]] = []
        self._guess: Future[None] | None = None
        self._numbers = 0
        self._stop = threading.Event()

    def __enter__(self) -> LiveSplit:
        self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        self._live.__exit__(kind, error, traceback)

    def begin(self) -> None:
        """Start to read, in the background. The tree holds still already, and nothing else is done to it but CRIU's dump."""
        self._guess = self._pool.submit(self._read_ahead)

    def finish(self, folder: Path) -> Taken | None:
        """After the dump into `folder`: segments, and a stripped dump. None where the dump has all its pages itself.

        Raises IMAGE_CORRUPT, DISK_FULL, and CHECKPOINT_FAILED when a process is gone.
        """
        if not self._of_this_tree(read_memories(folder)):
            return None
        memories = choose(folder, self._live)
        moved_pages = sum(total(memory.moved) for memory in memories)
        if moved_pages * PAGE_BYTES < MIN_SPLIT_BYTES:
            return self.complete(folder)
        moved = {memory.pid: memory.moved for memory in memories}
        with writing(self._out, moved_pages * PAGE_BYTES):
            self._end_of_early()
            taken = self._job.keep({memory.pid: _of_lazy(memory) for memory in memories})
            rest = {pid: subtract(spans, taken.get(pid, [])) for pid, spans in moved.items()}
            every = (piece for memory in memories for piece in _pieces(memory, rest[memory.pid]))
            work = self._submit(every, sum(map(total, rest.values())), self._read)
            for memory in memories:
                self._keep(memory)
            _wait(work)
        for memory in memories:
            if memory.moved:
                ask_for_huge_pages(folder, memory)
        self._live.check()
        memory_bytes = _pages_bytes(folder) + moved_pages * PAGE_BYTES
        return Taken(split=self._job.result(), memory_bytes=memory_bytes, staged=Staged(files=self._job.in_memory()))

    def complete(self, folder: Path) -> Taken | None:
        """After the dump into `folder`: all its pages in CRIU's files. None where that is so already. Raises as `finish`."""
        self._stop.set()
        memories = read_memories(folder)
        if not self._of_this_tree(memories):
            return None
        lazy = sum(entry.end - entry.begin for memory in memories for entry in memory.pagemap.entries if entry.left_out)
        with writing(folder, lazy * PAGE_BYTES):
            for memory in memories:
                self._keep(memory)
            self._end_of_early()
        self._job.keep({})
        self._job.result()
        self._live.check()
        return Taken(split=NOTHING, memory_bytes=_pages_bytes(folder), staged=Staged(files={}))

    def _read_ahead(self) -> None:
        guess = self._live.candidates()
        spans = [(pid, span) for pid, found in guess.items() for span in _apart(found) if span[1] - span[0] >= MIN_RUN_PAGES]
        every = (piece for pid, (begin, end) in spans for piece in pieces(pid, [Entry(begin, end, 0, _TAKEN)]))
        self._early += self._submit(every, total(span for _, span in spans), self._try_read)

    def _end_of_early(self) -> None:
        if self._guess is not None:
            self._guess.result()
            _wait(self._early)

    def _submit(self, every: Iterable[Piece], pages: int, read: Callable[[Piece, memoryview], bool]) -> list[Future[None]]:
        work = []
        for share in shares(every, pages, self._threads):
            work.append(self._pool.submit(self._job.write, self._numbers, share, read, _keep_all))
            self._numbers += 1
        return work

    def _try_read(self, piece: Piece, view: memoryview) -> bool:
        return not self._stop.is_set() and self._live.try_read(piece.pid, piece.begin, view)

    def _read(self, piece: Piece, view: memoryview) -> bool:
        self._live.read(piece.pid, piece.begin, view)
        return True

    def _of_this_tree(self, memories: Sequence[Memory]) -> bool:
        """Whether the dump has left pages out, of processes that we know."""
        lazy = [memory for memory in memories if any(entry.left_out for entry in memory.pagemap.entries)]
        if missing := [memory.pid for memory in lazy if memory.pid not in self._live.pids]:
            raise SmrError(
                f"process {missing[0]} of the dump is not in the container's tree",
                hint="checkpoint again",
                code=Code.CHECKPOINT_FAILED,
            )
        return bool(lazy)

    def _keep(self, memory: Memory) -> None:
        """Put what stays CRIU's of a process into its pages file."""
        if not any(entry.left_out for entry in memory.pagemap.entries):
            return
        kept = list(memory.kept_entries())
        path = kept_path(memory)
        out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _wait(self._copy(memory, kept, out))
        finally:
            os.close(out)
        path.replace(memory.pagemap.pages_path)
        write_pagemap(memory.pagemap, [_present(entry) for entry in kept])

    def _copy(self, memory: Memory, kept: Sequence[Entry], out: int) -> list[Future[None]]:
        """Writes of the entries, one after the other in the file, under way."""
        work, at = [], 0
        for entry in kept:
            if entry.left_out:
                for piece in pieces(memory.pid, [entry]):
                    place = at + (piece.begin - entry.begin) * PAGE_BYTES
                    work.append(self._pool.submit(self._put, piece, out, place))
            elif entry.present:
                work.append(self._pool.submit(_send, memory.pagemap.pages_path, entry, out, at))
            else:
                continue  # in a parent dump
            at += (entry.end - entry.begin) * PAGE_BYTES
        return work

    def _put(self, piece: Piece, out: int, at: int) -> None:
        view = memoryview(bytearray(piece.pages * PAGE_BYTES))
        self._live.read(piece.pid, piece.begin, view)
        while view:
            count = os.pwrite(out, view, at)
            view, at = view[count:], at + count


def _apart(spans: Sequence[Span]) -> Iterator[Span]:
    """Without what is there twice: a page that two runs bring is a table that no restore takes."""
    last = 0
    for begin, end in sorted(spans):
        if max(begin, last) < end:
            yield max(begin, last), end
        last = max(last, end)


def _of_lazy(memory: Memory) -> list[Span]:
    """What a guess may have been right about: its pieces have the flags of memory that can be lazy."""
    lazy = [(entry.begin, entry.end) for entry in memory.pagemap.entries if entry.flags | PE_PRESENT == _TAKEN]
    return intersect(memory.moved, lazy)


def _pieces(memory: Memory, spans: Sequence[Span]) -> Iterable[Piece]:
    return pieces(memory.pid, map(_present, replace(memory, moved=list(spans)).moved_entries()))


def _present(entry: Entry) -> Entry:
    return replace(entry, flags=entry.flags | PE_PRESENT) if entry.left_out else entry


def _send(source: Path, entry: Entry, out: int, at: int) -> None:
    """Pages that CRIU has written, at their new place."""
    offset, left = entry.first * PAGE_BYTES, (entry.end - entry.begin) * PAGE_BYTES
    with source.open("rb") as file:
        while left:
            data = os.pread(file.fileno(), min(left, CHUNK_PAGES * PAGE_BYTES), offset)
            if not data:
                raise EOFError(f"pages end at {offset}")  # the length was checked: somebody else writes here
            count = os.pwrite(out, data, at)
            offset, at, left = offset + count, at + count, left - count


def _pages_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("pages-*.img"))


def _keep_all(_: Sequence[Piece]) -> None:
    """Nothing is to be freed: what was read is the process's."""


def _wait(work: Iterable[Future[None]]) -> None:
    for future in work:
        future.result()
