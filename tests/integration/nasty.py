"""What runs in the tests of the page engine: processes whose memory is not what one expects.

    nasty.py CASE FOLDER

Each case is a generator: up to its `yield` it makes its memory and its children, then the process writes FOLDER/ready and waits for
FOLDER/go; after that (it was dumped and restored, and does not know) the case verifies all its memory and goes on using it. The
process writes FOLDER/answer, "ok" or what is wrong. Standard library only, so that any interpreter runs it; memory is patterned by
seed, and no page equals another unless a case says so.
"""

import contextlib
import ctypes
import mmap
import os
import random
import resource
import signal
import sys
import threading
import time
import traceback

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
    except BaseException:
        result, status = traceback.format_exc(), 1
    if answer.name == "answer" or status:
        part = answer.with_suffix(".part")
        part.write_text(result)
        part.replace(answer)
    os._exit(status)


def cow():
    """A child shares its parent's pages, but for those that either has changed since the fork."""
    region, turn = Region(48 * MIB), Pipe()
    region.fill("parent")

    def body():
        region.poke("child", range(0, 12288, 5))
        region.advise(DONTNEED, 40 * MIB, 2 * MIB)  # pages that only the parent has
        own = Region(32 * MIB)
        own.fill("own")
        yield
        turn.take()
        region.verify()
        own.verify()
        region.poke("late", range(1, 12288, 100))
        region.verify()

    child = spawn(body)
    region.poke("changed", range(0, 12288, 7))
    region.poke(None, range(32 * 256, 34 * 256))  # zeros, where the child has bytes
    own = Region(32 * MIB)
    own.fill("parent's own")
    yield
    region.verify()
    region.poke("after", range(0, 12288, 11))  # must not be seen by the child
    turn.give()
    join(child)
    region.verify()
    own.verify()


def generations():
    """Three generations and two siblings; each has changed some pages before it forked, and some after."""
    region = Region(40 * MIB)
    region.fill("first")

    def body(depth):
        region.poke(f"before {depth}", range(depth, 10240, 9))
        children = [spawn(body, depth + 1)] if depth < 2 else []
        region.poke(f"after {depth}", range(4096 + depth, 8192, 4))
        region.poke(None, range(1024 * depth, 1024 * depth + 512))
        region.fill(f"own {depth}", (24 + 4 * depth) * MIB, 4 * MIB)  # a run that no other generation has
        yield
        region.verify()
        for child in children:
            join(child)
        region.poke("late", range(3, 10240, 50))
        region.verify()

    first, second = spawn(body, 0), spawn(body, 1)
    region.poke("root", range(0, 10240, 13))
    yield
    region.verify()
    join(first)
    join(second)
    region.verify()


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
    """Allocators rely on this: what MADV_DONTNEED and MADV_FREE took reads as zeros (or, freed, as it was), also after a restore."""
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


