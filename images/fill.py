"""Write the pages of an image into stopped processes, from all processors at once.

The tree was restored by CRIU without these pages and has not run since, so nothing else writes there. `process_vm_writev` copies
from our memory into theirs and releases the interpreter's lock; memory is charged to the container. Three sources, by piece:

    page cache    the segment is mapped, populated, written from there: one copy (38 GB/s on 16 cores; reading first, 33)
    disk          read with O_DIRECT into an aligned buffer of the thread's; or, where it shall stay, brought into the page cache
    compressed    read, decoded, written

One thread a processor when all is in the page cache, twice as many when threads have to wait for a disk.

Before the first byte is written it is made sure that each process is stopped and has, where the table puts pages, private
anonymous writable memory and nothing else; lengths were checked when the table was parsed. After a failure the tree has some of
its pages: it must be killed. Standard library only (but for decoding).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

from smr.images import process_vm
from smr.images.pagecache import cached_bytes, read_ahead
from smr.images.pagetable import PAGE_BYTES, Chunk, Codec, PageTable, Run
from smr.images.process_vm import Iovec
from smr.images.spans import Span, union
from smr.proto.errors import Code, SmrError

# One call's worth: large enough that the interpreter's share is lost in it, small enough that threads end together.
PIECE_BYTES = 4 << 20
_MAX_THREADS = 16
# CRIU returns while the signal that stops the tree is still on its way.
_STOP_S = 5.0
# UIO_MAXIOV is 1024.
_MAX_RUNS = 512
_MADV_HUGEPAGE = 14


class Source(Enum):
    """How pages come that are not in the page cache: past it (DIRECT; AUTO too, where it can be), or through it (CACHE)."""

    AUTO = auto()
    CACHE = auto()
    DIRECT = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """What was written; of `bytes`, what came from the disk."""

    bytes: int
    read_bytes: int
    pieces: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes [offset, offset + size) of a segment, and where they belong. Of a compressed chunk there is one to a piece."""

    pid: int
    segment: int
    offset: int
    size_bytes: int
    chunk: int
    targets: tuple[Span, ...]


def fill(
    table: PageTable,
    segments: Sequence[Path],
    pids: Mapping[int, int],
    *,
    threads: int | None = None,
    source: Source = Source.AUTO,
    progress: Callable[[int], object] = lambda _: None,
    delivered: Callable[[int, Sequence[Span]], object] | None = None,
) -> Filled:
    """Write all runs; `pids` gives each pid of the table its process here. Returns when every byte is written.

    `threads`: how many processors it may use. `progress` is called now and then with the bytes that are written so far.
    With `delivered` the runs are begun in the order of their addresses, and it is told of each process's spans that are there.

    Raises RESTORE_FAILED when a process is gone, runs, or has no such memory; IMAGE_CORRUPT when a segment is cut.
    """
    for pid, runs in table.by_process():
        _check_process(pid, pids.get(pid, 0), table, runs)
    pieces = list(_pieces(table))
    if delivered is not None:
        pieces.sort(key=lambda piece: (piece.pid, piece.targets[0]))
    with ExitStack() as stack:
        files = [_Segment(stack, path, source) for path in segments]
        job = _Job(table=table, pids=pids, files=files, keep=source is Source.CACHE, progress=progress, delivered=delivered)
        count = threads or min(_MAX_THREADS, len(os.sched_getaffinity(0)))
        if not all(file.cached for file in files):
            count = max(4, 2 * count)
        count = max(1, min(count, len(pieces)))
        for piece in pieces:
            job.todo.put(piece)
        workers = [threading.Thread(target=job.work, name=f"smr-fill-{number}") for number in range(count)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if job.errors:
        raise job.errors[0]
    return Filled(bytes=table.memory_bytes, read_bytes=job.read_bytes, pieces=len(pieces))


def _pieces(table: PageTable) -> Iterator[_Piece]:
    """Runs that follow each other in a segment and belong to one process, together; in the order of the segments."""
    chunks = table.chunks
    group: list[Run] = []
    for run in sorted(table.runs, key=lambda run: (run.chunk, run.pid)):
        if group and not _follows(group, run, table):
            yield _piece(group, chunks)
            group = []
        group.append(run)
    if group:
        yield _piece(group, chunks)


def _follows(group: list[Run], run: Run, table: PageTable) -> bool:
    first, last, chunk = table.chunks[group[0].chunk], table.chunks[group[-1].chunk], table.chunks[run.chunk]
    return (
        run.pid == group[-1].pid
        and run.chunk == group[-1].chunk + 1
        and chunk.codec == last.codec == Codec.RAW
        and chunk.segment == last.segment
        and chunk.offset == last.offset + last.stored_bytes
        and chunk.offset + chunk.stored_bytes - first.offset <= PIECE_BYTES
        and len(group) < _MAX_RUNS
    )


def _piece(group: list[Run], chunks: Sequence[Chunk]) -> _Piece:
    first, last = chunks[group[0].chunk], chunks[group[-1].chunk]
    targets: list[Span] = []
    for run in group:
        size = chunks[run.chunk].pages * PAGE_BYTES
        if targets and targets[-1][1] == run.address:
            targets[-1] = targets[-1][0], run.address + size
        else:
            targets.append((run.address, run.address + size))
    size = last.offset + last.stored_bytes - first.offset
    return _Piece(group[0].pid, first.segment, first.offset, size, group[0].chunk, tuple(targets))


class _Segment:
    """A segment that is open: for the page cache, and past it where that is wanted and the file system can."""

    def __init__(self, stack: ExitStack, path: Path, source: Source) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, self.fd)
        self.size_bytes = os.fstat(self.fd).st_size
        self.cached = cached_bytes(self.fd, 0, self.size_bytes) >= self.size_bytes
        self.direct = self.fd
        if source is not Source.CACHE:
            with suppress(OSError):  # tmpfs before Linux 6.6, for one
                self.direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                stack.callback(os.close, self.direct)


