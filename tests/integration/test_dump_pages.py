"""Pages that SMR takes from frozen containers itself: through every runtime, and what happens when it does not go well.

That the result is right byte by byte is the matter of test_pages.py, which has all its processes this way too.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from smr.images.join import join
from smr.images.live import Live
from smr.images.livesplit import LiveSplit
from smr.images.pagemap import read_pagemap
from smr.images.pagetable import PAGE_BYTES
from smr.images.spans import Span
from smr.proto.errors import Code, SmrError
from smr.shim.lazydump import is_frozen
from smr.shim.procs import thread_at_page_start
from tests.integration.command import eventually, run
from tests.integration.criu_tree import Dump, Frozen, frozen
from tests.integration.page_cases import program
from tests.integration.runc import Runc
from tests.integration.sandbox import Sandbox

FAIL = {"smr.fallback": "fail"}
CRC = {"crc": 646947347}
FEATURES = ("memory", "workers")


def checkpoint(runc: Runc, image: str, *words: str) -> dict[str, object]:
    """What `smr checkpoint --json` says."""
    return json.loads(runc.checkpoint("source", image, "--json", *words).stdout)


def test_a_container_goes_on(runc: Runc) -> None:
    """With every runtime: pages are taken by SMR, without a warning, and the container has its memory and its counters."""
    runc.start("source", *FEATURES)
    boot = runc.ready("source")["boot"]
    said = checkpoint(runc, "on:1")
    if thread_at_page_start(runc.pid("source")):  # where the stack begins is chance, and CRIU takes that badly
        assert [warning for warning in said["warnings"] if "is at the start of a page" in warning] == said["warnings"]
    else:
        assert said["warnings"] == []
        assert {"dump", "pages", "thaw"} <= set(said["stages_s"])
    assert not is_frozen(runc.pid("source"))
    assert runc.ask("source", "memory") == CRC
    assert runc.ask("source", "count") == {"count": 1, "boot": boot}
    runc.node.smr("images", "verify", "on:1")


@pytest.mark.parametrize("words", [(), ("--compress",)])
def test_an_image_has_the_memory_of_its_container(restoring_runc: Runc, words: Sequence[str]) -> None:
    """64 MiB and the children's counters."""
    runc = restoring_runc
    runc.start("source", *FEATURES)
    boot = runc.ready("source")["boot"]
    aligned = thread_at_page_start(runc.pid("source"))
    assert ("pages" in checkpoint(runc, "taken:1", *words)["stages_s"]) is not bool(aligned)
    runc.remove("source")
    inspected = json.loads(runc.node.smr("images", "inspect", "taken:1", "--json").stdout)
    assert inspected["config"]["memory_bytes"] > 64 << 20
    runc.start("again", *FEATURES, annotations={"smr.restore": "taken:1", **FAIL})
    assert runc.ask("again", "memory") == CRC
    assert runc.ask("again", "count") == {"count": 1, "boot": boot}


@contextmanager
def other_criu(runc: Runc, before: str) -> Iterator[None]:
    """A CRIU before which some Python is run."""
    settings, folder = runc.node.path / "smr.toml", runc.node.path / "other"
    folder.mkdir()
    wrapper = folder / "criu"
    wrapper.write_text(f"#!{sys.executable} -I\nimport os, sys, time\n{before}\nos.execv('{runc.node.criu}', sys.argv)\n")
    wrapper.chmod(0o755)
    text = settings.read_text()
    settings.write_text(text.replace(f'"{runc.node.criu}"', f'"{wrapper}"'))
    try:
        yield
    finally:
        settings.write_text(text)
        wrapper.unlink()
        folder.rmdir()


def test_a_lazy_dump_that_fails_is_made_again_by_criu_alone(restoring_runc: Runc) -> None:
    """It has lost its socket, and finds out when all is written: a warning says so, and the image is as good."""
    runc = restoring_runc
    runc.start("source", *FEATURES)
    runc.ready("source")
    with other_criu(runc, "os.closerange(200, 300)"):
        said = checkpoint(runc, "alone:1")
    (warning,) = said["warnings"]
    assert "CRIU dumped the pages itself" in warning
    assert runc.ask("source", "memory") == CRC
    runc.remove("source")
    runc.start("again", *FEATURES, annotations={"smr.restore": "alone:1", **FAIL})
    assert runc.ask("again", "memory") == CRC


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the workload's thread is machine code for x86_64")
def test_a_stack_pointer_at_the_start_of_a_page(restoring_runc: Runc) -> None:
    """CRIU would leave out no page of such a process: it is not asked to, a warning says so, and the image is as good."""
    runc = restoring_runc
    runc.start("source", "memory", "aligned")
    runc.ready("source")
    said = checkpoint(runc, "aligned:1")
    (warning,) = said["warnings"]
    assert "CRIU dumped the pages itself" in warning and "is at the start of a page" in warning
    assert "pages" not in said["stages_s"]
    assert runc.ask("source", "memory") == CRC
    runc.remove("source")
    runc.start("again", "memory", "aligned", annotations={"smr.restore": "aligned:1", **FAIL})
    assert runc.ask("again", "memory") == CRC
    assert runc.ask("again", "aligned") == {"alive": True}


