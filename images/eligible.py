"""Which pages of a dump SMR delivers itself, and which stay CRIU's.

Ours are runs of at least `MIN_RUN_PAGES` pages in VMAs that are private, anonymous, readable and writable when the process is
restored, and that nothing but the process writes to before it runs. What is not certain stays CRIU's, which is always right:

- mappings of files, shared ones (memfd, /dev/zero, /dev/shm, System V), hugetlb, and what CRIU marks as special (vdso, vvar,
  aio rings, shadow stacks, guard regions, plugins);
- stacks and all that grows down: the kernel and CRIU write there;
- locked memory: the kernel populates it when it is mapped, so it would be filled twice;
- VMAs without PROT_WRITE: process_vm_writev keeps to the protection. Private anonymous ones are rarely large;
- pages with a thread's rseq area or clear_child_tid: the kernel writes to them as soon as CRIU has registered them, and a fill
  would bring back the processor number of the checkpoint;
- memory that a fork empties (MADV_WIPEONFORK), which is emptied in the dump (smr.images.wipe);
- processes some pages of which lie in a parent dump;
- pages that a child has in common with its parent. CRIU makes them common again by comparing, in VMAs that coincide
  (check_cow_vmas and restore_priv_vma_content in criu/mem.c), and needs both to do so. Where they differ they are ours.

Of a lazy dump, the pages of which are still in their processes, the same: only those that CRIU left out can be ours.
Addresses and lengths are in pages of 4096 bytes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from smr.images.criu_files import read_messages
from smr.images.live import Live
from smr.images.pagemap import Entry, Pagemap, read_pagemap, read_vmas
from smr.images.pagetable import PAGE_BYTES
from smr.images.spans import Span, intersect, overlaps, subtract, union
from smr.proto.criu import images_pb2

MIN_RUN_PAGES = 16

_READ_WRITE = 0x1 | 0x2
_PRIVATE, _ANONYMOUS = 0x2, 0x20
_GROWSDOWN, _LOCKED, _HUGETLB = 0x100, 0x2000, 0x40000
# criu/include/image.h: VMA_AREA_REGULAR, VMA_AREA_HEAP, VMA_ANON_PRIVATE. Any other bit makes a VMA special.
_REGULAR, _HEAP, _ANON_PRIVATE = 1 << 0, 1 << 5, 1 << 9
_RSEQ_BYTES = 32
_WIPEONFORK = 18  # its bit in VmaEntry.madv is that of MADV_WIPEONFORK
_COMPARE_PAGES = 512
_THREADS = 16


@dataclass(slots=True, kw_only=True)
class Memory:
    """The memory of one process of a dump. `moved` are the pages that SMR delivers, each span within one entry and one VMA."""

    pid: int
    ppid: int
    pagemap: Pagemap
    vmas: list[images_pb2.VmaEntry]
    kernels: list[Span]
    moved: list[Span]

    def moved_entries(self) -> Iterator[Entry]:
        """Where those pages lie."""
        entries = self.pagemap.entries
        for begin, end, i, _ in overlaps([(entry.begin, entry.end) for entry in entries], self.moved):
            yield _part(entries[i], (begin, end))

    def kept_entries(self) -> Iterator[Entry]:
        """The rest of the pagemap, in its order."""
        entries = self.pagemap.entries
        spans = [(entry.begin, entry.end) for entry in entries]
        for begin, end, i, _ in overlaps(spans, subtract(spans, self.moved)):
            yield _part(entries[i], (begin, end))


def choose(folder: Path, live: Live | None = None) -> list[Memory]:
    """The processes of a dump, each with the pages that SMR may deliver; `live`: of a lazy dump.

    Raises IMAGE_CORRUPT for images that do not fit.
    """
    found = {memory.pid: memory for memory in read_memories(folder)}
    for memory in found.values():
        memory.moved = _eligible(memory, lazy=live is not None)
    # All comparisons before any page is taken out: a grandchild compares with what its parent had.
    common = [
        (memory, found[memory.ppid], _common(memory, found[memory.ppid], live))
        for memory in found.values()
        if memory.ppid in found
    ]
    for child, parent, spans in common:
        child.moved, parent.moved = subtract(child.moved, spans), subtract(parent.moved, spans)
    for memory in found.values():
        memory.moved = [span for span in _cut(memory) if span[1] - span[0] >= MIN_RUN_PAGES]
        if memory.moved and not any(True for _ in memory.kept_entries()):
            del memory.moved[0]  # CRIU takes no pagemap without an entry
    return list(found.values())


def read_memories(folder: Path) -> list[Memory]:
    """The processes of a dump, nothing chosen. Raises IMAGE_CORRUPT."""
    tasks = read_messages(folder / "pstree.img", images_pb2.PstreeEntry)
    return [_memory(folder, task) for task in tasks if (folder / f"pagemap-{task.pid}.img").exists()]


def may_move(vma: images_pb2.VmaEntry) -> bool:
    """Whether pages of a VMA may be SMR's."""
    return (
        vma.prot & _READ_WRITE == _READ_WRITE
        and vma.flags & (_PRIVATE | _ANONYMOUS) == _PRIVATE | _ANONYMOUS
        and not vma.flags & (_GROWSDOWN | _LOCKED | _HUGETLB)
        and vma.status & ~_HEAP == _REGULAR | _ANON_PRIVATE
        and not is_wiped(vma)
    )


