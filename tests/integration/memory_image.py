"""What the memory of a stopped tree is: every VMA, every byte, and which pages its processes have in common.

Read from outside, through smaps, pagemap and mem of /proc. Bytes are digests by page; pages of zeros are left out, so memory that
was never touched and memory that was written with zeros are the same, as they are for a process. Anonymous private memory is
read where it is populated (the rest reads as zeros: reservations of 100 GB cost nothing), all other memory as a whole.
"""

from __future__ import annotations

import array
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

PAGE = 4096
_ZERO = bytes(PAGE)
_READ = 1024 * PAGE
# Documentation/admin-guide/mm/pagemap.rst
_PRESENT, _SWAPPED, _FILE_OR_SHARED, _GUARD, _SOFT_DIRTY = 1 << 63, 1 << 62, 1 << 61, 1 << 58, 1 << 55
_FRAME = (1 << 55) - 1
# 512 entries of pages that are not there; the kernel says "soft dirty" of them in a VMA that is new.
_EMPTY = (array.array("Q", [0] * 512).tobytes(), array.array("Q", [_SOFT_DIRTY] * 512).tobytes())
_ENTRIES = 512 * 1024
Place = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Vma:
    """One mapping. `flags` are VmFlags of smaps, but for `sd`, which says what was written lately."""

    start: int
    end: int
    perms: str
    offset: int
    name: str
    flags: frozenset[str]

    @property
    def anonymous(self) -> bool:
        """Private memory of no file: absent pages are zeros."""
        named = self.name and not self.name.startswith(("[anon", "[heap]", "[stack]"))
        return self.perms.endswith("p") and not named and not self.special

    @property
    def special(self) -> bool:
        """The kernel's own pages (vvar, vsyscall), which change and which nobody can write."""
        return bool(self.flags & {"io", "pf"}) or self.name == "[vsyscall]"

    def __str__(self) -> str:
        return f"{self.start:x}-{self.end:x} {self.perms} {self.offset:x} {self.name} {' '.join(sorted(self.flags))}".strip()


@dataclass(frozen=True, slots=True)
class Memory:
    """One process. `pages`: digests of the pages that are not zeros; `guards`: the pages that may not be touched."""

    vmas: tuple[Vma, ...]
    pages: Mapping[int, bytes]
    guards: frozenset[int]


@dataclass(frozen=True, slots=True)
class TreeMemory:
    """A tree, by image pid. `common`: sets of private pages, as (pid, address), that are one page of the machine."""

    processes: Mapping[int, Memory]
    common: frozenset[frozenset[Place]]


def read_tree(pids: Mapping[int, int], changing: Mapping[int, Collection[tuple[int, int]]]) -> TreeMemory:
    """Read a stopped tree. `pids`: image pid -> host pid; `changing`: (address, length) of what the kernel writes."""
    processes: dict[int, Memory] = {}
    frames: defaultdict[int, set[Place]] = defaultdict(set)
    for pid, host_pid in pids.items():
        reader = _Reader(host_pid, changing.get(pid, ()))
        processes[pid] = reader.read()
        for address, frame in reader.frames.items():
            frames[frame].add((pid, address))
    return TreeMemory(processes, frozenset(frozenset(places) for places in frames.values() if len(places) > 1))


def differences(expected: TreeMemory, found: TreeMemory, *, but: Collection[str] = ()) -> list[str]:
    """What is not the same, one line each. `hg`, the wish for huge pages, may have been added; the VmFlags `but` may differ."""
    if expected.processes.keys() != found.processes.keys():
        return [f"processes: expected {sorted(expected.processes)}, found {sorted(found.processes)}"]
    lines = []
    for pid, memory in expected.processes.items():
        lines += [f"process {pid}: {line}" for line in _differences(memory, found.processes[pid], {"hg", *but})]
    lines += [f"no longer common: {_places(places)}" for places in expected.common - found.common]
    lines += [f"common, and was not: {_places(places)}" for places in found.common - expected.common]
    return lines[:40]


def _places(places: frozenset[Place]) -> str:
    return ", ".join(f"{pid}:{address:x}" for pid, address in sorted(places))


def _differences(expected: Memory, found: Memory, but: set[str]) -> Iterator[str]:
    wishes = [(vma.start, vma.end) for vma in expected.vmas if "hg" in vma.flags]
    before, after = _joined(expected.vmas, but), _joined(found.vmas, but)
    yield from (f"VMA is missing: {vma}" for vma in before if vma not in after)
    yield from (f"VMA is new: {vma}" for vma in after if vma not in before)
    kept = [(vma.start, vma.end) for vma in found.vmas if "hg" in vma.flags]
    for start, end in wishes:
        if not any(begin <= start and end <= last for begin, last in kept):
            yield f"huge pages are no longer wished for at {start:x}"
    for address in sorted(expected.pages.keys() | found.pages.keys()):
        if expected.pages.get(address) != found.pages.get(address):
            where = next((vma for vma in expected.vmas if vma.start <= address < vma.end), None)
            what = [("bytes" if address in memory.pages else "zeros") for memory in (expected, found)]
            yield f"page {address:x}: expected {what[0]}, found {'other ' * (what[0] == what[1])}{what[1]} in {where}"
    yield from (f"guard page differs: {address:x}" for address in sorted(expected.guards ^ found.guards))


