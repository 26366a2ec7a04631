"""The lazy restore on real CRIU: a process that does all it can to its memory while its pages stream in, and killed servers.

The program below has an area of patterned pages and a model of it: which page of the pattern, zeros, or its own writing belongs
where. It runs from the first instant after the restore while the server is told to fill slowly, and compares the whole area with
the model in the end; its children do the same with theirs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from smr.images.lazy_folder import load_all
from smr.images.pagetable import Codec
from smr.images.split import split
from tests.integration.command import eventually

_PROGRAM = r"""
import ctypes, os, random, struct, sys, time
folder, mib, mode, seed = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
PAGE, pages = 4096, mib << 8
libc = ctypes.CDLL(None, use_errno=True)
LONG = ctypes.c_long
for name, count in (("mmap", 6), ("munmap", 2), ("mremap", 5), ("madvise", 3), ("mprotect", 3)):
    getattr(libc, name).argtypes = (LONG,) * count
    getattr(libc, name).restype = LONG
def must(value):
    if value == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return value
base = must(libc.mmap(0, pages * PAGE, 3, 0x22, -1, 0))
scratch = must(libc.mmap(0, 4096 * PAGE, 0, 0x22, -1, 0))
def page(number):
    return bytes(PAGE) if number < 0 else struct.pack("<QQ", number + 1, number * 0x9E3779B97F4A7C15 & (1 << 64) - 1) * 256
want = list(range(pages))
for number in range(pages):
    ctypes.memmove(base + number * PAGE, page(number), PAGE)
wiped = must(libc.mmap(0, 64 * PAGE, 3, 0x22, -1, 0))
unshared = must(libc.mmap(0, 64 * PAGE, 3, 0x22, -1, 0))
ctypes.memset(wiped, 7, 64 * PAGE)
ctypes.memset(unshared, 9, 64 * PAGE)
def report(name, text):
    with open(folder + "/." + name, "w") as file:
        file.write(text)
    os.rename(folder + "/." + name, folder + "/" + name)
def check(at):
    found = ctypes.string_at(base + at * PAGE, PAGE)
    if found != page(want[at]):
        kind = "zeros" if found == bytes(PAGE) else struct.unpack_from("<Q", found)[0] - 1
        raise AssertionError(f"page {at}: wanted {want[at]}, found {kind}")
def span(rng, most=600):
    start = rng.randrange(pages)
    return start, min(pages, start + rng.randrange(1, most))
def whole(start, end):
    # mremap takes no more than one mapping, and has already unmapped the target when it says so.
    with open("/proc/self/maps") as maps:
        for line in maps:
            low, high = (int(number, 16) for number in line.split(" ", 1)[0].split("-"))
            if low <= base + start * PAGE < high:
                return base + end * PAGE <= high
    return False
def fresh(start, end):
    must(libc.mmap(base + start * PAGE, (end - start) * PAGE, 3, 0x32, -1, 0))