def test_a_checkpoint_is_killed(restoring_runc: Runc) -> None:
    """At any moment of a lazy dump and of the reading: CRIU ends, the container is thawed and serves on, with its memory."""
    runc = restoring_runc
    runc.start("source", *FEATURES)
    boot = runc.ready("source")["boot"]
    begin = time.monotonic()
    checkpoint(runc, "whole:1")
    length_s = time.monotonic() - begin
    argv = [
        str(word) for word in (*runc.prefix, runc.node.bin / "smr", "checkpoint", "source", "-n", "part:1", "--engine", "runc")
    ]
    null = subprocess.DEVNULL
    for moment in range(8):
        # The first half of it is Python's start and the engine's answers.
        with subprocess.Popen(argv, env=runc.env, stdin=null, stdout=null, stderr=null) as process:
            time.sleep(length_s * (0.4 + 0.6 * moment / 8))
            process.kill()
        answer = eventually(lambda: runc.ask("source", "count"), timeout_s=15, what=f"it serves after moment {moment}")
        assert answer == {"count": moment + 1, "boot": boot}
        assert runc.ask("source", "memory") == CRC
        if runc.node.smr("images", "verify", "part:1", check=False).returncode == 0:
            runc.node.smr("images", "rm", "part:1")
    runc.node.smr("gc")
    assert list((runc.node.store / "ingest").glob("*")) == []


@pytest.fixture
def tree(newer_criu: Path, tmp_path: Path) -> Iterator[Frozen]:
    """Memory with holes, frozen."""
    argv, env = program("holes", tmp_path)
    with frozen(newer_criu, argv, {**os.environ, **env}, tmp_path) as found:
        yield found


