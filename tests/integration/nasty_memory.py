"""What the nasty processes (nasty.py) are made of: patterned memory, children, and the way from `ready` to `answer`."""

import contextlib
import ctypes
import os
import random
import sys
import time
import traceback
from pathlib import Path

folder = Path(sys.argv[2])
MIB = 1 << 20
PAGE = 4096
NONE, READ, RW, RX, RWX = 0, 1, 3, 5, 7
SHARED, PRIVATE, FIXED_NOREPLACE, ANON = 1, 2, 0x100000, 0x20
GROWSDOWN, LOCKED, NORESERVE, HUGETLB = 0x100, 0x2000, 0x4000, 0x40000
DONTNEED, FREE, DONTFORK, MERGEABLE, HUGEPAGE, NOHUGEPAGE, DONTDUMP, WIPEONFORK = 4, 8, 10, 12, 14, 15, 16, 18
GUARD_INSTALL, GUARD_REMOVE = 102, 103

libc = ctypes.CDLL(None, use_errno=True)
_P, _N = ctypes.c_void_p, ctypes.c_size_t
libc.mmap.restype, libc.mmap.argtypes = _P, (_P, _N, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.mremap.restype, libc.mremap.argtypes = _P, (_P, _N, _N, ctypes.c_int)
libc.munmap.argtypes = (_P, _N)
libc.madvise.argtypes = libc.mprotect.argtypes = (_P, _N, ctypes.c_int)
libc.mlock.argtypes = (_P, _N)
libc.malloc.restype, libc.malloc.argtypes = _P, (_N,)
libc.calloc.restype, libc.calloc.argtypes = _P, (_N, _N)
libc.realloc.restype, libc.realloc.argtypes = _P, (_P, _N)
libc.free.argtypes = (_P,)


def must(result):
    if result in (-1, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def pattern(seed, size):
    return random.Random(str(seed)).randbytes(size)


class Region:
    """A mapping, and what it must hold: by MiB and then by page, a seed or None for zeros."""

    def __init__(self, size, prot=RW, flags=PRIVATE | ANON, fd=-1, offset=0, at=0):
        self.size = size
        self.at = must(libc.mmap(at, size, prot, flags, fd, offset))
        self.blocks, self.pages = {}, {}

    def fill(self, seed, begin=0, size=None):
        """Whole MiB from `begin` on."""
        for at in range(begin, begin + (size or self.size - begin), MIB):
            ctypes.memmove(self.at + at, pattern((seed, at), MIB), MIB)
            self.blocks[at] = (seed, at)
            self.pages = {page: kept for page, kept in self.pages.items() if not at <= page * PAGE < at + MIB}

    def poke(self, seed, pages):
        """Other bytes in some pages; seed None for zeros."""
        for page in pages:
            ctypes.memmove(self.at + page * PAGE, pattern((seed, page), PAGE) if seed is not None else bytes(PAGE), PAGE)
            self.pages[page] = None if seed is None else (seed, page)

    def advise(self, advice, begin=0, size=None):
        must(libc.madvise(self.at + begin, size or self.size - begin, advice))
        if advice == DONTNEED:
            for at in range(begin, begin + (size or self.size - begin), MIB):
                self.blocks.pop(at, None)
                self.pages = {page: kept for page, kept in self.pages.items() if not at <= page * PAGE < at + MIB}

    def protect(self, prot, begin=0, size=None):
        must(libc.mprotect(self.at + begin, size or self.size - begin, prot))

    def expected(self, at):
        data = bytearray(pattern(self.blocks[at], MIB)) if at in self.blocks else bytearray(MIB)
        for page, seed in self.pages.items():
            offset = page * PAGE - at
            if 0 <= offset < MIB:
                data[offset : offset + PAGE] = bytes(PAGE) if seed is None else pattern(seed, PAGE)
        return data

    def verify(self, begin=0, size=None):
        for at in range(begin, begin + (size or self.size - begin), MIB):
            found, expected = ctypes.string_at(self.at + at, MIB), self.expected(at)
            bad = [i // PAGE for i in range(0, MIB, PAGE) if found[i : i + PAGE] != expected[i : i + PAGE]]
            assert not bad, f"wrong bytes {at:#x} into {self.at:#x}: pages {bad[:8]} of 256"


def touch(address):
    """Read one byte in a child: the signal that it dies of, 0 when the byte is zero, -1 when it is not."""
    pid = os.fork()
    if pid == 0:
        os._exit(0 if ctypes.string_at(address, 1) == b"\0" else 1)
    status = os.waitpid(pid, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def write(address):
    """The same, writing a zero."""
    pid = os.fork()
    if pid == 0:
        ctypes.memset(address, 0, 1)
        os._exit(0)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


class Pipe:
    """A token from one process to another."""

    def __init__(self):
        self.reader, self.writer = os.pipe()

    def give(self):
        os.write(self.writer, b"x")

    def take(self):
        assert os.read(self.reader, 1) == b"x"


def spawn(body, *args):
    """Run a case in a child, up to its yield; `join` waits for the rest."""
    ready = Pipe()
    pid = os.fork()
    if pid == 0:
        live(body(*args), ready.give, folder / f"answer-{os.getpid()}")
    ready.take()
    return pid


def join(pid):
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "a child failed: " + " ".join(
        path.read_text() for path in folder.glob("answer-*")
    )


def live(case, ready, answer):
    try:
        next(case)
        ready()
        while not (folder / "go").exists():
            time.sleep(0.02)
        with contextlib.suppress(StopIteration):
            next(case)
        result, status = "ok", 0
    except BaseException:  # noqa: BLE001  # the test sees it
        result, status = traceback.format_exc(), 1
    if answer.name == "answer" or status:
        part = answer.with_suffix(".part")
        part.write_text(result)
        part.replace(answer)
    os._exit(status)