def act(rng, number, depth):
    kind = rng.choice(("read", "read", "drop", "write", "unmap", "move", "swap", "keep", "protect", "shrink", "fork"))
    start, end = span(rng)
    size = (end - start) * PAGE
    if kind == "read":
        for at in rng.sample(range(pages), 20):
            check(at)
    elif kind == "drop":
        must(libc.madvise(base + start * PAGE, size, 4))
        want[start:end] = [-1] * (end - start)
        check(start)
        check(end - 1)
    elif kind == "write":
        for at in range(start, min(end, start + 50)):
            want[at] = 10**6 + number
            ctypes.memmove(base + at * PAGE, page(want[at]), PAGE)
    elif kind == "unmap":
        must(libc.munmap(base + start * PAGE, size))
        fresh(start, end)
        want[start:end] = [-1] * (end - start)
        check(start)
    elif kind in ("move", "keep"):
        target = rng.randrange(0, pages - (end - start) + 1)
        if not whole(start, end) or (target < end and start < target + (end - start)):
            return
        must(libc.mremap(base + start * PAGE, size, size, 3 if kind == "move" else 7, base + target * PAGE))
        want[target : target + end - start] = want[start:end]
        want[start:end] = [-1] * (end - start)
        if kind == "move":
            fresh(start, end)
        check(target)
        check(start)
    elif kind == "swap":
        if not whole(start, end):
            return
        must(libc.mremap(base + start * PAGE, size, size, 3, scratch))
        if rng.random() < 0.5:
            if ctypes.string_at(scratch, PAGE) != page(want[start]):
                raise AssertionError(f"page {start} in scratch: not {want[start]}")
        must(libc.mremap(scratch, size, size, 3, base + start * PAGE))
        must(libc.mmap(scratch, size, 0, 0x32, -1, 0))
        check(end - 1)
    elif kind == "protect":
        must(libc.mprotect(base + start * PAGE, size, 1))
        check(start)
        must(libc.mprotect(base + start * PAGE, size, 3))
    elif kind == "shrink":
        half = (end - start) // 2
        if not half or not whole(start, end):
            return
        must(libc.mremap(base + start * PAGE, size, size - half * PAGE, 0, 0))
        fresh(end - half, end)
        want[end - half : end] = [-1] * half
        check(end - half)
    elif kind == "fork" and depth < 2 and rng.random() < 0.4:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                storm(random.Random(number + 1000 * depth), 15, depth + 1)
                for at in rng.sample(range(pages), 300):
                    check(at)
                for at in range(0, pages, 7 if depth else 3):
                    check(at)
                code = 0
            except BaseException as error:
                report(f"child-{os.getpid()}", f"after {number}: {error!r}")
            os._exit(code)
        children.append(pid)
children = []
def storm(rng, count, depth=0):
    children.clear()
    for number in range(count):
        act(rng, number, depth)
    for pid in children:
        if os.waitpid(pid, 0)[1]:
            raise AssertionError("a child")
def advised():
    must(libc.madvise(wiped, 64 * PAGE, 18))
    must(libc.madvise(unshared, 64 * PAGE, 10))
    pid = os.fork()
    if not pid:
        os._exit(0 if ctypes.string_at(wiped, 64 * PAGE) == bytes(64 * PAGE) else 1)
    if os.waitpid(pid, 0)[1]:
        raise AssertionError("memory that a fork wipes was not zero in the child")
    if ctypes.string_at(wiped, 64 * PAGE) != b"\7" * 64 * PAGE or ctypes.string_at(unshared, 64 * PAGE) != b"\x09" * 64 * PAGE:
        raise AssertionError("memory that a fork wipes is wrong in the parent")
def state():
    with open(folder + "/status") as file:
        return file.read()
for fd in (0, 1, 2):
    os.dup2(os.open("/dev/null", os.O_RDWR), fd)
report("ready", "")
while not os.path.exists(folder + "/go"):
    time.sleep(0.001)
try:
    if mode == "storm":
        advised()
        storm(random.Random(seed), 150)
    during = state()
    report("acted", during)
    if mode == "die":
        time.sleep(100)
    for at in range(pages):
        check(at)
    report("answer", "right")
except BaseException as error:
    report("answer", repr(error))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A dump that was split, and where it is restored."""

    folder: Path
    criu: Path
    pid: int

    @property
    def work(self) -> Path:
        """CRIU's work directory."""
        return self.folder / "work"

    def status(self) -> dict[str, object]:
        """What the server says."""
        fields: dict[str, object] = json.loads((self.folder / "status").read_text())
        return fields

    def serve(self, *options: str, program: Sequence[str] = ("-m", "smr.images.lazy")) -> subprocess.CompletedProcess[str]:
        """Start a server."""
        files = {"table": self.folder / "table", "segments": self.folder / "list", "status": self.folder / "status"}
        files["socket"] = self.work / "lazy-pages.socket"
        given = [str(word) for name, path in files.items() for word in (f"--{name}", path)]
        command = [sys.executable, "-I", *program, *given, *options]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)

    def restore(self) -> int:
        """Let CRIU restore the process; it runs when this returns 0."""
        command = [self.criu, "restore", "-D", self.folder / "img", "-W", self.work, "-d", "--shell-job", "--lazy-pages"]
        return subprocess.run([*command, "-v4", "-o", "restore.log"], cwd=self.work, check=False, timeout=60).returncode

    def servers(self) -> list[int]:
        """Processes of the server, the keeper first."""
        name = bytes(self.work / "lazy-pages.socket")
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if name in (path / "cmdline").read_bytes():
                    found.append((int((path / "stat").read_text().rpartition(")")[2].split()[1]), int(path.name)))
            except OSError:
                continue
        pids = {pid for _, pid in found}
        return [pid for parent, pid in sorted(found, key=lambda pair: pair[0] in pids)]

    def answer(self) -> str:
        """What the process says of its memory in the end."""
        eventually((self.folder / "answer").exists, timeout_s=60)
        more = [path.read_text() for path in self.folder.glob("child-*")]
        return " ".join([(self.folder / "answer").read_text(), *more])

    def ended(self) -> bool:
        """Whether the server is gone."""
        return not self.servers()