def is_wiped(vma: images_pb2.VmaEntry) -> bool:
    """Whether a VMA's content is not to be in a copy of the process: see smr.images.wipe."""
    return bool(vma.madv >> _WIPEONFORK & 1)


def span_of(vma: images_pb2.VmaEntry) -> Span:
    """A VMA in pages."""
    return vma.start // PAGE_BYTES, vma.end // PAGE_BYTES


def _memory(folder: Path, task: images_pb2.PstreeEntry) -> Memory:
    _, mm = read_vmas(folder, task.pid)
    return Memory(
        pid=task.pid,
        ppid=task.ppid,
        pagemap=_joined(read_pagemap(folder / f"pagemap-{task.pid}.img")),
        vmas=list(mm.vmas),
        kernels=union((page, page + 1) for page in _written_by_kernel(folder, task)),
        moved=[],
    )


def _joined(pagemap: Pagemap) -> Pagemap:
    """With what a lazy dump has left out in as few entries as can be: CRIU begins a new one with each of its pipes."""
    entries: list[Entry] = []
    for entry in pagemap.entries:
        if entry.left_out and entries and (entries[-1].end, entries[-1].flags) == (entry.begin, entry.flags):
            entries[-1] = replace(entries[-1], end=entry.end)
        else:
            entries.append(entry)
    return replace(pagemap, entries=entries)