@dataclass(slots=True, kw_only=True)
class _Job:
    """What the threads share. The first error stops them all."""

    table: PageTable
    pids: Mapping[int, int]
    files: Sequence[_Segment]
    keep: bool
    progress: Callable[[int], object]
    delivered: Callable[[int, Sequence[Span]], object] | None = None
    todo: queue.SimpleQueue[_Piece] = field(default_factory=queue.SimpleQueue)
    errors: list[Exception] = field(default_factory=list)
    read_bytes: int = 0
    written_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self) -> None:
        """What each thread does."""
        read = 0
        try:
            with _Buffer(PIECE_BYTES) as buffer:
                while not self.errors:
                    try:
                        piece = self.todo.get_nowait()
                    except queue.Empty:
                        break
                    read += self._deliver(piece, buffer)
                    with self.lock:
                        self.written_bytes += sum(end - begin for begin, end in piece.targets)
                    self.progress(self.written_bytes)
                    if self.delivered is not None:
                        self.delivered(piece.pid, piece.targets)
        except OSError as error:
            self.errors.append(SmrError(f"a page cannot be read: {error}", code=Code.IMAGE_CORRUPT))
        except Exception as error:  # noqa: BLE001  # carried to the caller's thread
            self.errors.append(error)
        with self.lock:
            self.read_bytes += read

    def _deliver(self, piece: _Piece, buffer: _Buffer) -> int:
        """Write one piece; returns how many bytes came from the disk."""
        file, chunk = self.files[piece.segment], self.table.chunks[piece.chunk]
        if piece.offset + piece.size_bytes > file.size_bytes:
            raise _cut(file, piece)
        cached = cached_bytes(file.fd, piece.offset, piece.size_bytes) >= piece.size_bytes
        if chunk.codec != Codec.RAW:
            from smr.images.codec import decode

            stored = buffer.read(file.fd if cached else file.direct, piece, file)
            pages = decode(Codec(chunk.codec), stored, chunk.pages * PAGE_BYTES)
            self._write(piece, _address(pages))
        elif cached or self.keep:
            if not cached:
                read_ahead(file.fd, piece.offset, piece.size_bytes)
            with _Mapped(file.fd, piece.offset, piece.size_bytes) as address:
                self._write(piece, address)
        else:
            buffer.read(file.direct, piece, file)
            self._write(piece, buffer.address)
        return 0 if cached else piece.size_bytes

    def _write(self, piece: _Piece, address: int) -> None:
        """Copy from `address` of ours to the targets, all of them one after the other."""
        sizes = [end - begin for begin, end in piece.targets]
        remote = (Iovec * len(sizes))(*(Iovec(begin, end - begin) for begin, end in piece.targets))
        local = Iovec(address, sum(sizes))
        pid = self.pids[piece.pid]
        done = process_vm.writev(pid, ctypes.byref(local), 1, remote, len(sizes), 0)
        if done == local.size:
            return
        number = ctypes.get_errno() if done < 0 else errno.EFAULT
        where = f"{max(done, 0)} bytes into the run at {piece.targets[0][0]:#x}"
        raise _failed(f"the memory of process {pid} cannot be written {where}: {os.strerror(number)}", pid)


