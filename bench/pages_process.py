"""The process that bench.pages checkpoints: `python -m bench.pages_process FOLDER SIZE_BYTES KIND`.

It maps SIZE_BYTES of private anonymous memory, fills it, writes FOLDER/ready and waits. No two pages of it are equal: each
begins with its number, and the rest is of KIND: `random`, which nothing compresses, or `bf16`, weights as a layer has them. At
SIGUSR1 it looks at pages all over its memory and writes FOLDER/answer anew: how often it was asked, and whether the pages were
right. It has no file open and no child. Standard library only.
"""

from __future__ import annotations

import itertools
import mmap
import os
import signal
import struct
import sys
from array import array
from pathlib import Path
from random import Random

PAGE_BYTES = 4096
PIECE_BYTES = 2 << 20
KINDS = ("random", "bf16")
_PATTERN_BYTES = 8 << 20
_PLACES = _PATTERN_BYTES // PAGE_BYTES
_LOOKS = 64


def bf16(draw: Random, size_bytes: int) -> bytes:
    """Weights of a layer as they are initialized, normal with a deviation of 0.02: the upper halves of floats."""
    count = size_bytes // 2
    floats = struct.pack(f"<{count}f", *(draw.gauss(0, 0.02) for _ in range(count)))
    words = bytearray(size_bytes)
    words[0::2], words[1::2] = floats[2::4], floats[3::4]
    return bytes(words)


class Content:
    """What stands on each page."""

    def __init__(self, kind: str) -> None:
        draw, size_bytes = Random(1), _PATTERN_BYTES + PIECE_BYTES
        self.pattern = bf16(draw, size_bytes) if kind == "bf16" else draw.randbytes(size_bytes)

    def page(self, number: int) -> bytes:
        """Page `number` of the memory."""
        piece, within = divmod(number * PAGE_BYTES, PIECE_BYTES)
        begin = piece % _PLACES * PAGE_BYTES + within
        return number.to_bytes(8, "little") + self.pattern[begin + 8 : begin + PAGE_BYTES]

    def fill(self, memory: mmap.mmap) -> None:
        """All pages."""
        source = memoryview(self.pattern)
        for piece in range(len(memory) // PIECE_BYTES):
            begin, place = piece * PIECE_BYTES, piece % _PLACES * PAGE_BYTES
            memory[begin : begin + PIECE_BYTES] = source[place : place + PIECE_BYTES]
            first = begin // PAGE_BYTES
            with (
                memoryview(memory) as view,
                view.cast("Q") as words,
                words[begin // 8 : (begin + PIECE_BYTES) // 8 : 512] as heads,
            ):
                heads[:] = memoryview(array("Q", range(first, first + PIECE_BYTES // PAGE_BYTES)))


def main(folder: Path, size_bytes: int, kind: str) -> None:
    """Be that process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    os.chdir("/")
    content = Content(kind)
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    content.fill(memory)
    (folder / "ready").write_text(hex(_address_of(memory)))
    pages = size_bytes // PAGE_BYTES
    for asked in itertools.count(1):
        signal.sigwait({signal.SIGUSR1})
        right = True
        for look in range(_LOOKS):
            page = (look * pages // _LOOKS + asked * 7919) % pages
            right = right and memory[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] == content.page(page)
        (folder / "answer.new").write_text(f"{asked} {'right' if right else 'wrong'}")
        (folder / "answer.new").replace(folder / "answer")


def _address_of(memory: mmap.mmap) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
