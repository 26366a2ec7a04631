"""The nasty processes as dumps: how each is started, and its dump as CRIU made it, restored by CRIU, and split."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from smr.images.livesplit import LiveSplit
from smr.images.split import Split, split
from tests.integration.command import run
from tests.integration.criu_tree import Dump, dump, frozen
from tests.integration.memory_image import TreeMemory
from tests.integration.node import REPOSITORY

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
    memory = _stock_memory(stock)
    stripped = stock.copy("stripped")
    (folder / "segments").mkdir()
    return Made(case, stock, memory, stripped, split(stripped.images, folder / "segments", compress=case in COMPRESSED))


def make_live(case: str, criu: Path, folder: Path) -> Made:
    """The same of a frozen tree, dumped whole by CRIU and then again without its pages, which are taken from the tree.

    What is to be compressed is made a whole dump first, as for a container.
    """
    argv, env = program(case, folder)
    segments = folder / "segments"
    segments.mkdir()
    with frozen(criu, argv, {**os.environ, **env}, folder) as tree, LiveSplit(segments, tree.pids) as pages:
        stock = tree.dump("dump")
        if case not in COMPRESSED:
            pages.begin()
        stripped = tree.lazy_dump("stripped")
        taken = pages.complete(stripped.images) if case in COMPRESSED else pages.finish(stripped.images)
    assert taken is not None, "this CRIU was lazy"
    assert taken.memory_bytes == sum(path.stat().st_size for path in stock.images.glob("pages-*.img"))
    result = split(stripped.images, segments, compress=True) if case in COMPRESSED else taken.split
    return Made(case, stock, _stock_memory(stock), stripped, result)


def _stock_memory(stock: Dump) -> TreeMemory:
    with stock.restored() as restored:
        memory = restored.memory()
        assert restored.go_on() == "ok", "stock CRIU's restore"
    return memory