def _address(data: bytes | bytearray | memoryview) -> int:
    """Where the bytes lie: a copy would be made under the interpreter's lock."""
    if isinstance(data, bytes):
        return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _map(size: int, protection: int, flags: int, fd: int, offset: int) -> int:
    address: int | None = _libc.mmap(None, size, protection, flags, fd, offset)
    if address is None or address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return address


class _Mapped:
    """A part of a file, in memory as a whole."""

    def __init__(self, fd: int, offset: int, size_bytes: int) -> None:
        self._size = size_bytes
        self._address = _map(size_bytes, mmap.PROT_READ, mmap.MAP_SHARED | mmap.MAP_POPULATE, fd, offset)

    def __enter__(self) -> int:
        return self._address

    def __exit__(self, *_: object) -> None:
        _libc.munmap(self._address, self._size)


class _Buffer:
    """A thread's memory to read into, aligned for O_DIRECT, made when it is first needed."""

    def __init__(self, size_bytes: int) -> None:
        self._size = size_bytes
        self.address = 0
        self._view = memoryview(b"")

    def __enter__(self) -> _Buffer:
        return self

    def __exit__(self, *_: object) -> None:
        self._view.release()
        if self.address:
            _libc.munmap(self.address, self._size)

    def read(self, fd: int, piece: _Piece, file: _Segment) -> memoryview:
        """The bytes of a piece; what O_DIRECT has to read beyond them is not shown."""
        if not self.address:
            self.address = _map(self._size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
            _libc.madvise(self.address, self._size, _MADV_HUGEPAGE)
            self._view = memoryview((ctypes.c_char * self._size).from_address(self.address)).cast("B")
        whole = piece.size_bytes + -piece.size_bytes % PAGE_BYTES
        done = 0
        while done < piece.size_bytes:
            count = os.preadv(fd, [self._view[done:whole]], piece.offset + done)
            if not count:
                raise _cut(file, piece)
            done += count
        return self._view[: piece.size_bytes]


def _check_process(pid: int, host_pid: int, table: PageTable, runs: Sequence[Run]) -> None:
    """The process is here, stopped, and has memory of the right kind wherever pages are to go."""
    try:
        state = _stopped(host_pid)
        memory = _writable(Path(f"/proc/{host_pid}/maps").read_text(errors="replace"))
    except (OSError, IndexError) as error:
        raise _failed(f"the restored process {pid} is gone", host_pid) from error
    if state not in "Tt":
        raise _failed(f"the restored process {pid} is in state {state}: needed stopped", host_pid)
    spans = iter(memory)
    begin, end = 0, 0
    for run in runs:
        last = run.address + table.pages(run) * PAGE_BYTES
        while end < last and (span := next(spans, None)) is not None:
            begin, end = span
        if not begin <= run.address < last <= end:
            raise _failed(
                f"the restored process {pid} has no private writable memory at {run.address:#x} to {last:#x}, where pages belong",
                host_pid,
            )


def _stopped(host_pid: int) -> str:
    """The process's state, once it is stopped or that has taken too long."""
    deadline = time.monotonic() + _STOP_S
    while True:
        state = Path(f"/proc/{host_pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        if state in "TtZX" or time.monotonic() > deadline:
            return state
        time.sleep(0.001)


def _writable(maps: str) -> list[Span]:
    """Private anonymous mappings that can be read and written; those that touch are joined."""
    found = []
    for line in maps.splitlines():
        words = line.split(maxsplit=5)
        if words[1].startswith("rw") and words[1].endswith("p") and words[4] == "0":
            begin, end = words[0].split("-")
            found.append((int(begin, 16), int(end, 16)))
    return union(found)


def _cut(file: _Segment, piece: _Piece) -> SmrError:
    return SmrError(
        f"segment {file.path.name[:12]} is cut: found {file.size_bytes} bytes, needed {piece.offset + piece.size_bytes}",
        hint="remove the image with 'smr images rm' and make or import it again",
        code=Code.IMAGE_CORRUPT,
        blob=file.path,
    )


def _failed(what: str, pid: int) -> SmrError:
    return SmrError(what, code=Code.RESTORE_FAILED, pid=pid)