def _joined(vmas: tuple[Vma, ...], but: set[str]) -> list[Vma]:
    """Without the flags `but`; those that touch and are alike otherwise are one: whether the kernel merges depends on history."""
    joined: list[Vma] = []
    for old in vmas:
        vma = Vma(old.start, old.end, old.perms, old.offset, old.name, old.flags - but)
        if joined and _continues(joined[-1], vma):
            first = joined.pop()
            vma = Vma(first.start, vma.end, vma.perms, first.offset, vma.name, vma.flags)
        joined.append(vma)
    return joined


def _continues(first: Vma, then: Vma) -> bool:
    same = (first.end, first.perms, first.name, first.flags) == (then.start, then.perms, then.name, then.flags)
    return same and (first.anonymous or first.offset + first.end - first.start == then.offset)


class _Reader:
    def __init__(self, pid: int, changing: Collection[tuple[int, int]]) -> None:
        self.folder = Path(f"/proc/{pid}")
        self.changing = changing
        self.pages: dict[int, bytes] = {}
        self.guards: set[int] = set()
        self.frames: dict[int, int] = {}

    def read(self) -> Memory:
        vmas = tuple(_vmas(self.folder / "smaps"))
        self.mem = os.open(self.folder / "mem", os.O_RDONLY | os.O_CLOEXEC)
        self.map = os.open(self.folder / "pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for vma in vmas:
                if not vma.special:
                    self._vma(vma)
        finally:
            os.close(self.mem)
            os.close(self.map)
        return Memory(vmas, self.pages, frozenset(self.guards))

    def _vma(self, vma: Vma) -> None:
        private = set()
        begin = end = vma.start
        for address, entry in self._entries(vma):
            if entry & _GUARD:
                self.guards.add(address)
            elif entry & (_PRESENT | _SWAPPED) or not vma.anonymous:
                if address != end or end - begin >= _READ:
                    self._digest(begin, end)
                    begin = address
                end = address + PAGE
                if entry & _PRESENT and not entry & _FILE_OR_SHARED:
                    private.add((address, entry & _FRAME))
        self._digest(begin, end)
        # The page of zeros is everybody's.
        self.frames |= {address: frame for address, frame in private if address in self.pages}

    def _entries(self, vma: Vma) -> Iterator[tuple[int, int]]:
        for first in range(vma.start // PAGE, vma.end // PAGE, _ENTRIES):
            count = min(_ENTRIES, vma.end // PAGE - first)
            data = os.pread(self.map, count * 8, first * 8)
            assert len(data) == count * 8, f"pagemap of {self.folder} is short"
            for at in range(0, len(data), PAGE):
                block = data[at : at + PAGE]
                if not (vma.anonymous and block in _EMPTY):
                    address = (first + at // 8) * PAGE
                    yield from ((address + i * PAGE, entry) for i, entry in enumerate(array.array("Q", block)))

    def _digest(self, begin: int, end: int) -> None:
        if begin == end:
            return
        try:
            data = bytearray(os.pread(self.mem, end - begin, begin))
        except OSError:
            data = bytearray()
        if len(data) != end - begin:
            self._past_the_end(begin, end)
            return
        for address, size in self.changing:
            if begin <= address < end:
                data[address - begin : address - begin + size] = bytes(size)
        view = memoryview(data)
        for at in range(0, len(data), PAGE):
            page = view[at : at + PAGE]
            if page != _ZERO:
                self.pages[begin + at] = xxhash.xxh3_128_digest(page)

    def _past_the_end(self, begin: int, end: int) -> None:
        """Of a mapping that is longer than its file, what cannot be read is SIGBUS for the process: noted by its own digest."""
        if end - begin == PAGE:
            self.pages[begin] = b"SIGBUS"
            return
        middle = begin + (end - begin) // PAGE // 2 * PAGE
        self._digest(begin, middle)
        self._digest(middle, end)


def _vmas(smaps: Path) -> Iterator[Vma]:
    head: list[str] = []
    for line in smaps.read_text().splitlines():
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):
            head = line.split(maxsplit=5)
        elif key == "VmFlags:":
            start, end = (int(word, 16) for word in head[0].split("-"))
            name = head[5] if len(head) > 5 else ""
            yield Vma(start, end, head[1], int(head[2], 16), name, frozenset(rest.split()) - {"sd"})