@pytest.fixture(name="box")
def _box(tmp_path: Path, engines: Path) -> Iterator[Callable[..., Box]]:
    made: list[Box] = []

    def make(mode: str, *, mib: int = 48, seed: int = 1, compress: bool = False) -> Box:
        criu = engines / "criu-new/bin/criu"
        if not criu.exists():
            pytest.skip(f"no {criu}: run dev/provision")
        for name in ("img", "out", "work"):
            (tmp_path / name).mkdir()
        (tmp_path / "program.py").write_text(_PROGRAM)
        command = [sys.executable, "-S", "-I", str(tmp_path / "program.py"), str(tmp_path), str(mib), mode, str(seed)]
        process = subprocess.Popen(command, start_new_session=True)
        eventually((tmp_path / "ready").exists, timeout_s=60)
        dump = [criu, "dump", "-t", str(process.pid), "-D", tmp_path / "img", "--shell-job", "-v1", "-o", "dump.log"]
        subprocess.run(dump, check=True, timeout=60)
        process.wait()
        cut = split(tmp_path / "img", tmp_path / "out", compress=compress)
        assert cut.table.memory_bytes >= mib << 20
        load_all(tmp_path / "img")
        (tmp_path / "table").write_bytes(cut.table.to_bytes())
        (tmp_path / "list").write_text("".join(f"{segment.path}\n" for segment in cut.segments))
        if compress:
            assert any(chunk.codec != Codec.RAW for chunk in cut.table.chunks)
        made.append(Box(folder=tmp_path, criu=criu, pid=process.pid))
        return made[-1]

    yield make
    for box in made:
        for pid in [box.pid, *box.servers()]:
            try:
                if str(tmp_path).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
            except OSError:
                continue


def _started(box: Box, *options: str) -> None:
    served = box.serve(*options)
    assert served.returncode == 0, served.stderr
    assert eventually(box.status)["state"] == "serving"
    assert box.restore() == 0, (box.work / "restore.log").read_text()[-2000:]
    (box.folder / "go").touch()


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_a_process_finds_its_own_bytes_whatever_it_does_meanwhile(box: Callable[..., Box], seed: int) -> None:
    """Reads, drops, unmaps, moves, protects and forks while pages are missing: not one byte is wrong, and the server ends."""
    made = box("storm", seed=seed)
    _started(made, "--threads", "1", "--rest", "0.05")
    assert made.answer() == "right"
    assert json.loads((made.folder / "acted").read_text())["state"] == "serving"
    eventually(made.ended, timeout_s=60)
    status = made.status()
    assert (status["state"], status["reason"]) == ("done", "")
    assert int(str(status["faults"])) > 0
    assert not (made.work / "lazy-pages.socket").exists()


def test_compressed_and_at_full_speed(box: Callable[..., Box]) -> None:
    """Chunks that must be decoded are as right as raw ones, with the filling racing the process."""
    made = box("storm", seed=9, compress=True)
    _started(made, "--verify")
    assert made.answer() == "right"
    eventually(made.ended, timeout_s=60)
    assert made.status()["state"] == "done"


