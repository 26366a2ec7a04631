"""The guard: what it undoes, when, and that nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.command import eventually

# Runs in a process of its own, so that it can be killed: the guard's undo writes a file, and says which descriptors it has.
_OWNER = """
import os, signal, subprocess, sys, time
from pathlib import Path
from smr.shim.guard import Guard

folder, what = Path(sys.argv[1]), sys.argv[2]
held = open(folder / "held", "w")


def undo():
    files = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    links = [os.readlink(file) for file in files if os.path.lexists(file)]
    (folder / "undo.tmp").write_text("\\n".join(links))
    os.rename(folder / "undo.tmp", folder / "undone")
    if what == "undo fails":
        raise RuntimeError("undo")


with Guard(undo, until_children_end=what == "children") as guard:
    (folder / "guard").write_text(str(guard._pid))
    if what == "children":
        child = subprocess.Popen(["sleep", "600"], pass_fds=guard.pass_fds)
        (folder / "child").write_text(str(child.pid))
    if what == "plain child":
        child = subprocess.Popen(["sleep", "600"], pass_fds=guard.pass_fds)
        (folder / "child").write_text(str(child.pid))
    if what == "exit":
        guard.exit(7)
    if what == "error":
        raise ValueError("handled by nobody")
    if what == "guard dies":
        os.kill(guard._pid, signal.SIGKILL)
    if what in ("end", "guard dies"):
        sys.exit(0)
    (folder / "ready").touch()
    time.sleep(600)
"""


class Owner:
    """A process with a guard, and what can be seen of both."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", _OWNER, str(folder), what], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ready(self) -> None:
        """Wait until it is within the guard."""
        eventually(self.folder.joinpath("ready").exists, what="the owner is ready")

    def end(self) -> int:
        """Wait for its end."""
        self.process.communicate(timeout=30)
        return self.process.returncode

    def pid(self, name: str) -> int:
        """A pid that it noted."""
        return int((self.folder / name).read_text())

    def undone(self) -> bool:
        """Whether the undo has run."""
        return (self.folder / "undone").exists()


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def owner(tmp_path: Path) -> Callable[[str], Owner]:
    """Start an owner; whatever is left of it is killed."""
    started: list[Owner] = []

    def start(what: str) -> Owner:
        started.append(Owner(tmp_path, what))
        return started[-1]

    yield start  # type: ignore[misc]
    for each in started:
        each.process.kill()
        each.process.communicate()
        for name in ("guard", "child"):
            if (each.folder / name).exists() and alive(each.pid(name)):
                os.kill(each.pid(name), signal.SIGKILL)


def test_kill_of_the_owner_is_undone(owner: Callable[[str], Owner]) -> None:
    """kill -9 in the middle: the guard undoes, and ends."""
    one = owner("wait")
    one.ready()
    assert not one.undone()
    one.process.kill()
    one.end()
    eventually(one.undone)
    eventually(lambda: not alive(one.pid("guard")))


def test_guard_holds_nothing_of_its_owner(owner: Callable[[str], Owner]) -> None:
    """Engines wait for the end of file of their pipes, and a flock lives as long as its file: only the guard's pipe is open."""
    one = owner("wait")
    one.ready()
    one.process.kill()
    # communicate returns only when stdout and stderr have no holder any more.
    one.end()
    eventually(one.undone)
    links = (one.folder / "undone").read_text().split("\n")
    assert [link for link in links if link.startswith(str(one.folder))] == []
    assert {link.partition(":")[0] for link in links if not link.startswith("/proc/")} == {"/dev/null", "pipe"}
    assert sum(link.startswith("pipe:") for link in links) == 1


@pytest.mark.parametrize(("what", "status"), [("end", 0), ("exit", 7), ("error", 1), ("guard dies", 0)])
def test_owner_that_ends_by_itself_is_not_undone(owner: Callable[[str], Owner], what: str, status: int) -> None:
    """Its end, its exit within the guard, an exception that it lets pass; and a guard that is gone is no error."""
    one = owner(what)
    assert one.end() == status
    eventually(lambda: not alive(one.pid("guard")))
    assert not one.undone()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_to_the_whole_group_spare_the_guard(owner: Callable[[str], Owner], number: int) -> None:
    """A terminal's Ctrl-C, an engine's SIGTERM: the guard has a session of its own and ignores them."""
    one = owner("wait")
    one.ready()
    guard = one.pid("guard")
    eventually(lambda: os.getsid(guard) == guard)
    os.kill(guard, number)
    one.process.kill()
    one.end()
    eventually(one.undone)


def test_undo_waits_for_children(owner: Callable[[str], Owner]) -> None:
    """Killing CRIU in the middle of a dump would leave its parasite: while a child lives, nothing is undone."""
    one = owner("children")
    one.ready()
    one.process.kill()
    one.process.wait()
    child = one.pid("child")
    # The guard would need a few instructions; it is seen asleep in its read, and the undo has not run.
    eventually(lambda: "pipe_read" in Path(f"/proc/{one.pid('guard')}/wchan").read_text() or _asleep(one.pid("guard")))
    assert alive(child)
    assert not one.undone()
    os.kill(child, signal.SIGKILL)
    one.end()
    eventually(one.undone)


def _asleep(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_undo_does_not_wait_unless_asked(owner: Callable[[str], Owner]) -> None:
    """A child of a create is killed by the undo itself."""
    one = owner("plain child")
    one.ready()
    one.process.kill()
    one.process.wait()
    eventually(one.undone)
    assert alive(one.pid("child"))
    os.kill(one.pid("child"), signal.SIGKILL)


def test_undo_that_fails_leaves_no_guard(owner: Callable[[str], Owner]) -> None:
    """Nobody could hear it; the record stays for the next call."""
    one = owner("undo fails")
    one.ready()
    one.process.kill()
    one.end()
    eventually(one.undone)
    eventually(lambda: not alive(one.pid("guard")))