def stacks():
    """Bytes far down in the main stack, in threads' stacks and in a mapping that grows down; all go on growing."""
    lines = open("/proc/self/maps").read().splitlines()
    (start,) = (int(line.split("-")[0], 16) for line in lines if line.endswith("[stack]"))
    start -= start % MIB
    main = Region(MIB)
    main.at, main.size = start - 4 * MIB, 3 * MIB
    main.fill("main")
    resource.setrlimit(resource.RLIMIT_STACK, (64 * MIB, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    # Far from where the kernel places mappings: one below would stop the growth.
    grown = Region(MIB, RW, PRIVATE | ANON | GROWSDOWN | FIXED_NOREPLACE, at=0x2000_0000_0000)
    grown.fill("top")
    down(grown, 24 * MIB)
    threading.stack_size(32 * MIB)
    resume, errors = threading.Event(), []
    started = [threading.Event() for _ in range(3)]

    def body(number):
        stack = Region(MIB)
        stack.at, stack.size = own_stack() + MIB, 24 * MIB
        stack.at += -stack.at % MIB
        stack.fill(number)
        started[number].set()
        resume.wait()
        try:
            stack.verify()
        except AssertionError as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for event in started:
        event.wait()
    yield
    resume.set()
    for thread in threads:
        thread.join()
    assert not errors, errors
    main.verify()
    grown.verify()
    down(grown, 8 * MIB)
    grown.verify()


def down(region, size):
    """Let a mapping that grows down grow, and write there."""
    region.blocks = {at + size: seed for at, seed in region.blocks.items()}
    region.at, region.size = region.at - size, region.size + size
    for at in range(size - MIB, -1, -MIB):
        region.fill("down", at, MIB)


def own_stack():
    """The lowest address of this thread's stack."""
    libc.pthread_self.restype = ctypes.c_void_p
    attributes, address, size = (ctypes.c_char * 64)(), ctypes.c_void_p(), ctypes.c_size_t()
    assert libc.pthread_getattr_np(ctypes.c_void_p(libc.pthread_self()), attributes) == 0
    assert libc.pthread_attr_getstack(attributes, ctypes.byref(address), ctypes.byref(size)) == 0
    libc.pthread_attr_destroy(attributes)
    return address.value


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


def shared():
    """Anonymous shared memory and /dev/zero, shared and private, in two processes."""
    anonymous, turn, back = Region(24 * MIB, RW, SHARED | ANON), Pipe(), Pipe()
    fd = os.open("/dev/zero", os.O_RDWR)
    zero, private = Region(16 * MIB, RW, SHARED, fd), Region(16 * MIB, RW, PRIVATE, fd)
    regions = (anonymous, zero, private)
    for region in regions:
        region.fill(region.at)

    def body():
        own = Region(24 * MIB)
        own.fill("own")
        private.fill("child", 4 * MIB, 4 * MIB)
        yield
        turn.take()
        for region in (*regions[1:], own):
            region.verify()
        assert ctypes.string_at(anonymous.at, 5) == b"hello"
        ctypes.memmove(zero.at, b"world", 5)
        back.give()

    child = spawn(body)
    own = Region(24 * MIB)
    own.fill("parent's own")
    yield
    for region in (*regions, own):
        region.verify()
    ctypes.memmove(anonymous.at, b"hello", 5)
    turn.give()
    back.take()
    assert ctypes.string_at(zero.at, 5) == b"world"
    join(child)
    private.verify()


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


def threads():
    """Forty threads that wait, each with data; they end and are joined, and new ones start."""
    resume, errors = threading.Event(), []
    mine, started = threading.local(), [threading.Event() for _ in range(40)]
    region = Region(40 * MIB)

    def body(number):
        mine.value = pattern(number, 65536)
        region.fill(number, number * MIB, MIB)
        started[number].set()
        resume.wait()
        if mine.value != pattern(number, 65536):
            errors.append(number)

    for rounds in range(2):
        workers = [threading.Thread(target=body, args=(number,)) for number in range(40)]
        for worker in workers:
            worker.start()
        for event in started:
            event.wait()
        if not rounds:
            yield
        resume.set()
        for worker in workers:
            worker.join(20)
            assert not worker.is_alive()
        assert not errors, errors
        region.verify()


def stopped():
    """A child that has stopped: it must not run before somebody continues it."""
    token = Pipe()
    os.set_blocking(token.reader, False)
    ready = Pipe()
    pid = os.fork()
    if pid == 0:
        region = Region(32 * MIB)
        region.fill("stopped")
        ready.give()
        os.kill(os.getpid(), signal.SIGSTOP)
        token.give()
        region.verify()
        os._exit(0)
    ready.take()
    os.waitpid(pid, os.WUNTRACED)
    region = Region(32 * MIB)
    region.fill("running")
    yield
    region.verify()
    time.sleep(0.2)
    with contextlib.suppress(BlockingIOError):
        raise AssertionError(f"the stopped child has run: {os.read(token.reader, 1)!r}")
    os.kill(pid, signal.SIGCONT)
    join(pid)
    assert os.read(token.reader, 1) == b"x"


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
    words = open("/proc/self/status").read().split()
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


def heap():
    """A C heap, of whichever malloc is loaded: 25000 blocks with bytes; calloc must give zeros, realloc must keep bytes."""
    rng = random.Random(3)
    master = pattern("heap", 4 * MIB)
    sizes = (24, 100, 700, 2048, 5000, 20000, 140000)

    def make(number):
        size = rng.choices(sizes, (30, 30, 20, 10, 6, 3, 1))[0]
        start = number * 131 % (3 * MIB)
        block = libc.malloc(size)
        assert block
        ctypes.memmove(block, master[start : start + size], size)
        return block, size, start

    def check():
        for number, (block, size, start) in blocks.items():
            assert ctypes.string_at(block, size) == master[start : start + size], f"block {number} of {size} bytes at {block:#x}"

    blocks = {number: make(number) for number in range(25000)}
    for number in rng.sample(sorted(blocks), 8000):
        libc.free(blocks.pop(number)[0])
    words = {str(number): pattern(number, 100) for number in range(20000)}
    yield
    check()
    assert all(words[str(number)] == pattern(number, 100) for number in range(20000))
    for size in sizes * 200:
        block = libc.calloc(1, size)
        assert ctypes.string_at(block, size) == bytes(size), f"calloc of {size} bytes at {block:#x}"
        ctypes.memset(block, 0xA5, size)
        libc.free(block)
    for number in sorted(blocks)[::3]:
        block, size, start = blocks[number]
        blocks[number] = (libc.realloc(block, size * 3), size, start)
    check()
    for number in sorted(blocks)[::2]:
        libc.free(blocks.pop(number)[0])
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    blocks |= {number: make(number) for number in range(30000, 40000)}
    check()


def torch():
    """A model in training: three steps after the restore give what they gave before the dump."""
    import torch as t

    t.manual_seed(1)
    t.set_num_threads(2)
    model = t.nn.Sequential(t.nn.Linear(1024, 4096), t.nn.GELU(), t.nn.Linear(4096, 1024))
    optimizer = t.optim.AdamW(model.parameters())
    inputs, weights = t.randn(64, 1024), t.randn(6 << 20, dtype=t.bfloat16)

    def steps():
        for _ in range(3):
            optimizer.zero_grad()
            loss = (model(inputs) - inputs).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item(), weights.float().sum().item()

    steps()
    saved = [parameter.detach().clone() for parameter in model.parameters()]
    state = {key: {k: v.clone() for k, v in value.items()} for key, value in optimizer.state_dict()["state"].items()}
    expected = steps()
    with t.no_grad():
        for parameter, old in zip(model.parameters(), saved, strict=True):
            parameter.copy_(old)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    yield
    assert steps() == expected


CASES = {
    case.__name__: case
    for case in (cow, generations, protections, advice, stacks, hugetlb, memfd, shared, sparse, zeros, threads, stopped, locked)
    + (guard, files, holes, heap, torch)
}

if __name__ == "__main__":
    from pathlib import Path

    assert mmap.PAGESIZE == PAGE
    folder = Path(sys.argv[2])
    live(CASES[sys.argv[1]](), (folder / "ready").touch, folder / "answer")
