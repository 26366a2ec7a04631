"""The prefetch program: who is charged for the page cache, how several share one image, and what a killed one leaves.

Real cgroups (root) and the page cache of a real file system; no engine is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from smr.images.image import Image
from smr.images.prefetch import cached_share
from smr.images.store import Store
from smr.proto.checkpoint import LayerType
from tests.integration.command import eventually
from tests.store_support import commit

MIB = 1 << 20
CGROUPS = Path("/sys/fs/cgroup")
# Joins the cgroups of its first argument (separated by colons), then becomes the rest.
JOIN = """
import os, sys
for path in sys.argv[1].split(":"):
    with open(path + "/cgroup.procs", "w") as file:
        file.write("0")
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with an image of 48 MiB."""
    store = Store(tmp_path / "store")
    commit(store, "llama", pages={f"pages-{number}.img": os.urandom(24 * MIB) for number in (1, 2)})
    return store


@pytest.fixture
def image(store: Store) -> Image:
    """The image, none of it in memory."""
    image = store.resolve("llama")
    drop(image)
    if cached_share(image):
        pytest.skip("this file system keeps files in memory (tmpfs)")
    return image


@pytest.fixture
def cgroups() -> Iterator[list[Path]]:
    """A cgroup as an engine makes it: in the hierarchy that accounts memory first, then in the others that are to be left."""
    if (CGROUPS / "cgroup.controllers").exists():
        parents = [CGROUPS]
    else:
        parents = [CGROUPS / name for name in ("memory", "blkio", "systemd", "unified") if (CGROUPS / name).is_dir()]
    made = []
    try:
        for parent in parents:
            path = parent / f"smr-test-{os.getpid()}"
            try:
                path.mkdir()
            except OSError as error:
                pytest.skip(f"no cgroup can be made here: {error}")
            made.append(path)
        if not (made[0] / "memory.stat").exists():
            pytest.skip("the memory controller is not there for cgroups below the root")
        yield made
    finally:
        for path in made:
            with suppress(OSError):
                (path / "memory.force_empty").write_text("0")
            eventually(lambda path=path: not (path / "cgroup.procs").read_text())
            path.rmdir()


def drop(image: Image) -> None:
    """Take the image out of the page cache."""
    for layer in image.layers:
        fd = os.open(layer.path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def program(store: Store, *words: object) -> list[str]:
    """The prefetch program."""
    return [sys.executable, "-I", "-m", "smr.images.prefetch", str(store.root), "llama", *map(str, words)]


def inside(cgroups: list[Path], argv: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a program that begins in these cgroups."""
    joining = [sys.executable, "-c", JOIN, ":".join(map(str, cgroups)), *argv]
    return subprocess.run(joining, capture_output=True, text=True, check=True, timeout=60)


def charged(cgroup: Path) -> int:
    """Page cache that a memory cgroup pays for: `file` on v2, `cache` on v1."""
    lines = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    return int(lines.get("file", lines.get("cache", "0")))


def test_page_cache_is_not_charged_to_the_cgroup_that_it_was_started_in(store: Store, image: Image, cgroups: list[Path]) -> None:
    """A pod's runtime starts it; the pod pays nothing. Who reads the image from there without leaving does pay."""
    inside(cgroups, program(store))
    assert cached_share(image) == 1.0
    assert charged(cgroups[0]) < 8 * MIB
    drop(image)
    inside(cgroups, ["/bin/cp", str(image.layers_of(LayerType.PAGES)[0].path), "/dev/null"])
    assert charged(cgroups[0]) >= 24 * MIB


def test_every_hierarchy_is_left(cgroups: list[Path]) -> None:
    """Memory, block I/O, and systemd's, which would end a pin with the unit that it was made in."""
    code = """
from pathlib import Path
from smr.images.charge import leave_cgroup
before = Path("/proc/self/cgroup").read_text()
leave_cgroup()
print(before.count("smr-test"), Path("/proc/self/cgroup").read_text().count("smr-test"))
"""
    assert inside(cgroups, [sys.executable, "-c", code]).stdout == f"{len(cgroups)} 0\n"


def test_two_at_once_read_the_image_once(store: Store, image: Image) -> None:
    """What both had read from the disk is one image and some, not two: counted by the kernel, process by process."""
    both = [subprocess.Popen(program(store), stdout=subprocess.DEVNULL) for _ in range(2)]
    read = []
    for process in both:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        read.append(usage.ru_inblock * 512)
    assert [process.returncode for process in both] == [0, 0]
    assert cached_share(image) == 1.0
    assert 48 * MIB <= sum(read) < 60 * MIB


def test_killed_prefetch_does_not_keep_others_waiting(store: Store, image: Image) -> None:
    """Its lock goes with it; another one then reads what is left."""
    blob = max(image.layers, key=lambda layer: layer.path).path
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl, time; f = open({str(blob)!r}); fcntl.flock(f, 2); print(1, flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    with holder, subprocess.Popen(program(store)) as waiting:
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.kill()
        assert waiting.wait(timeout=60) == 0
    assert cached_share(image) == 1.0


def test_prefetch_ends_with_the_bundle_and_with_its_cancel_file(tmp_path: Path, store: Store, image: Image) -> None:
    """While it waits for another one, too: a container that was given up leaves no process behind."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    blob = image.layers[0].path
    code = f"import fcntl, sys; f = open({str(blob)!r}); fcntl.flock(f, 2); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        by_bundle = subprocess.Popen(program(store, "--while", bundle))
        by_file = subprocess.Popen(program(store, tmp_path / "cancel"))
        assert (by_bundle.poll(), by_file.poll()) == (None, None)
        bundle.rmdir()
        (tmp_path / "cancel").touch()
        assert (by_bundle.wait(timeout=60), by_file.wait(timeout=60)) == (0, 0)
        holder.communicate()
    assert cached_share(image) < 0.5


def test_cancelled_while_it_reads(tmp_path: Path, store: Store, image: Image) -> None:
    """SIGKILL is a cancel too; the image stays usable and a later prefetch completes it."""
    with subprocess.Popen(program(store)) as process:
        process.kill()
    assert subprocess.run(program(store), check=False, timeout=60).returncode == 0
    assert cached_share(image) == 1.0
    assert store.verify(image).ok


def test_command_draws_a_bar_on_a_terminal_and_prints_json(tmp_path: Path, store: Store, image: Image) -> None:
    """The bar goes to standard error, where that is a terminal; standard output has the document alone."""
    env = os.environ | {
        "SMR_STORE": str(store.root),
        "SMR_RUN": str(tmp_path / "run"),
        "SMR_CONFIG": "/dev/null",
        "TERM": "xterm",
    }
    code = "import sys; from smr.shim.cli import main; main(sys.argv[1:])"
    argv = [sys.executable, "-c", code, "prefetch", "llama", "--json"]
    ours, theirs = os.openpty()
    try:
        done = subprocess.run(argv, env=env, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, check=True, timeout=60)
        drawn = os.read(ours, 65536).decode(errors="replace")
    finally:
        os.close(ours)
        os.close(theirs)
    found = json.loads(done.stdout)
    assert found["total_bytes"] == found["read_bytes"] + found["cached_bytes"] >= 48 * MIB
    assert "prefetch" in drawn
    plain = subprocess.run(argv, env=env, capture_output=True, check=True, timeout=60)
    assert json.loads(plain.stdout)["read_bytes"] == 0
    assert plain.stderr == b""
