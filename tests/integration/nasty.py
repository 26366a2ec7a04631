"""What runs in the tests of the page engine: processes whose memory is not what one expects.

    nasty.py CASE FOLDER

Each case is a generator: up to its `yield` it makes its memory and its children, then the process writes FOLDER/ready and waits
for FOLDER/go; after that (it was dumped and restored, and does not know) the case verifies all its memory and goes on using it.
The process writes FOLDER/answer, "ok" or what is wrong. Standard library only, so that any interpreter runs it. Memory is
patterned by seed, and no page equals another unless a case says so.
"""

import ctypes
import mmap
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(__file__))

import nasty_processes as processes
from nasty_memory import (
    ANON,
    DONTDUMP,
    DONTFORK,
    DONTNEED,
    FREE,
    GUARD_INSTALL,
    GUARD_REMOVE,
    HUGEPAGE,
    HUGETLB,
    LOCKED,
    MERGEABLE,
    MIB,
    NOHUGEPAGE,
    NONE,
    NORESERVE,
    PAGE,
    PRIVATE,
    READ,
    RW,
    RWX,
    RX,
    SHARED,
    WIPEONFORK,
    Region,
    folder,
    libc,
    live,
    must,
    pattern,
    touch,
    write,
)


def protections():
    """Pages that were written before their VMA was made unwritable, and holes of PROT_NONE in writable memory."""
    region = Region(64 * MIB)
    region.fill("bytes")
    parts = ((8, 1, NONE), (16, 2, NONE), (30, 4, READ), (40, 2, RX), (44, 4, RWX), (63, 1, NONE))
    for begin, size, prot in parts:
        region.protect(prot, begin * MIB, size * MIB)
    yield
    for begin, _, prot in parts:
        assert touch(region.at + begin * MIB) == (signal.SIGSEGV if prot == NONE else -1), (begin, prot)
        assert write(region.at + begin * MIB) == (0 if prot == RWX else signal.SIGSEGV), (begin, prot)
    region.protect(RW)
    region.verify()
    region.fill("again", 4 * MIB, 32 * MIB)
    region.verify()


def advice():
    """Allocators rely on this: what MADV_DONTNEED and MADV_FREE took reads as zeros (or, freed, as it was), restored or not."""
    dropped, freed, wiped, lonely = (Region(24 * MIB) for _ in range(4))
    others = [(Region(8 * MIB), kind) for kind in (HUGEPAGE, NOHUGEPAGE, MERGEABLE, DONTDUMP)]
    for region in (dropped, freed, wiped, lonely, *(region for region, _ in others)):
        region.fill(region.at)
    dropped.advise(DONTNEED, 4 * MIB, 8 * MIB)
    freed.advise(FREE, 4 * MIB, 8 * MIB)
    wiped.advise(WIPEONFORK)
    lonely.advise(DONTFORK)
    for region, kind in others:
        region.advise(kind)
    yield
    dropped.verify()
    for region in (wiped, lonely, *(region for region, _ in others)):
        region.verify()
    check_freed(freed, 4 * MIB, 12 * MIB)
    dropped.advise(DONTNEED, 8 * MIB, 12 * MIB)
    dropped.verify()
    dropped.fill("new", 6 * MIB, 8 * MIB)
    dropped.verify()
    freed.advise(FREE, 10 * MIB, 8 * MIB)
    check_freed(freed, 4 * MIB, 18 * MIB)
    freed.fill("new", 4 * MIB, 14 * MIB)
    freed.verify()
    assert touch(wiped.at + 5 * MIB) == 0, "MADV_WIPEONFORK was lost"
    assert touch(lonely.at + 5 * MIB) == signal.SIGSEGV, "MADV_DONTFORK was lost"


def check_freed(region, begin, end):
    for at in range(begin, end, MIB):
        found, old = ctypes.string_at(region.at + at, MIB), region.expected(at)
        for i in range(0, MIB, PAGE):
            assert found[i : i + PAGE] in (old[i : i + PAGE], bytes(PAGE)), f"freed page at {region.at + at + i:#x}"
    region.verify(0, begin)
    region.verify(end)


def hugetlb():
    """Huge pages of their own file system, private and shared, beside ordinary memory."""
    regions = [Region(16 * MIB, RW, kind | ANON | HUGETLB) for kind in (PRIVATE, SHARED)] + [Region(32 * MIB)]
    for region in regions:
        region.fill(region.at)
    yield
    for region in regions:
        region.verify()
        region.fill("new", 2 * MIB, 4 * MIB)
        region.verify()


def memfd():
    """A memfd mapped twice shared and once private, with private copies of some of its pages."""
    fd = os.memfd_create("nasty")
    os.ftruncate(fd, 24 * MIB)
    one, two = (Region(24 * MIB, RW, SHARED, fd) for _ in range(2))
    one.fill("file")
    private = Region(24 * MIB, RW, PRIVATE, fd)
    private.blocks = dict(one.blocks)
    private.fill("private", 4 * MIB, 8 * MIB)
    private.poke("private", range(13 * 256, 20 * 256, 3))
    own = Region(32 * MIB)
    own.fill("own")
    yield
    for region in (one, private, own):
        region.verify()
    two.blocks = one.blocks
    two.verify()
    two.fill("late", 20 * MIB, 2 * MIB)
    one.verify()
    assert os.pread(fd, MIB, 20 * MIB) == bytes(one.expected(20 * MIB))
    private.verify(4 * MIB, 8 * MIB)


