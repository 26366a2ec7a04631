"""Sets of numbers as sorted lists of half-open spans that neither touch nor overlap; every operation is one pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

Span = tuple[int, int]


def union(spans: Iterable[Span]) -> list[Span]:
    """All numbers of spans in any order."""
    merged: list[Span] = []
    for begin, end in sorted(span for span in spans if span[0] < span[1]):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def intersect(left: Sequence[Span], right: Sequence[Span]) -> list[Span]:
    """What is in both, cut wherever a span of either ends; both are sorted and without overlap, but spans may touch."""
    return [(begin, end) for begin, end, _, _ in overlaps(left, right)]


def overlaps(left: Sequence[Span], right: Sequence[Span]) -> Iterator[tuple[int, int, int, int]]:
    """The same, each with the indices of the two spans it is of."""
    i = j = 0
    while i < len(left) and j < len(right):
        begin, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if begin < end:
            yield begin, end, i, j
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1


def subtract(left: Sequence[Span], right: Sequence[Span]) -> list[Span]:
    """What is in `left` and not in `right`; both as for `intersect`."""
    found: list[Span] = []
    j = 0
    for begin, end in left:
        while j < len(right) and right[j][1] <= begin:
            j += 1
        at, k = begin, j
        while k < len(right) and right[k][0] < end:
            if at < right[k][0]:
                found.append((at, right[k][0]))
            at = max(at, right[k][1])
            k += 1
        if at < end:
            found.append((at, end))
    return found


def total(spans: Iterable[Span]) -> int:
    """How many numbers."""
    return sum(end - begin for begin, end in spans)
