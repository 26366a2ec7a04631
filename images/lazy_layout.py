"""Which bytes of an image a process still lacks, by address. Pure; the callers lock.

A layout is a sorted list of pieces that do not overlap. A piece is a part of one chunk at an address; what the process does to
its memory splits pieces, moves them and drops them. An address without a piece has what the process itself put there, or zeros.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Piece(NamedTuple):
    """Memory [start, end) has the bytes of `chunk` from `skip` on. `moved`: the process has moved it by mremap."""

    start: int
    end: int
    chunk: int
    skip: int
    moved: bool = False

    def part(self, start: int, end: int) -> Piece:
        """What of it lies in [start, end), which it overlaps."""
        start, end = max(start, self.start), min(end, self.end)
        return Piece(start, end, self.chunk, self.skip + start - self.start, self.moved)


class Layout:
    """The pieces of one process."""

    __slots__ = ("_pieces", "_starts", "size_bytes")

    def __init__(self, pieces: Iterable[Piece] = ()) -> None:
        self._pieces = sorted(pieces)
        self._starts = [piece.start for piece in self._pieces]
        self.size_bytes = sum(piece.end - piece.start for piece in self._pieces)

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._pieces)

    def copy(self) -> Layout:
        """One of its own with the same pieces."""
        other = Layout()
        other._pieces, other._starts, other.size_bytes = self._pieces.copy(), self._starts.copy(), self.size_bytes
        return other

    def at(self, address: int) -> Piece | None:
        """The piece that holds an address."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and self._pieces[index].end > address:
            return self._pieces[index]
        return None

    def following(self, address: int) -> Piece | None:
        """The first piece that ends past an address."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and self._pieces[index].end > address:
            return self._pieces[index]
        return self._pieces[index + 1] if index + 1 < len(self._pieces) else None

    def within(self, start: int, end: int) -> list[Piece]:
        """What lies in [start, end), cut to it."""
        low, high = self._bounds(start, end)
        return [piece.part(start, end) for piece in self._pieces[low:high]]

    def still(self, wanted: Piece) -> list[Piece]:
        """What is left of a piece that was looked up before: the same bytes of the same chunk at the same addresses."""
        origin = wanted.start - wanted.skip
        found = self.within(wanted.start, wanted.end)
        return [piece for piece in found if piece.chunk == wanted.chunk and piece.start - piece.skip == origin]

    def remove(self, start: int, end: int) -> bool:
        """Drop what lies in [start, end); False when there was nothing."""
        low, high = self._bounds(start, end)
        if low >= high:
            return False
        left: list[Piece] = []
        first, last = self._pieces[low], self._pieces[high - 1]
        gone = sum(piece.end - piece.start for piece in self._pieces[low:high])
        if first.start < start:
            left.append(first.part(first.start, start))
        if last.end > end:
            left.append(last.part(end, last.end))
        self.size_bytes -= gone - sum(piece.end - piece.start for piece in left)
        self._pieces[low:high] = left
        self._starts[low:high] = [piece.start for piece in left]
        return True

    def move(self, source: int, target: int, size_bytes: int) -> bool:
        """Move what lies at `source` to `target`, over whatever was known there; False when nothing changed."""
        taken = self.within(source, source + size_bytes)
        self.remove(source, source + size_bytes)
        changed = self.remove(target, target + size_bytes) or bool(taken)
        by = target - source
        moved = [Piece(piece.start + by, piece.end + by, piece.chunk, piece.skip, moved=True) for piece in taken]
        index = bisect_left(self._starts, target)
        self._pieces[index:index] = moved
        self._starts[index:index] = [piece.start for piece in moved]
        self.size_bytes += sum(piece.end - piece.start for piece in moved)
        return changed

    def _bounds(self, start: int, end: int) -> tuple[int, int]:
        low = bisect_right(self._starts, start) - 1
        if low < 0 or self._pieces[low].end <= start:
            low += 1
        return low, max(low, bisect_left(self._starts, end))
