"""Splitting and joining dumps that were written here, file by file, as CRIU writes them."""

from __future__ import annotations

import hashlib
import os
import random
import struct
from pathlib import Path

import pytest

from smr.images import eligible
from smr.images.criu_files import read_messages, write_messages
from smr.images.join import join
from smr.images.pagemap import read_pagemap
from smr.images.pagetable import PAGE_BYTES, Codec, parse_table
from smr.images.split import MIN_SPLIT_BYTES, split
from smr.proto.criu import images_pb2 as pb
from smr.proto.errors import Code, SmrError

MAGIC = struct.pack("<II", 0x54564319, 0x56084025)
ANON = 0x2 | 0x20
REGULAR = 1 | 1 << 9
BASE = 0x7F0000000
BIG = MIN_SPLIT_BYTES // PAGE_BYTES + 512
_random = random.Random(7)


def noise(pages: int) -> bytes:
    """Pages no two of which are equal."""
    return _random.randbytes(pages * PAGE_BYTES)


class Dump:
    """A dump being written. Pages of a process are given by address, in pages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.tree: list[pb.PstreeEntry] = []

    def process(self, pid, ppid, vmas, runs, *, rseq=0, clear_tid=0, flags=6, wide=True):
        """`vmas`: (begin, end, changes); `runs`: (begin, bytes)."""
        self.tree.append(pb.PstreeEntry(pid=pid, ppid=ppid, threads=[pid]))
        write_messages(self.path / "pstree.img", MAGIC, self.tree)
        core = pb.CoreEntry(tc=pb.TaskCoreEntry(task_state=1, comm="x"))
        core.thread_info.clear_tid_addr = clear_tid * PAGE_BYTES + 16
        core.thread_core.rseq_entry.rseq_abi_pointer = rseq * PAGE_BYTES + 32
        core.thread_core.rseq_entry.rseq_abi_size = 32
        write_messages(self.path / f"core-{pid}.img", MAGIC, [core])
        mm = pb.MmEntry()
        for begin, end, changes in vmas:
            fields = {"prot": 3, "flags": ANON, "status": REGULAR, **changes}
            mm.vmas.add(start=begin * PAGE_BYTES, end=end * PAGE_BYTES, **fields)
        write_messages(self.path / f"mm-{pid}.img", MAGIC, [mm])
        entries = [pb.PagemapHead(pages_id=pid)]
        with (self.path / f"pages-{pid}.img").open("wb") as pages:
            for begin, data in runs:
                count = len(data) // PAGE_BYTES
                entry = pb.PagemapEntry(vaddr=begin * PAGE_BYTES, compat_nr_pages=count, flags=flags)
                if wide:
                    entry.nr_pages = count
                entries.append(entry)
                pages.write(data)
        write_messages(self.path / f"pagemap-{pid}.img", MAGIC, entries)

    def memory(self, pid: int) -> dict[int, bytes]:
        """What CRIU would restore: pages that are not zeros, by address."""
        pagemap = read_pagemap(self.path / f"pagemap-{pid}.img")
        data = pagemap.pages_path.read_bytes()
        found = {}
        for entry in pagemap.entries:
            for number in range(entry.end - entry.begin):
                at = (entry.first + number) * PAGE_BYTES
                found[entry.begin + number] = data[at : at + PAGE_BYTES]
        return {address: page for address, page in found.items() if any(page)}

    def files(self) -> dict[str, bytes]:
        """All files."""
        return {file.name: file.read_bytes() for file in self.path.iterdir()}


@pytest.fixture
def dump(tmp_path) -> Dump:
    """An empty dump."""
    return Dump(tmp_path / "dump")


def delivered(result, pid):
    """What the fill would write into a process: pages by address."""
    found = {}
    blobs = [segment.path.read_bytes() for segment in result.segments]
    for run in result.table.runs:
        chunk = result.table.chunks[run.chunk]
        data = blobs[chunk.segment][chunk.offset : chunk.offset + chunk.stored_bytes]
        if chunk.codec != Codec.RAW:
            from smr.images.codec import decode

            data = bytes(decode(Codec(chunk.codec), data, chunk.pages * PAGE_BYTES))
        if run.pid == pid:
            for number in range(chunk.pages):
                found[run.address // PAGE_BYTES + number] = data[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]
    return found


STACK = (BASE - 100, BASE - 90, {"flags": ANON | 0x100, "status": REGULAR | 2})


def simple(dump: Dump, **options: object) -> None:
    """One process: a stack, and a large VMA with noise."""
    dump.process(1, 0, [STACK, (BASE, BASE + BIG, {})], [(BASE - 100, noise(10)), (BASE, noise(BIG))], **options)


@pytest.mark.parametrize("compress", [False, True])
def test_no_page_is_lost_and_none_is_there_twice(dump, tmp_path, compress):
    """What CRIU keeps and what is delivered are together what the dump had, and apart."""
    zeros_and_more = bytes(64 * PAGE_BYTES) + b"x" * 80 * PAGE_BYTES
    runs = [(BASE - 100, noise(10)), (BASE + 3, noise(BIG)), (BASE + BIG + 9, zeros_and_more), (BASE + 2 * BIG, noise(40))]
    dump.process(1, 0, [STACK, (BASE, BASE + 2 * BIG, {}), (BASE + 2 * BIG, BASE + 2 * BIG + 40, {"prot": 1})], runs)
    before = dump.memory(1)
    result = split(dump.path, tmp_path, compress=compress, threads=3)
    ours = delivered(result, 1)
    kept = dump.memory(1)
    assert not set(ours) & set(kept)
    assert {address: page for address, page in {**ours, **kept}.items() if any(page)} == before
    assert set(kept) == {address for address in before if address < BASE or address >= BASE + 2 * BIG}
    parse_table(result.table.to_bytes())


def test_segments_have_the_digest_that_is_said(dump, tmp_path):
    """sha256 of the file, and its size, both of many segments."""
    simple(dump)
    result = split(dump.path, tmp_path, threads=2)
    assert result.stored_bytes >= BIG * PAGE_BYTES
    for segment in result.segments:
        data = segment.path.read_bytes()
        assert segment.digest == f"sha256:{hashlib.sha256(data).hexdigest()}"
        assert segment.size_bytes == len(data)


def test_zeros_are_dropped_and_equal_chunks_are_stored_once(dump, tmp_path):
    """Of a VMA of zeros, a repeated block and noise, only the block and the noise are stored."""
    block = noise(512)
    begin = BASE - BASE % 512
    runs = [(begin, bytes(2 * MIN_SPLIT_BYTES)), (begin + 8192, block * 8), (begin + 8192 + 4096, noise(512))]
    dump.process(1, 0, [STACK, (begin, begin + 16384, {})], [(BASE - 100, noise(10)), *runs])
    result = split(dump.path, tmp_path, threads=1)
    assert result.stored_bytes == 1024 * PAGE_BYTES
    assert result.table.memory_bytes == 9 * 512 * PAGE_BYTES


@pytest.mark.parametrize("wide", [True, False])
def test_join_gives_the_dump_back(dump, tmp_path, wide):
    """The same files, byte by byte, for a dump without blocks of zeros, from a CRIU with and without 64-bit counts."""
    vmas = [STACK, (BASE, BASE + 9, {"prot": 1}), (BASE + 9, BASE + BIG, {})]
    dump.process(1, 0, vmas, [(BASE - 100, noise(10)), (BASE, noise(BIG))], wide=wide)
    before = dump.memory(1)
    result = split(dump.path, tmp_path, threads=2)
    assert (dump.path / "pages-1.img").stat().st_size == 19 * PAGE_BYTES
    join(dump.path, result.table, [segment.path for segment in result.segments])
    assert dump.memory(1) == before
    assert {entry.HasField("nr_pages") for entry in _entries(dump.path)} == {wide}


def _entries(folder: Path) -> list[pb.PagemapEntry]:
    data = (folder / "pagemap-1.img").read_bytes()
    skip = 12 + int.from_bytes(data[8:12], "little")
    path = folder.parent / "entries.img"
    path.write_bytes(data[:8] + data[skip:])
    return list(read_messages(path, pb.PagemapEntry))


def test_a_small_dump_is_left_as_it_is(dump, tmp_path):
    """Below the threshold no file is touched and there is no segment."""
    dump.process(1, 0, [STACK, (BASE, BASE + 512, {})], [(BASE - 100, noise(10)), (BASE, noise(512))])
    before = dump.files()
    result = split(dump.path, tmp_path)
    assert (list(result.segments), list(result.table.runs)) == ([], [])
    assert dump.files() == before


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("read-only", {"prot": 1}),
        ("no access", {"prot": 0}),
        ("shared", {"flags": 0x1 | 0x20, "status": 1 | 1 << 8}),
        ("a file's", {"flags": 0x2, "status": 1 | 1 << 6}),
        ("growing down", {"flags": ANON | 0x100}),
        ("locked", {"flags": ANON | 0x2000}),
        ("huge pages", {"flags": ANON | 0x40000}),
        ("vdso", {"status": REGULAR | 1 << 3}),
        ("an aio ring", {"status": REGULAR | 1 << 13}),
        ("a memfd", {"status": REGULAR | 1 << 14}),
        ("a plugin's", {"status": REGULAR | 1 << 27}),
    ],
)
def test_other_memory_stays_criu_s(dump, tmp_path, what, changes):
    """Whatever is not plainly private, anonymous and writable."""
    runs = [(BASE - 100, noise(10)), (BASE, noise(BIG)), (BASE + BIG, noise(BIG))]
    dump.process(1, 0, [STACK, (BASE, BASE + BIG, changes), (BASE + BIG, BASE + 2 * BIG, {})], runs)
    split(dump.path, tmp_path)
    assert sorted(dump.memory(1)) == [*range(BASE - 100, BASE - 90), *range(BASE, BASE + BIG)], what


def test_the_heap_is_ours(dump, tmp_path):
    """CRIU marks it, and restores it as any other."""
    runs = [(BASE - 100, noise(10)), (BASE, noise(BIG))]
    dump.process(1, 0, [STACK, (BASE, BASE + BIG, {"status": REGULAR | 1 << 5})], runs)
    split(dump.path, tmp_path)
    assert sorted(dump.memory(1)) == list(range(BASE - 100, BASE - 90))


def test_pages_that_the_kernel_writes_stay_criu_s(dump, tmp_path):
    """Those with the rseq area and clear_child_tid of a thread, and nothing around them."""
    simple(dump, rseq=BASE + 100, clear_tid=BASE + 300)
    split(dump.path, tmp_path)
    assert sorted(dump.memory(1))[10:] == [BASE + 100, BASE + 300]


def test_short_runs_stay_criu_s(dump, tmp_path):
    """A run of fewer than 16 pages is not worth an entry of its own."""
    vmas = [STACK, (BASE, BASE + BIG, {}), (BASE + BIG + 10, BASE + BIG + 100, {})]
    dump.process(
        1, 0, vmas, [(BASE - 100, noise(10)), (BASE, noise(BIG)), (BASE + BIG + 20, noise(15)), (BASE + BIG + 50, noise(16))]
    )
    split(dump.path, tmp_path)
    assert sorted(dump.memory(1))[10:] == list(range(BASE + BIG + 20, BASE + BIG + 35))


def family(dump: Dump, changed: set[int], child_vma: tuple[int, int]) -> None:
    """A parent, and a child some of whose pages are no longer the parent's."""
    data = noise(BIG)
    pages = [data[at : at + PAGE_BYTES] for at in range(0, len(data), PAGE_BYTES)]
    theirs = b"".join(noise(1) if number in changed else page for number, page in enumerate(pages))
    dump.process(1, 0, [STACK, (BASE, BASE + BIG, {})], [(BASE - 100, noise(10)), (BASE, data)])
    dump.process(2, 1, [STACK, (*child_vma, {})], [(BASE - 100, noise(10)), (BASE, theirs)])