def sparse():
    """Reservations of 100 GB with islands, one writable as a whole, one of PROT_NONE with parts that were made writable."""
    gib = 1 << 30
    open_, closed = (Region(100 * gib, prot, PRIVATE | ANON | NORESERVE) for prot in (RW, NONE))
    islands = [number * 5 * gib + (number << 14) * 11 - (number << 14) * 11 % MIB for number in range(20)]
    for at in islands:
        open_.fill("island", at, MIB)
        open_.poke("page", [(at + 3 * gib) // PAGE + 1])
    for at in islands[::2]:
        closed.protect(RW, at, 4 * MIB)
        closed.fill("committed", at + MIB, 2 * MIB)
    yield
    for at in islands:
        open_.verify(at, 2 * MIB)
        open_.verify(at + 3 * gib - (at + 3 * gib) % MIB, MIB)
    for at in islands[::2]:
        closed.verify(at, 4 * MIB)
        assert touch(closed.at + at + 4 * MIB) == signal.SIGSEGV
    open_.fill("late", 77 * gib, MIB)
    open_.verify(77 * gib - MIB, 3 * MIB)


def zeros():
    """Zeros that were written, by page and by block; the same bytes again and again; borders that no huge page has."""
    odd, same = Region(41 * MIB), Region(32 * MIB)
    must(libc.munmap(odd.at, 5 * PAGE))  # the region now begins 5 pages later
    odd.at, odd.size = odd.at + MIB, 40 * MIB
    odd.fill("odd")
    odd.poke(None, range(0, 2560, 2))
    odd.poke(None, range(3000, 3700))
    odd.poke(None, range(4096, 4096 + 512))
    for at in range(0, same.size, MIB):
        same.blocks[at] = ("same", 0)
        ctypes.memmove(same.at + at, pattern(("same", 0), MIB), MIB)
    ctypes.memset(odd.at + 5 * PAGE - MIB, 7, 1)
    yield
    odd.verify()
    same.verify()
    odd.fill("late", 8 * MIB, 8 * MIB)
    same.poke("late", range(5, 8192, 512))  # what was stored once is many pages
    odd.verify()
    same.verify()


def locked():
    """Memory that may not leave the machine's: mlock and MAP_LOCKED, beside ordinary memory."""
    regions = [Region(16 * MIB), Region(8 * MIB, RW, PRIVATE | ANON | LOCKED), Region(32 * MIB)]
    for region in regions:
        region.fill(region.at)
    must(libc.mlock(regions[0].at, regions[0].size))
    yield
    for region in regions:
        region.verify()
        region.fill("late", 2 * MIB, 2 * MIB)
        region.verify()
    words = Path("/proc/self/status").read_text().split()
    assert int(words[words.index("VmLck:") + 1]) == 24 << 10


def guard():
    """Guard regions in the midst of memory (Linux 6.13): not to be touched, and zeros when they are taken away."""
    region = Region(40 * MIB)
    region.fill("bytes")
    for at in (4, 20):
        region.advise(DONTNEED, at * MIB, MIB)
        region.advise(GUARD_INSTALL, at * MIB, MIB)
    yield
    for at in (4, 20):
        assert touch(region.at + at * MIB) == signal.SIGSEGV, "a guard region was lost"
        region.advise(GUARD_REMOVE, at * MIB, MIB)
    region.verify()


def files():
    """Private mappings of a file with pages of their own, one longer than the file, and the file deleted."""
    path = folder / "file"
    path.write_bytes(b"".join(pattern(("file", at), MIB) for at in range(0, 16 * MIB, MIB)) + b"end")
    with path.open("r+b") as file:
        region, beyond = Region(16 * MIB, RW, PRIVATE, file.fileno()), Region(20 * MIB, RW, PRIVATE, file.fileno())
    region.blocks = {at: ("file", at) for at in range(0, 16 * MIB, MIB)}
    beyond.blocks = dict(region.blocks)
    region.poke("private", range(0, 4096, 3))
    beyond.fill("private", 0, 8 * MIB)
    own = Region(32 * MIB)
    own.fill("own")
    yield
    region.verify()
    beyond.verify(0, 16 * MIB)
    assert ctypes.string_at(beyond.at + 16 * MIB, 4) == b"end\0"
    assert touch(beyond.at + 18 * MIB) == signal.SIGBUS
    own.verify()
    region.poke("late", range(1, 4096, 5))
    region.verify()


def holes():
    """A mapping with holes, moved and grown before the dump; it grows, moves and loses parts again."""
    region = Region(48 * MIB)
    region.fill("bytes")
    region.at = must(libc.mremap(region.at, 48 * MIB, 56 * MIB, 1))
    region.size = 56 * MIB
    for at in (9, 20, 33):
        must(libc.munmap(region.at + at * MIB + 3 * PAGE, 16 * PAGE))
    yield

    def check():
        for begin, end in ((0, 9), (10, 20), (21, 33), (34, region.size // MIB)):
            region.verify(begin * MIB, (end - begin) * MIB)

    check()
    tail = must(libc.mremap(region.at + 34 * MIB, 22 * MIB, 40 * MIB, 1))
    for at in range(40):
        expected = region.expected((34 + at) * MIB) if at < 22 else bytes(MIB)
        assert ctypes.string_at(tail + at * MIB, MIB) == bytes(expected), f"MiB {at} after mremap"


CASES = {
    case.__name__: case
    for case in (
        *(protections, advice, hugetlb, memfd, sparse, zeros, locked, guard, files, holes),
        *(processes.cow, processes.generations, processes.shared, processes.stacks, processes.threads, processes.stopped),
        *(processes.heap, processes.torch),
    )
}

if __name__ == "__main__":
    assert mmap.PAGESIZE == PAGE
    live(CASES[sys.argv[1]](), (folder / "ready").touch, folder / "answer")
