"""Every byte of a restored tree, before it runs, against stock CRIU's restore of the same dump; and the tree then goes on.

One dump of each nasty process is restored by CRIU as it is, filled, joined and lazily: VMAs, bytes, guard pages and the pages
that processes have in common must be the same. The process then verifies and uses its memory itself.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import xxhash

from smr.images.criu_layers import add_criu_layers
from smr.images.fill import fill
from smr.images.join import join
from smr.images.lazy_folder import load_all
from smr.images.pagetable import PAGE_BYTES, PageTable, Run, parse_table
from smr.images.segments import page_table, segment_paths
from smr.images.store import Store
from smr.proto.errors import Code, SmrError
from tests.integration.command import eventually
from tests.integration.criu_tree import Dump, Restored
from tests.integration.memory_image import TreeMemory, differences
from tests.integration.page_cases import MIB, MOVED, Made, make, make_live
from tests.integration.sandbox import Sandbox
from tests.store_support import make_config, rewrite_blob

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def huge_pages() -> Iterator[None]:
    """Huge pages for the one case that needs them, as many as the machine gives."""
    path = Path("/proc/sys/vm/nr_hugepages")
    before = path.read_text()
    with suppress(OSError):
        path.write_text(str(int(before) + 48))
    yield
    with suppress(OSError):
        path.write_text(before)


@pytest.fixture(scope="module", params=[f"{case}{way}" for case in MOVED for way in ("", "-live")])
def made(request: pytest.FixtureRequest, box: Sandbox, newer_criu: Path, huge_pages: None) -> Iterator[Made]:
    """Each nasty process, its dump split, and its pages taken from the frozen process itself."""
    folder = box.base / f"pages-{request.param}"
    folder.mkdir()
    case, live, _ = request.param.partition("-live")
    try:
        yield (make_live if live else make)(case, newer_criu, folder)
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def plain(box: Sandbox, newer_criu: Path) -> Iterator[Made]:
    """One process to do harm to."""
    folder = box.base / "pages-plain"
    folder.mkdir()
    try:
        yield make("holes", newer_criu, folder)
    finally:
        shutil.rmtree(folder)


def same(made: Made, restored: Restored, *, but: Sequence[str] = ()) -> None:
    """The tree is what stock CRIU restores; it goes on, and finds its memory right."""
    assert not (found := differences(made.memory, restored.memory(), but=but)), "\n".join(found)
    assert restored.go_on() == "ok"


def test_only_plain_memory_is_moved(made: Made) -> None:
    """As much as there is, of private anonymous writable VMAs only; never a page that the kernel writes to, nor a common one."""
    table = made.split.table
    assert table.memory_bytes >= MOVED[made.case] * MIB
    kernels = {(pid, address // PAGE_BYTES) for pid, areas in made.stock.kernels().items() for address, _ in areas}
    common = {place for places in made.memory.common for place in places}
    for run_ in table.runs:
        end = run_.address + table.pages(run_) * PAGE_BYTES
        vmas = [vma for vma in made.memory.processes[run_.pid].vmas if vma.start < end and run_.address < vma.end]
        (vma,) = vmas
        assert vma.start <= run_.address and end <= vma.end
        assert vma.anonymous and vma.perms.startswith("rw") and not vma.flags & {"gd", "lo", "ht", "io", "pf", "sh"}, str(vma)
        for address in range(run_.address, end, PAGE_BYTES):
            assert (run_.pid, address // PAGE_BYTES) not in kernels
            assert (run_.pid, address) not in common


def test_filled_tree_is_stocks(made: Made) -> None:
    """CRIU restores what was left to it, the rest is written into the stopped tree."""
    with made.stripped.restored() as restored:
        filled = fill(parse_table(made.split.table.to_bytes()), made.segments, restored.pids)
        assert filled.bytes == made.split.table.memory_bytes
        same(made, restored)


def test_joined_folder_is_stocks(made: Made) -> None:
    """With the pages put back, stock CRIU restores the same."""
    joined = made.stripped.copy("joined")
    try:
        join(joined.images, made.split.table, made.segments)
        with joined.restored() as restored:
            same(made, restored)
    finally:
        shutil.rmtree(joined.images)


@pytest.fixture
def lazy(made: Made) -> Iterator[Dump]:
    """The stripped dump, with a server of its pages."""
    folder = made.stripped.copy("lazy")
    load_all(folder.images)
    (folder.images / "table").write_bytes(made.split.table.to_bytes())
    (folder.images / "list").write_text("".join(f"{path}\n" for path in made.segments))
    argv = [sys.executable, "-I", "-m", "smr.images.lazy"]
    for option, name in (("table", "table"), ("segments", "list"), ("socket", "lazy-pages.socket"), ("status", "status")):
        argv += [f"--{option}", str(folder.images / name)]
    try:
        subprocess.run(argv, check=True, cwd=folder.images, stdin=subprocess.DEVNULL, timeout=30)
        yield folder
        eventually(lambda: '"serving"' not in (folder.images / "status").read_text(), what="the server ends")
    finally:
        shutil.rmtree(folder.images)


def test_lazy_tree_is_stocks(made: Made, lazy: Dump) -> None:
    """Once the server has delivered all, before the tree runs."""
    with lazy.restored("--lazy-pages") as restored:
        eventually(lambda: '"done"' in (lazy.images / "status").read_text(), timeout_s=60, what="all is delivered")
        # Told to be lazy, CRIU first maps every private mapping writable, and so accounted, as it does in trees of several.
        same(made, restored, but=["ac"])


def test_lazy_tree_runs_while_pages_come(made: Made, lazy: Dump) -> None:
    """The process verifies, drops and writes its memory while the server works."""
    with lazy.restored("--lazy-pages") as restored:
        assert restored.go_on() == "ok"


def test_the_comparison_can_fail(plain: Made) -> None:
    """A tree that was not filled, one with a VMA less, one with a page that is no longer common: each is found to differ."""
    with plain.stripped.restored() as restored:
        found = differences(plain.memory, restored.memory())
    assert len(found) == 40 and "expected bytes, found zeros" in found[0]
    (memory,) = plain.memory.processes.values()
    other = dataclasses.replace(memory, vmas=memory.vmas[1:])
    assert "VMA is missing" in differences(plain.memory, TreeMemory({1: other}, frozenset()))[0]
    pair = frozenset({frozenset({(1, 0x1000), (2, 0x1000)})})
    assert "no longer common" in differences(TreeMemory({1: memory}, pair), plain.memory)[0]


def changed(table: PageTable, number: int, **fields: int) -> PageTable:
    """The table with another run."""
    runs = list(table.runs)
    runs[number] = runs[number]._replace(**fields)
    return dataclasses.replace(table, runs=sorted(runs, key=lambda run_: (run_.pid, run_.address)))


def _overlap(table: PageTable) -> PageTable:
    return changed(table, 1, address=table.runs[0].address + PAGE_BYTES)


def _past_the_end(table: PageTable) -> PageTable:
    return dataclasses.replace(table, segments=[*table.segments[:-1], table.segments[-1] - PAGE_BYTES])


def _no_chunk(table: PageTable) -> PageTable:
    return changed(table, 0, chunk=len(table.chunks))


@pytest.mark.parametrize("lie", [_overlap, _past_the_end, _no_chunk])
def test_a_table_that_contradicts_itself_is_not_read(plain: Made, lie: Callable[[PageTable], PageTable]) -> None:
    """Before any process is made."""
    with pytest.raises(SmrError) as caught:
        parse_table(lie(plain.split.table).to_bytes())
    assert caught.value.code is Code.IMAGE_CORRUPT


def _nowhere(table: PageTable, _: TreeMemory) -> PageTable:
    return changed(table, 0, address=0x1000_0000_0000)


def _of_another_kind(table: PageTable, memory: TreeMemory, needed: str) -> PageTable:
    (process,) = memory.processes.values()
    sizes = {number: table.pages(run_) * PAGE_BYTES for number, run_ in enumerate(table.runs)}
    number = min(sizes, key=lambda key: sizes[key])
    vma = next(
        vma for vma in process.vmas if vma.perms == needed and vma.name.startswith("/") and vma.end - vma.start >= sizes[number]
    )
    return changed(table, number, address=vma.start)


def _over_the_end(table: PageTable, memory: TreeMemory) -> PageTable:
    (process,) = memory.processes.values()
    starts = {vma.start for vma in process.vmas}
    last = {vma.end for vma in process.vmas} - starts
    number, run_ = next((n, r) for n, r in enumerate(table.runs) if r.address + table.pages(r) * PAGE_BYTES in last)
    return changed(table, number, address=run_.address + PAGE_BYTES)


def _of_nobody(table: PageTable, _: TreeMemory) -> PageTable:
    return dataclasses.replace(table, runs=[*table.runs, Run(4000, 4, 0x1000_0000_0000, 0)])


LIES = {
    "nowhere": _nowhere,
    "over the end of a VMA": _over_the_end,
    "memory that cannot be written": partial(_of_another_kind, needed="r--p"),
    "a program's code": partial(_of_another_kind, needed="r-xp"),
    "a process that is not there": _of_nobody,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_table_that_does_not_fit_the_tree_is_refused(plain: Made, lie: str) -> None:
    """Before one byte is written, and nothing of the tree has run."""
    table = parse_table(LIES[lie](plain.split.table, plain.memory).to_bytes())
    with plain.stripped.restored() as restored:
        before = restored.memory()
        with pytest.raises(SmrError) as caught:
            fill(table, plain.segments, restored.pids)
        assert caught.value.code is Code.RESTORE_FAILED
        assert differences(before, restored.memory()) == []


def test_a_tree_that_runs_is_not_filled(plain: Made) -> None:
    """Writing under a running process would be what no restore may do."""
    with plain.stripped.restored() as restored:
        fill(plain.split.table, plain.segments, restored.pids)
        os.kill(restored.pid, signal.SIGCONT)
        eventually(lambda: set(restored.states().values()) <= {"S", "R"})
        with pytest.raises(SmrError, match="needed stopped"):
            fill(plain.split.table, plain.segments, restored.pids)


@pytest.mark.parametrize("left", [0, PAGE_BYTES, -PAGE_BYTES])
def test_a_cut_segment_is_said(plain: Made, tmp_path: Path, left: int) -> None:
    """By the fill and by the join, with the segment's name; the tree never runs."""
    cut = tmp_path / "cut"
    shutil.copyfile(plain.segments[-1], cut)
    size = cut.stat().st_size
    os.truncate(cut, left if left >= 0 else size + left)
    segments = [*plain.segments[:-1], cut]
    with plain.stripped.restored() as restored:
        with pytest.raises(SmrError) as caught:
            fill(plain.split.table, segments, restored.pids)
        assert caught.value.code is Code.IMAGE_CORRUPT and "cut" in caught.value.message
        assert restored.states() == {1: "T"}
    folder = tmp_path / "join"
    shutil.copytree(plain.stripped.images, folder)
    with pytest.raises(SmrError) as caught:
        join(folder, plain.split.table, segments)
    assert caught.value.code is Code.IMAGE_CORRUPT