@pytest.mark.parametrize("who", ["worker", "keeper", "both in turn"])
def test_a_server_that_is_killed_goes_on(box: Callable[..., Box], who: str) -> None:
    """kill -9 to either of its processes, several times: what was dropped stays zero, all else arrives."""
    made = box("storm", seed=5)
    _started(made, "--threads", "1", "--rest", "0.03")
    for number in range(8):
        eventually(lambda: len(made.servers()) == 2 or made.ended())
        servers = made.servers()
        if len(servers) < 2:
            break
        victim = {"worker": 1, "keeper": 0}.get(who, number % 2)
        os.kill(servers[victim], signal.SIGKILL)
        time.sleep(0.15)
    assert number >= 3
    assert made.answer() == "right"
    eventually(made.ended, timeout_s=60)
    assert made.status()["state"] == "done"


def test_a_journal_that_is_full_begins_anew(box: Callable[..., Box]) -> None:
    """However many events a process makes, none is forgotten: here another keeper takes over every dozen."""
    made = box("storm", seed=6)
    small = "from smr.images import lazy, lazy_journal; lazy_journal.Journal.__init__.__defaults__ = (12,); lazy.main()"
    served = made.serve("--threads", "1", "--rest", "0.03", program=("-c", small))
    assert served.returncode == 0, served.stderr
    keeper = made.servers()[0]
    assert made.restore() == 0
    (made.folder / "go").touch()
    assert made.answer() == "right"
    eventually(made.ended, timeout_s=60)
    status = made.status()
    assert (status["state"], status["deaths"]) == ("done", 0)
    assert status["pid"] != keeper


def test_a_process_that_dies_ends_its_server(box: Callable[..., Box]) -> None:
    """Nothing of the server is left when there is nobody to serve."""
    made = box("die")
    _started(made, "--threads", "1", "--rest", "0.05")
    eventually((made.folder / "acted").exists)
    os.kill(made.pid, signal.SIGKILL)
    eventually(made.ended)
    assert made.status()["state"] == "done"
    assert int(str(made.status()["copied_pages"])) < 48 << 8


@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_a_process_whose_pages_cannot_be_read_is_killed(box: Callable[..., Box], damage: str) -> None:
    """Never zeros or wrong bytes in their place: the process ends, and the status says which segment it was."""
    made = box("die")
    served = made.serve("--threads", "1", "--rest", "0.05", "--verify")
    assert served.returncode == 0, served.stderr
    for line in (made.folder / "list").read_text().splitlines():
        with Path(line).open("r+b") as segment:
            if damage == "cut":
                segment.truncate(4096)
            else:
                size = segment.seek(0, os.SEEK_END)
                for at in range(0, size, 4096):
                    segment.seek(at + 100)
                    segment.write(b"wrong")
    made.restore()
    eventually(made.ended)
    status = made.status()
    assert status["state"] == "failed"
    assert "segment" in str(status["reason"])
    assert not Path(f"/proc/{made.pid}").exists() or "Z" in Path(f"/proc/{made.pid}/stat").read_text()
    assert not (made.folder / "answer").exists()


def test_a_server_to_which_nobody_comes_ends(box: Callable[..., Box]) -> None:
    """A restore that fails before it asks for pages leaves no server behind."""
    made = box("die", mib=32)
    assert made.serve("--connect-timeout", "0.2").returncode == 0
    eventually(made.ended)
    assert made.status()["state"] == "failed"
    assert "did not connect" in str(made.status()["reason"])


def test_a_restore_that_fails_ends_its_server(box: Callable[..., Box]) -> None:
    """CRIU that gives up in the middle takes the server with it."""
    made = box("die", mib=32)
    assert made.serve().returncode == 0
    core = next((made.folder / "img").glob("core-*.img"))
    core.write_bytes(core.read_bytes()[:40])
    assert made.restore() != 0
    eventually(made.ended)
    assert made.status()["state"] == "failed"


def test_what_cannot_be_served_is_said_at_once(box: Callable[..., Box]) -> None:
    """A segment of the wrong size is an error of the program, before CRIU is started."""
    made = box("die", mib=32)
    first = Path((made.folder / "list").read_text().splitlines()[0])
    first.write_bytes(b"short")
    served = made.serve()
    assert served.returncode == 1
    assert f"segment {first} has 5 bytes" in served.stderr
    assert made.ended()