def test_pages_in_common_with_a_parent_stay_criu_s_in_both(dump, tmp_path):
    """Only what differs is delivered, in parent and child: CRIU makes the rest common again."""
    changed = set(range(200, 200 + 4096))
    family(dump, changed, (BASE, BASE + BIG))
    result = split(dump.path, tmp_path)
    for pid in (1, 2):
        assert set(delivered(result, pid)) == {BASE + number for number in changed}
        assert sorted(dump.memory(pid))[10:] == [BASE + number for number in range(BIG) if number not in changed]


def test_equal_pages_of_vmas_that_do_not_coincide_are_ours(dump, tmp_path):
    """CRIU cannot make them common, so there is nothing to keep; their content is stored once."""
    family(dump, set(), (BASE, BASE + BIG + 1))
    result = split(dump.path, tmp_path)
    assert [len(delivered(result, pid)) for pid in (1, 2)] == [BIG, BIG]
    assert result.stored_bytes == BIG * PAGE_BYTES


def test_pages_in_a_parent_dump_leave_the_process_alone(dump, tmp_path):
    """A process of an incremental dump is CRIU's as a whole."""
    simple(dump, flags=1)
    before = dump.files()
    assert list(split(dump.path, tmp_path).segments) == []
    assert dump.files() == before


def test_dense_memory_asks_for_huge_pages(dump, tmp_path):
    """A large VMA that is nearly full does; one that was told not to, and one that is mostly empty, do not."""
    begin = BASE - BASE % 512
    vmas = [
        STACK,
        (begin, begin + 8192, {}),
        (begin + 8192, begin + 16384, {"madv": 1 << 15}),
        (begin + 16384, begin + 32768, {}),
    ]
    runs = [(BASE - 100, noise(10)), (begin, noise(8192)), (begin + 8192, noise(8192)), (begin + 16384, noise(4096))]
    dump.process(1, 0, vmas, runs)
    split(dump.path, tmp_path)
    (mm,) = read_messages(dump.path / "mm-1.img", pb.MmEntry)
    assert [vma.madv for vma in mm.vmas] == [0, 1 << 14, 1 << 15, 0]