def _written_by_kernel(folder: Path, task: images_pb2.PstreeEntry) -> Iterator[int]:
    for thread in task.threads:
        for core in read_messages(folder / f"core-{thread}.img", images_pb2.CoreEntry):
            yield core.thread_info.clear_tid_addr // PAGE_BYTES
            yield core.ti_aarch64.clear_tid_addr // PAGE_BYTES
            area = core.thread_core.rseq_entry
            last = area.rseq_abi_pointer + max(area.rseq_abi_size, _RSEQ_BYTES) - 1
            yield from range(area.rseq_abi_pointer // PAGE_BYTES, last // PAGE_BYTES + 1)


def _eligible(memory: Memory, *, lazy: bool) -> list[Span]:
    entries = memory.pagemap.entries
    if not all(entry.present or (lazy and entry.left_out) for entry in entries):
        return []
    allowed = union(span_of(vma) for vma in memory.vmas if may_move(vma))
    present = union((entry.begin, entry.end) for entry in entries if entry.left_out or not lazy)
    return subtract(intersect(present, allowed), memory.kernels)


def _cut(memory: Memory) -> list[Span]:
    by_entry = intersect(memory.moved, [(entry.begin, entry.end) for entry in memory.pagemap.entries])
    return intersect(by_entry, [span_of(vma) for vma in memory.vmas])


def _part(entry: Entry, span: Span) -> Entry:
    return Entry(span[0], span[1], entry.first + span[0] - entry.begin, entry.flags)


def _common(child: Memory, parent: Memory, live: Live | None) -> list[Span]:
    """Pages that CRIU will find equal in both."""
    parents = {vma.start: vma for vma in parent.vmas}
    coinciding = [span_of(vma) for vma in child.vmas if vma.start in parents and _coincide(vma, parents[vma.start])]
    # Only where one of them would be moved, the comparison matters.
    moved = intersect(coinciding, union([*child.moved, *parent.moved]))
    left, right = (_entries_in(memory.pagemap, moved) for memory in (child, parent))
    places = list(overlaps([(entry.begin, entry.end) for entry in left], [(entry.begin, entry.end) for entry in right]))
    blocks = [
        (at, min(_COMPARE_PAGES, end - at), left[i], right[j])
        for begin, end, i, j in places
        for at in range(begin, end, _COMPARE_PAGES)
    ]
    if not blocks:
        return []
    if live is not None:
        return _equal_in_processes(live, child.pid, parent.pid, [(at, at + count) for at, count, _, _ in blocks])
    found: list[Span] = []
    with ExitStack() as stack:
        one, other = (stack.enter_context(_Pages(memory.pagemap.pages_path)) for memory in (child, parent))
        for at, count, mine, theirs in blocks:
            pages = _equal(one, mine.first + at - mine.begin, other, theirs.first + at - theirs.begin, count)
            found += ((at + first, at + last) for first, last in pages)
    return union(found)


def _equal_in_processes(live: Live, pid: int, other: int, blocks: Sequence[Span]) -> list[Span]:
    with ThreadPoolExecutor(min(_THREADS, len(os.sched_getaffinity(0))), thread_name_prefix="smr-compare") as pool:
        return union(span for spans in pool.map(lambda block: live.equal(pid, other, *block), blocks) for span in spans)


def _entries_in(pagemap: Pagemap, spans: list[Span]) -> list[Entry]:
    present = [entry for entry in pagemap.entries if entry.present or entry.left_out]
    return [_part(present[i], (begin, end)) for begin, end, i, _ in overlaps([(e.begin, e.end) for e in present], spans)]


def _coincide(vma: images_pb2.VmaEntry, other: images_pb2.VmaEntry) -> bool:
    """CRIU's check_cow_vmas, for anonymous ones."""
    return (
        vma.end == other.end
        and not (vma.flags | other.flags) & _HUGETLB
        and not (vma.flags ^ other.flags) & (_GROWSDOWN | _ANONYMOUS)
        and bool(vma.flags & other.flags & _PRIVATE)
        and bool(vma.flags & _ANONYMOUS)
    )


class _Pages:
    """A pages file in memory, to compare from."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # Private and writable only so that ctypes tells its address; nothing writes.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._byte: ctypes.c_char | None = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._byte)

    def __enter__(self) -> _Pages:
        return self

    def __exit__(self, *_: object) -> None:
        self._byte = None
        self._map.close()


def _equal(one: _Pages, mine: int, other: _Pages, theirs: int, count: int) -> Iterator[Span]:
    """The spans of `count` pages, counted from 0, that are equal: halves of what is not equal as a whole."""
    todo = [(0, count)]
    while todo:
        begin, end = todo.pop()
        left, right = one.address + (mine + begin) * PAGE_BYTES, other.address + (theirs + begin) * PAGE_BYTES
        if _memcmp(left, right, (end - begin) * PAGE_BYTES) == 0:
            yield begin, end
        elif end - begin > 1:
            middle = (begin + end) // 2
            todo += [(begin, middle), (middle, end)]


_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