def test_altered_bytes_are_found_by_verify(plain: Made, tmp_path: Path) -> None:
    """One bit of a segment in a store, its length as it was: the blob is named, and of its chunks just that one is wrong."""
    dump = plain.stock.copy("altered")
    store = Store(tmp_path / "store")
    try:
        with store.ingest() as ingest:
            add_criu_layers(dump.images, ingest)
            image = ingest.commit("plain:1", make_config())
    finally:
        shutil.rmtree(dump.images)
    assert store.verify(image).ok
    table = page_table(image)
    assert table is not None
    chunk, path = table.chunks[5], segment_paths(image)[table.chunks[5].segment]
    data = bytearray(path.read_bytes())
    data[chunk.offset + 1000] ^= 1
    rewrite_blob(path, bytes(data))
    (problem,) = store.verify(image).problems
    assert problem.what == "segment" and problem.error.code is Code.IMAGE_CORRUPT and path.name in problem.digest
    with pytest.raises(SmrError, match=path.name[:12]):
        image.check()
    mine = [(number, other) for number, other in enumerate(table.chunks) if other.segment == chunk.segment]
    parts = [(number, other, data[other.offset : other.offset + other.stored_bytes]) for number, other in mine]
    assert [number for number, other, part in parts if xxhash.xxh3_128_digest(part) != other.digest] == [5]


