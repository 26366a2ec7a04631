"""Nasty processes (nasty.py) that are nasty for their children, threads, stacks and heaps."""

import contextlib
import ctypes
import os
import random
import resource
import signal
import threading
import time
from pathlib import Path

from nasty_memory import (
    ANON,
    DONTNEED,
    FIXED_NOREPLACE,
    GROWSDOWN,
    MIB,
    PRIVATE,
    RW,
    SHARED,
    Pipe,
    Region,
    join,
    libc,
    pattern,
    spawn,
)


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


def stacks():
    """Bytes far down in the main stack, in threads' stacks and in a mapping that grows down; all go on growing."""
    lines = Path("/proc/self/maps").read_text().splitlines()
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
        deep(200)
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


def deep(levels):
    """Use this thread's stack from its top, where its rseq area is, so far down that the pages make a long run."""
    return max([levels], key=lambda _: deep(levels - 1)) if levels else 0


def own_stack():
    """The lowest address of this thread's stack."""
    libc.pthread_self.restype = ctypes.c_void_p
    attributes, address, size = (ctypes.c_char * 64)(), ctypes.c_void_p(), ctypes.c_size_t()
    assert libc.pthread_getattr_np(ctypes.c_void_p(libc.pthread_self()), attributes) == 0
    assert libc.pthread_attr_getstack(attributes, ctypes.byref(address), ctypes.byref(size)) == 0
    libc.pthread_attr_destroy(attributes)
    return address.value


def threads():
    """Forty threads that wait, each with data; they end and are joined, and new ones start."""
    resume, errors = threading.Event(), []
    mine, started = threading.local(), [threading.Event() for _ in range(40)]
    region = Region(40 * MIB)

    def body(number):
        mine.value = pattern(number, 65536)
        deep(200)
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
