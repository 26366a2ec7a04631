"""Read an image into the page cache before a restore asks for it, several pieces at a time.

As a program: `python -I -m smr.images.prefetch STORE REFERENCE [CANCEL] [--while PATH] [--share S]`, started while the engine
still mounts and wires. It ends when all is read, when a file CANCEL appears, when PATH is no more (the bundle of a container that
was given up), or by a signal. It changes nothing but the page cache, keeps no lease, and leaves the cgroup that it was started in
(smr.images.charge).

How much: never more than a share of the memory that is available, and never so much that the container which is to be restored
finds no room, because an image of N bytes becomes a process of N bytes: `cache_room`. `plan` says from the same rule whether a
restore should go through the page cache at all; the program reads the pages only then.

How fast: a device's queue files do not say what it can do (virtual disks call themselves rotational and have one queue). So it is
measured: two readers begin, and are doubled as long as that brings a fifth more. Readers copy nothing (pagecache.read_ahead), so
that the processors are the restore's.

Shared: who prefetches holds a flock on each blob. The second of the same image waits, finds all in memory, and reads nothing;
when the first is cancelled, it goes on.
Standard library only.
"""

from __future__ import annotations

import fcntl
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from smr.images.files import try_lock
from smr.images.image import Image, Layer
from smr.images.pagecache import available_bytes, cached_bytes, cached_bytes_of, read_ahead
from smr.proto.checkpoint import LayerType
from smr.proto.errors import Code, SmrError, exit_status

PIECE_BYTES = 8 << 20
SHARE = 0.5
_READERS_MOST = 16
_GAIN = 1.2
_WINDOW_PIECES = 2
_POLL_S = 0.02
# In the order in which a restore needs them.
_SMALL = (LayerType.CRIU, LayerType.ROOTFS, LayerType.TMPFS)
_BULK = (LayerType.PAGES, LayerType.PAGETABLE, LayerType.SEGMENT)


class Way(StrEnum):
    """How the pages should come: through the page cache, or past it (O_DIRECT)."""

    CACHE = "cache"
    DIRECT = "direct"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `way` was chosen from: of the image's `total_bytes`, how many are cached, and for how many more there is room."""

    way: Way
    total_bytes: int
    cached_bytes: int
    room_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefetched:
    """What came of it, in bytes: of `total`, what was `cached` before, was `read`, and was `left` for want of memory or time."""

    total_bytes: int
    cached_bytes: int
    read_bytes: int
    left_bytes: int
    cancelled: bool


def cache_room(available: int, container_bytes: int, share: float = SHARE) -> int:
    """How many bytes may be read into the page cache: a share of what is available, less where the container would miss it."""
    return max(0, min(int(share * available), available - container_bytes))


def plan(image: Image, available: int, *, share: float = SHARE) -> Plan:
    """Whether the pages of `image` should go through the page cache: when what is not there yet has room beside the container.

    Past the cache the device's own speed is reached with less memory and processor time, but nobody else profits.
    """
    sizes = {layer.path: layer.size_bytes for layer in image.layers}
    total, cached = sum(sizes.values()), cached_total(image)
    room = cache_room(available, image.config.memory_bytes, share)
    way = Way.CACHE if total - cached <= room else Way.DIRECT
    return Plan(way=way, total_bytes=total, cached_bytes=cached, room_bytes=room)