def pages_of(dump: Dump) -> dict[tuple[int, int], bytes]:
    """What a dump has, by process and page, without zeros and without what the kernel writes."""
    found = {}
    kernels = {(pid, address // PAGE_BYTES) for pid, areas in dump.kernels().items() for address, _ in areas}
    for pid in dump.pids:
        pagemap = read_pagemap(dump.images / f"pagemap-{pid}.img")
        data = pagemap.pages_path.read_bytes()
        for entry in pagemap.entries:
            for page in range(entry.begin, entry.end):
                at = (entry.first + page - entry.begin) * PAGE_BYTES
                if (pid, page) not in kernels and any(data[at : at + PAGE_BYTES]):
                    found[pid, page] = data[at : at + PAGE_BYTES]
    return found


def wrong_guess(live: Live, how: str) -> dict[int, list[Span]]:
    """Candidates that are not what CRIU will say."""
    right = Live.candidates(live)
    assert sum(end - begin for spans in right.values() for begin, end in spans) > 4096
    if how == "nothing":
        return {}
    if how == "other pages":
        return {pid: [(begin - 7, begin + 93) for begin, end in spans if end - begin > 200] for pid, spans in right.items()}
    if how == "too many":
        return {pid: [(begin, end + 5000) for begin, end in (*spans, *spans)] for pid, spans in right.items()}
    return {pid: [(begin + 100, end - 1) for begin, end in spans if end - begin > 200] for pid, spans in right.items()}


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("how", ["nothing", "other pages", "too many", "too few"])
def test_a_wrong_guess_costs_time_only(tree: Frozen, tmp_path: Path, how: str, staged: bool) -> None:
    """Whatever was read ahead, what CRIU keeps and what is in segments are together the dump, and apart.

    Segments that wait in memory are in no file until they land, and then have their digests.
    """
    out = tmp_path / "segments"
    out.mkdir()
    stock = tree.dump("stock")
    with LiveSplit(out, tree.pids, staged=staged) as pages:
        pages._live.candidates = lambda: wrong_guess(pages._live, how)  # type: ignore[method-assign]
        pages.begin()
        dump = tree.lazy_dump("lazy")
        taken = pages.finish(dump.images)
    assert taken is not None and taken.split.table.memory_bytes > 40 << 20
    assert [segment.path.exists() for segment in taken.split.segments] == [not staged] * len(taken.split.segments)
    result = taken.land()
    for segment in result.segments:
        data = segment.path.read_bytes()
        assert len(data) == segment.size_bytes
        assert segment.digest == (f"sha256:{hashlib.sha256(data).hexdigest()}" if staged else "")
    join(dump.images, result.table, [segment.path for segment in result.segments])
    assert pages_of(dump) == pages_of(stock)


def test_a_disk_that_is_full_when_segments_land_is_said(tree: Frozen, box: Sandbox) -> None:
    """The container runs again by then; there is no image."""
    out = box.base / "full"
    out.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", out])
    try:
        with LiveSplit(out, tree.pids, staged=True) as pages:
            taken = pages.finish(tree.lazy_dump("lazy").images)
        assert taken is not None
        with pytest.raises(SmrError) as caught:
            taken.land()
    finally:
        run(["umount", out])
        out.rmdir()
    assert caught.value.code is Code.DISK_FULL


def test_a_dump_that_is_not_lazy_is_left_alone(tree: Frozen, tmp_path: Path) -> None:
    """None says that there is nothing to take, and no file has changed."""
    out = tmp_path / "segments"
    out.mkdir()
    with LiveSplit(out, tree.pids) as pages:
        dump = tree.dump("stock")
        before = {path.name: path.stat().st_mtime_ns for path in dump.images.iterdir()}
        assert pages.finish(dump.images) is None
        assert pages.complete(dump.images) is None
    assert {path.name: path.stat().st_mtime_ns for path in dump.images.iterdir()} == before


def test_all_pages_put_into_criu_s_files_are_its_dump(tree: Frozen, tmp_path: Path) -> None:
    """Byte by byte, and its own restore of it is right."""
    stock = tree.dump("stock")
    dump = tree.lazy_dump("lazy")
    with LiveSplit(tmp_path, tree.pids) as pages:
        taken = pages.complete(dump.images)
    assert taken is not None
    assert taken.memory_bytes == sum(path.stat().st_size for path in stock.images.glob("pages-*.img"))
    assert pages_of(dump) == pages_of(stock)
    os.kill(tree.pid, signal.SIGKILL)
    (tree.cgroup / "cgroup.freeze").write_text("0")
    with dump.restored() as restored:
        assert restored.go_on() == "ok"


@pytest.mark.parametrize("when", ["before the dump is read", "before the pages are read"])
def test_a_process_that_is_killed_meanwhile_is_said(tree: Frozen, tmp_path: Path, when: str) -> None:
    """SIGKILL ends frozen processes of cgroup v2 too."""
    pids = tree.pids
    with LiveSplit(tmp_path, pids) as pages:
        dump = tree.lazy_dump("lazy")
        if when == "before the pages are read":
            read = pages._read

            def killing(*words: object) -> bool:
                kill(tree)
                return read(*words)  # type: ignore[arg-type]

            pages._read = killing  # type: ignore[method-assign]
        else:
            kill(tree)
        with pytest.raises(SmrError) as caught:
            pages.finish(dump.images)
    assert caught.value.code is Code.CHECKPOINT_FAILED
    assert str(pids[1]) in caught.value.message


def kill(tree: Frozen) -> None:
    """End it, and wait until its memory is gone."""
    os.kill(tree.pid, signal.SIGKILL)
    eventually(lambda: "populated 0" in (tree.cgroup / "cgroup.events").read_text())


def test_a_process_that_is_not_in_the_tree_is_said(tree: Frozen, tmp_path: Path) -> None:
    """A dump of another container would be read from the wrong processes."""
    with LiveSplit(tmp_path, {4711: tree.pid}) as pages:
        dump = tree.lazy_dump("lazy")
        with pytest.raises(SmrError, match="process 1 of the dump is not in the container's tree"):
            pages.finish(dump.images)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_full_disk_is_said(tree: Frozen, box: Sandbox, ahead: bool) -> None:
    """By the name of the folder; the container's processes are as they were."""
    out = box.base / "full"
    out.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", out])
    try:
        with LiveSplit(out, tree.pids) as pages:
            if ahead:
                pages.begin()
            dump = tree.lazy_dump("lazy")
            with pytest.raises(SmrError) as caught:
                pages.finish(dump.images)
    finally:
        run(["umount", out])
        out.rmdir()
    assert caught.value.code is Code.DISK_FULL and str(out) in caught.value.message
    assert is_frozen(tree.pid)
    (tree.cgroup / "cgroup.freeze").write_text("0")
    (tree.folder / "go").touch()
    assert eventually((tree.folder / "answer").read_text, what="the program goes on") == "ok"
