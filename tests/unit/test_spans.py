"""Spans against sets of numbers."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from smr.images.spans import Span, intersect, overlaps, subtract, total, union

_spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda pair: (pair[0], pair[0] + pair[1])), max_size=12)


def numbers(spans: list[Span]) -> set[int]:
    return {number for begin, end in spans for number in range(begin, end)}


@given(_spans)
def test_union_is_sorted_apart_and_complete(spans):
    """Nothing is lost, and no two spans of the result touch."""
    merged = union(spans)
    assert numbers(merged) == numbers(spans)
    assert all(begin < end for begin, end in merged)
    assert all(one[1] < other[0] for one, other in pairwise(merged))
    assert total(merged) == len(numbers(spans))


@given(_spans, _spans)
def test_intersect_and_subtract_are_those_of_sets(left, right):
    """On sorted spans without overlap."""
    one, other = union(left), union(right)
    assert numbers(intersect(one, other)) == numbers(one) & numbers(other)
    assert numbers(subtract(one, other)) == numbers(one) - numbers(other)


def test_spans_that_touch_are_cut_apart():
    """Two VMAs side by side cut a run in two, though together they cover it."""
    assert intersect([(0, 10)], [(0, 4), (4, 10)]) == [(0, 4), (4, 10)]
    assert list(overlaps([(0, 10)], [(0, 4), (4, 12)])) == [(0, 4, 0, 0), (4, 10, 0, 1)]