def prefetch(
    image: Image,
    *,
    threads: int | None = None,
    cancel: Path | None = None,
    alive: Path | None = None,
    share: float = SHARE,
    bulk: bool = True,
    progress: Callable[[int], object] | None = None,
) -> Prefetched:
    """Read what a restore of `image` will read, without the pages unless `bulk`.

    Until done, out of room, `cancel` exists, or `alive` does not. `threads`: None for as many as the device makes use of.
    `progress` gets the bytes that were dealt with, from any thread. Raises IMAGE_CORRUPT when a blob cannot be read.
    """
    pieces = list(_pieces(image, (*_SMALL, *_BULK) if bulk else _SMALL))
    job = _Job(pieces=iter(pieces), cancel=cancel, alive=alive, progress=progress, ramp=_Ramp(threads))
    try:
        with _sole({piece.path for piece in pieces}, job.stopped):
            # Only now: who was before us has changed it.
            job.budget_bytes = cache_room(available_bytes(), image.config.memory_bytes, share)
            job.cached = {piece: _cached(piece) for piece in pieces}
            job.run()
    except OSError as error:
        job.errors.append(error)
    if job.errors:
        raise SmrError(
            f"cannot read image {image.reference}: {job.errors[0]}",
            hint=f"'smr images verify {image.reference}' says what is damaged",
            code=Code.IMAGE_CORRUPT,
            image=image.reference,
        ) from job.errors[0]
    total = sum(piece.size_bytes for piece in pieces)
    cached = sum(job.cached.values())
    # The kernel reads a little past what it is asked for: what a reader finds in memory may be the work of its neighbour.
    read = sum(piece.size_bytes - job.cached[piece] for piece in job.done)
    return Prefetched(
        total_bytes=total, cached_bytes=cached, read_bytes=read, left_bytes=total - cached - read, cancelled=job.cancelled
    )


def cached_total(image: Image) -> int:
    """Bytes of the image's layers that are in memory; a blob that is missing or cannot be opened has none."""
    found = 0
    for path in {layer.path for layer in image.layers}:
        try:
            found += cached_bytes_of(path)
        except OSError:
            continue
    return found


def cached_share(image: Image) -> float:
    """The share of the image's layers that is in memory, 0 to 1; 1 for an image without bytes."""
    total = sum({layer.path: layer.size_bytes for layer in image.layers}.values())
    return cached_total(image) / total if total else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    path: Path
    offset: int
    size_bytes: int


class _Ramp:
    """How many readers there should be. Told of every piece read; not safe by itself, the job's lock is held."""

    def __init__(self, threads: int | None) -> None:
        self.readers = max(1, threads or 2)
        self._most = self.readers if threads else max(2, min(_READERS_MOST, os.cpu_count() or 1))
        self._best = 0.0
        self._bytes = 0
        self._since = time.monotonic()

    def read(self, size_bytes: int) -> None:
        """Each reader did some pieces: if they are faster by a fifth than half as many were, twice as many are worth a try."""
        self._bytes += size_bytes
        if self.readers >= self._most or self._bytes < self.readers * _WINDOW_PIECES * PIECE_BYTES:
            return
        now = time.monotonic()
        rate, self._bytes, self._since = self._bytes / max(now - self._since, 1e-6), 0, now
        if rate > self._best * _GAIN:
            self._best, self.readers = rate, min(self._most, 2 * self.readers)
        else:
            self._most = self.readers


@dataclass(kw_only=True)
class _Job:
    """What the threads share. `budget_bytes` is what may still be read, `cached` what was in memory before any was, `done` is."""

    pieces: Iterator[_Piece]
    cancel: Path | None
    alive: Path | None
    progress: Callable[[int], object] | None
    ramp: _Ramp
    budget_bytes: int = 0
    cached: dict[_Piece, int] = field(default_factory=dict)
    done: list[_Piece] = field(default_factory=list)
    cancelled: bool = False
    errors: list[OSError] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    workers: list[threading.Thread] = field(default_factory=list)

    def run(self) -> None:
        """Start the readers, and wait for them and for those that they start."""
        if self.cancelled:
            return
        self._hire()
        for worker in self.workers:  # it grows meanwhile, and only by those that are still in it
            worker.join()

    def stopped(self) -> bool:
        """Whether nobody wants this any more."""
        if not self.cancelled:
            gone = self.alive is not None and not self.alive.exists()
            self.cancelled = gone or (self.cancel is not None and self.cancel.exists())
        return self.cancelled

    def _hire(self) -> None:
        with self.lock:
            while len(self.workers) < self.ramp.readers:
                worker = threading.Thread(target=self._work, name=f"smr-prefetch-{len(self.workers)}", daemon=True)
                self.workers.append(worker)
                worker.start()

    def _work(self) -> None:
        try:
            while piece := self._take():
                self._read(piece)
                if self.progress is not None:
                    self.progress(piece.size_bytes)
                self._hire()
        except OSError as error:
            self.errors.append(error)

    def _take(self) -> _Piece | None:
        """The next piece to look at; None when there is no more to do."""
        with self.lock:
            return None if self.errors or self.stopped() else next(self.pieces, None)

    def _allow(self, size_bytes: int) -> bool:
        """Whether so much more may be read; if so it is taken off the budget."""
        with self.lock:
            if size_bytes > self.budget_bytes:
                return False
            self.budget_bytes -= size_bytes
            return True

    def _read(self, piece: _Piece) -> None:
        missing = piece.size_bytes - _cached(piece)
        if missing and not self._allow(missing):
            return
        if missing:
            with _opened(piece) as fd:
                read_ahead(fd, piece.offset, piece.size_bytes)
        with self.lock:
            self.done.append(piece)
            if missing:
                self.ramp.read(missing)