def test_a_process_that_is_gone_is_said(plain: Made) -> None:
    """Killed between CRIU and the fill."""
    with plain.stripped.restored() as restored:
        pids = restored.pids
        restored.kill()
        with pytest.raises(SmrError, match="is gone"):
            fill(plain.split.table, plain.segments, pids)


def test_a_process_that_dies_during_the_fill_is_said(plain: Made) -> None:
    """Killed when a part of its pages is there."""
    table = plain.split.table
    for _ in range(5):
        with plain.stripped.restored() as restored:
            pids = restored.pids
            killer = threading.Thread(target=_kill_at, args=(restored.pid, table.memory_bytes // PAGE_BYTES // 8))
            killer.start()
            try:
                fill(table, plain.segments, pids, threads=1)
            except SmrError as error:
                assert error.code is Code.RESTORE_FAILED, error
                assert "cannot be written" in error.message
                return
            finally:
                killer.join()
    raise AssertionError("the process was never killed in time")


def _kill_at(pid: int, pages: int) -> None:
    """Kill a process as soon as so many more pages of it are in memory."""
    path = Path(f"/proc/{pid}/statm")
    before = int(path.read_text().split()[1])
    deadline = time.monotonic() + 10
    while int(path.read_text().split()[1]) < before + pages and time.monotonic() < deadline:
        pass
    os.kill(pid, signal.SIGKILL)
