"""Which pages of a process are there, as the kernel tells."""

from __future__ import annotations

import ctypes
import mmap
import os
from itertools import pairwise

import pytest

from smr.images.live import Live
from smr.images.pagetable import PAGE_BYTES
from smr.images.spans import intersect


@pytest.mark.parametrize("groups", [10, 4095, 4096, 4097, 5000, 9000])
def test_pages_are_found_once_however_many_holes_there_are(groups: int) -> None:
    """Two pages that are there and one that is not, over and over: every span once, in order, also past one call's worth."""
    with mmap.mmap(-1, groups * 3 * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        handle = ctypes.c_char.from_buffer(memory)
        start = ctypes.addressof(handle) // PAGE_BYTES
        for group in range(groups):
            memory[group * 3 * PAGE_BYTES] = memory[(group * 3 + 1) * PAGE_BYTES] = 1
        with Live({7: os.getpid()}) as live:
            found = live.candidates()[7]
        del handle
    if not found:
        pytest.skip("this kernel has no PAGEMAP_SCAN")
    assert all(before[1] <= after[0] for before, after in pairwise(found))
    expected = [(start + group * 3, start + group * 3 + 2) for group in range(groups)]
    assert intersect(found, expected) == expected
    assert intersect(found, [(start, start + groups * 3)]) == expected