@contextmanager
def _opened(piece: _Piece) -> Iterator[int]:
    fd = os.open(piece.path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def _cached(piece: _Piece) -> int:
    with _opened(piece) as fd:
        return cached_bytes(fd, piece.offset, piece.size_bytes)


@contextmanager
def _sole(paths: Iterable[Path], stopped: Callable[[], bool]) -> Iterator[None]:
    """Be the only one that reads these blobs ahead, or stopped. In one order for all, so nobody waits in a circle.

    A blob that is locked and has no image any more is kept until the next collection, as if it were leased.
    """
    with ExitStack() as stack:
        for path in sorted(paths):
            fd = os.open(path, os.O_RDONLY)
            stack.callback(os.close, fd)
            while not _locked(fd) and not stopped():
                time.sleep(_POLL_S)
        yield


def _locked(fd: int) -> bool:
    try:
        return try_lock(fd, fcntl.LOCK_EX)
    except OSError:
        return True  # a file system that has no such locks for readers (NFS): twice is better than not at all


def _pieces(image: Image, kinds: Iterable[LayerType]) -> Iterator[_Piece]:
    layers: dict[Path, Layer] = {layer.path: layer for kind in kinds for layer in image.layers_of(kind)}
    for layer in layers.values():
        for offset in range(0, layer.size_bytes, PIECE_BYTES):
            yield _Piece(path=layer.path, offset=offset, size_bytes=min(PIECE_BYTES, layer.size_bytes - offset))


def _arguments(argv: list[str]) -> tuple[list[str], dict[str, str]] | None:
    words = list(argv)
    options: dict[str, str] = {}
    for name in ("--while", "--share"):
        if name in words[:-1]:
            at = words.index(name)
            options[name] = words[at + 1]
            del words[at : at + 2]
    return (words, options) if len(words) in {2, 3} and not any(word.startswith("--") for word in words) else None


def main(argv: list[str]) -> int:
    """The program. Exit status as the `smr` command's."""
    from smr.images.charge import leave_cgroup
    from smr.images.store import Store

    parsed = _arguments(argv)
    if parsed is None:
        sys.stderr.write("usage: python -I -m smr.images.prefetch STORE REFERENCE [CANCEL] [--while PATH] [--share S]\n")
        return exit_status(Code.USAGE)
    words, options = parsed
    leave_cgroup()
    try:
        image = Store(Path(words[0])).resolve(words[1])
        share = float(options.get("--share", SHARE))
        prefetch(
            image,
            cancel=Path(words[2]) if len(words) == 3 else None,
            alive=Path(options["--while"]) if "--while" in options else None,
            share=share,
            bulk=plan(image, available_bytes(), share=share).way is Way.CACHE,
        )
    except SmrError as error:
        sys.stderr.write(f"smr-prefetch: {error}\n")
        return exit_status(error.code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
