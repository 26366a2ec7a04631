"""Every byte of a restored tree, before it runs, against stock CRIU's restore of the same dump; and the tree then goes on.

One dump of each nasty process is restored by CRIU as it is, filled, joined and lazily: VMAs, bytes, guard pages and the pages that
processes have in common must be the same. The process then verifies and uses its memory itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import xxhash

from smr.images.fill import fill
from smr.images.join import join
from smr.images.lazy_folder import load_all
from smr.images.pagetable import PAGE_BYTES, Codec, PageTable, Run, parse_table
from smr.images.split import Split, split
from smr.proto.errors import Code, SmrError
from tests.integration.command import eventually, run
from tests.integration.criu_tree import Dump, Restored, dump
from tests.integration.memory_image import TreeMemory, differences
from tests.integration.node import REPOSITORY
from tests.integration.sandbox import Sandbox

pytestmark = pytest.mark.slow
MIB = 1 << 20
_HERE = Path(__file__).parent
_NASTY = _HERE / "nasty.py"
# How many MiB of it must be delivered by us, at least: a comparison of what CRIU restores with what CRIU restores says nothing.
MOVED = {
    "cow": 100,
    "generations": 16,
    "protections": 48,
    "advice": 80,
    "stacks": 60,
    "hugetlb": 30,
    "memfd": 30,
    "shared": 46,
    "sparse": 38,
    "zeros": 60,
    "threads": 40,
    "stopped": 60,
    "locked": 30,
    "guard": 36,
    "files": 30,
    "holes": 46,
    "heap": 24,
    "jemalloc": 24,
    "tcmalloc": 24,
    "jvm": 60,
    "node": 50,
    "torch": 100,
}
COMPRESSED = ("heap", "jemalloc", "jvm", "zeros")
Program = tuple[Sequence[object], Mapping[str, str]]


def program(case: str, folder: Path) -> Program:
    """How to start a case, and with what besides the environment; skips where the machine has not got it."""
    other = {"jvm": _jvm, "node": _node, "torch": _torch, "hugetlb": _hugetlb}
    if case in other:
        return other[case](folder)
    if case in ("jemalloc", "tcmalloc"):
        found = sorted(Path("/usr/lib").glob(f"*/lib{case}*.so.[24]"))
        if not found:
            pytest.skip(f"no {case} in /usr/lib: run dev/provision")
        return _python("heap", folder), {"LD_PRELOAD": str(found[0])}
    if case == "guard" and tuple(map(int, os.uname().release.split(".")[:2])) < (6, 15):
        pytest.skip(f"Linux {os.uname().release} does not tell where guard regions are (6.15 does)")
    return _python(case, folder), {}


def _python(case: str, folder: Path, interpreter: object = sys.executable) -> Sequence[object]:
    return interpreter, "-I", _NASTY, case, folder


def _hugetlb(folder: Path) -> Program:
    free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    if not free.exists() or int(free.read_text()) < 32:
        pytest.skip("no huge pages of 2 MiB can be reserved here")
    return _python("hugetlb", folder), {}


def _jvm(folder: Path) -> Program:
    java, javac = shutil.which("java"), shutil.which("javac")
    if java is None or javac is None:
        pytest.skip("no java and javac on PATH")
    run([javac, "-d", folder, _HERE / "Nasty.java"])
    return [java, "-Xms192m", "-Xmx192m", "-XX:+UseG1GC", "-XX:-UsePerfData", "-cp", folder, "Nasty", folder], {}


def _node(folder: Path) -> Program:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on PATH")
    return [node, _HERE / "nasty.js", folder], {"UV_USE_IO_URING": "0"}  # CRIU has no io_uring


def _torch(folder: Path) -> Program:
    path = Path(os.environ.get("SMR_DEMO_PYTHON", REPOSITORY / ".venv-demo/bin/python"))
    if not path.exists() or run([path, "-I", "-c", "import torch"], check=False).returncode != 0:
        pytest.skip(f"no {path} with torch: run dev/demo once")
    return _python("torch", folder, path), {"OMP_NUM_THREADS": "2"}


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


@dataclass(frozen=True)
class Made:
    """A dump in three forms: as CRIU made it, what its restore is, and split."""

    case: str
    stock: Dump
    memory: TreeMemory
    stripped: Dump
    split: Split

    @property
    def segments(self) -> list[Path]:
        """The files."""
        return [segment.path for segment in self.split.segments]


def make(case: str, criu: Path, folder: Path) -> Made:
    """Start, dump, restore by stock CRIU, split. The stock restore must itself be right."""
    argv, env = program(case, folder)
    stock = dump(criu, argv, {**os.environ, **env}, folder)
    with stock.restored() as restored:
        memory = restored.memory()
        assert restored.go_on() == "ok", "stock CRIU's restore"
    stripped = stock.copy("stripped")
    (folder / "segments").mkdir()
    return Made(case, stock, memory, stripped, split(stripped.images, folder / "segments", compress=case in COMPRESSED))


@pytest.fixture(scope="module", params=MOVED)
def made(request: pytest.FixtureRequest, box: Sandbox, newer_criu: Path, huge_pages: None) -> Iterator[Made]:
    """Each nasty process."""
    folder = box.base / f"pages-{request.param}"
    folder.mkdir()
    try:
        yield make(request.param, newer_criu, folder)
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
    """As much as there is, and of private anonymous writable VMAs only; never a page that the kernel writes to, nor a common one."""
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
    """A tree that was not filled, one with a VMA less and one with a page that is no longer common are told from the stock one."""
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
        os.kill(restored.pid, 18)
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


def test_altered_bytes_have_another_digest(plain: Made, tmp_path: Path) -> None:
    """One bit of a segment: its blob's sha256 and the digest of just that chunk tell."""
    path, chunk = tmp_path / "altered", plain.split.table.chunks[5]
    segment = plain.split.segments[chunk.segment]
    data = bytearray(segment.path.read_bytes())
    assert f"sha256:{hashlib.sha256(data).hexdigest()}" == segment.digest
    data[chunk.offset + 1000] ^= 1
    path.write_bytes(data)
    assert f"sha256:{hashlib.sha256(data).hexdigest()}" != segment.digest
    wrong = [
        number
        for number, other in enumerate(plain.split.table.chunks)
        if other.segment == chunk.segment
        and other.codec == Codec.RAW
        and xxhash.xxh3_128_digest(data[other.offset : other.offset + other.stored_bytes]) != other.digest
    ]
    assert wrong == [5]


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
    os.kill(pid, 9)