@pytest.mark.parametrize("lie", ["more pages than the file", "the same page twice"])
def test_a_pagemap_that_lies_is_refused(dump, tmp_path, lie):
    """IMAGE_CORRUPT, naming the file."""
    simple(dump)
    if lie == "more pages than the file":
        os.truncate(dump.path / "pages-1.img", BIG * PAGE_BYTES)
    else:
        again = [(BASE - 100, noise(10)), (BASE, noise(BIG)), (BASE + 5, noise(1))]
        dump.tree.clear()
        dump.process(1, 0, [STACK, (BASE, BASE + BIG, {})], again)
    with pytest.raises(SmrError) as caught:
        split(dump.path, tmp_path)
    assert caught.value.code is Code.IMAGE_CORRUPT
    assert "pagemap-1.img" in caught.value.message


def test_a_join_of_what_does_not_fit_is_refused(dump, tmp_path):
    """A page that CRIU's files and the table both have."""
    simple(dump)
    whole = dump.files()
    result = split(dump.path, tmp_path)
    for name, data in whole.items():
        (dump.path / name).write_bytes(data)
    with pytest.raises(SmrError) as caught:
        join(dump.path, result.table, [segment.path for segment in result.segments])
    assert caught.value.code is Code.IMAGE_CORRUPT


def test_the_threshold_of_a_run_is_what_the_docstring_says():
    """64 KiB."""
    assert eligible.MIN_RUN_PAGES * PAGE_BYTES == 64 << 10
