"""A tree of processes, dumped and restored by CRIU itself, outside any container.

The tree has a pid namespace of its own, as in a container: its pids are free at every restore, and killing the first process
kills all. Programs are told a folder: they write `ready` there, go on when there is `go`, and then write `answer`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from smr.images.criu_files import read_messages
from smr.proto.criu import images_pb2
from smr.shim.criu import quote_log
from smr.shim.dump import lazy_options
from smr.shim.lazydump import server_socket
from smr.shim.procs import describe, thread_at_page_start, tree
from tests.integration.command import eventually
from tests.integration.memory_image import TreeMemory, read_tree

_PR_SET_CHILD_SUBREAPER = 36
_STOPPED = 3
_RSEQ_BYTES = 32


@dataclass(frozen=True)
class Dump:
    """CRIU's files in `images`, of a program that speaks through `folder`."""

    criu: Path
    folder: Path
    images: Path

    def copy(self, name: str) -> Dump:
        """The same dump in a folder of its own, to be changed."""
        images = self.images.with_name(name)
        shutil.copytree(self.images, images)
        return Dump(self.criu, self.folder, images)

    @property
    def stopped(self) -> frozenset[int]:
        """The tasks that were stopped, by image pid."""
        cores = {pid: next(iter(read_messages(self.images / f"core-{pid}.img", images_pb2.CoreEntry))) for pid in self.pids}
        return frozenset(pid for pid, core in cores.items() if core.tc.task_state == _STOPPED)

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes, by image pid."""
        return tuple(task.pid for task in self._tasks())

    def kernels(self) -> Mapping[int, tuple[tuple[int, int], ...]]:
        """By image pid, where the kernel writes by itself: (address, length) of each thread's rseq area and clear_child_tid."""
        found = {}
        for task in self._tasks():
            areas = []
            for thread in task.threads:
                for core in read_messages(self.images / f"core-{thread}.img", images_pb2.CoreEntry):
                    areas.append((core.thread_core.rseq_entry.rseq_abi_pointer, _RSEQ_BYTES))
                    areas.append((core.thread_info.clear_tid_addr, 4))
            found[task.pid] = tuple(area for area in areas if area[0])
        return found

    def _tasks(self) -> list[images_pb2.PstreeEntry]:
        return list(read_messages(self.images / "pstree.img", images_pb2.PstreeEntry))

    @contextlib.contextmanager
    def restored(self, *options: str) -> Iterator[Restored]:
        """Restore the tree, stopped; it is killed in the end."""
        for name in ("go", "answer"):
            (self.folder / name).unlink(missing_ok=True)
        pid_file = self.images / "restored.pid"
        pid_file.unlink(missing_ok=True)
        argv = [self.criu, "restore", "--shell-job", "--restore-detached", "--leave-stopped", "--images-dir", self.images]
        argv += ["--work-dir", self.images, "--log-file", "restore.log", "-v3", "--pidfile", pid_file, *options]
        argv.append("--manage-cgroups=ignore")  # else it would make that of a frozen tree anew, and leave it
        with _reaper():
            done = subprocess.run(
                argv, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            assert done.returncode == 0, quote_log(self.images / "restore.log")
            restored = Restored(self, int(pid_file.read_text()))
            try:
                # CRIU lets go of a task with the signal under way.
                eventually(lambda: set(restored.states().values()) <= {"T"}, what="the restored tree is stopped")
                yield restored
            finally:
                restored.kill()


@dataclass(frozen=True)
class Restored:
    """A restored tree; `pid` is its first process's, on the host."""

    dump: Dump
    pid: int

    @property
    def pids(self) -> dict[int, int]:
        """image pid -> host pid"""
        return {process.ns_pid: process.pid for process in tree(self.pid)}

    def states(self) -> dict[int, str]:
        """State letters by image pid."""
        return {process.ns_pid: process.state for process in tree(self.pid)}

    def memory(self) -> TreeMemory:
        """All of it, while nothing runs."""
        assert set(self.states().values()) == {"T"}, self.states()
        return read_tree(self.pids, self.dump.kernels())

    def go_on(self) -> str:
        """Continue all tasks but those that were stopped at the dump, and let the program check itself; what it found."""
        stopped = self.dump.stopped
        pids = self.pids
        for pid, host_pid in reversed(pids.items()):
            if pid not in stopped:
                os.kill(host_pid, signal.SIGCONT)
        eventually(lambda: "T" not in {self.states()[pid] for pid in pids if pid not in stopped}, what="continued")
        assert {self.states()[pid] for pid in stopped} <= {"T"}, self.states()
        (self.dump.folder / "go").touch()
        return answer(self.dump.folder, self.pid)

    def kill(self) -> None:
        """End the tree; it is gone afterwards."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def answer(folder: Path, pid: int) -> str:
    """What the program `pid` has written; it ends afterwards."""

    def look() -> str:
        found = (folder / "answer").read_text() if (folder / "answer").exists() else ""
        process = describe(pid)
        assert found or (process is not None and process.state != "Z"), f"the program is gone: {process}"
        return found

    return eventually(look, timeout_s=60, what=f"answer in {folder}")


def dump(criu: Path, argv: Sequence[object], env: Mapping[str, str], folder: Path) -> Dump:
    """Start a program in `folder`, dump it when it is ready, and leave nothing of it."""
    with _program(argv, env, folder) as pid:
        return _dump(Dump(criu, folder, folder / "dump"), pid)


@dataclass(frozen=True)
class Frozen:
    """A program that is ready, and frozen as a container is for its checkpoint."""

    criu: Path
    folder: Path
    pid: int
    cgroup: Path

    @property
    def pids(self) -> dict[int, int]:
        """image pid -> host pid"""
        return {process.ns_pid: process.pid for process in tree(self.pid)}

    def dump(self, name: str, *options: object, check: bool = True, pass_fds: Sequence[int] = ()) -> Dump:
        """Dump it, and leave it as it is."""
        words = ["--leave-running", "--freeze-cgroup", self.cgroup, *options]
        return _dump(Dump(self.criu, self.folder, self.folder / name), self.pid, *words, check=check, pass_fds=pass_fds)

    def lazy_dump(self, name: str) -> Dump:
        """Dump it without the pages that can be left out."""
        with server_socket() as server:
            options = [word for option, value in lazy_options(server).items() for word in (f"--{option}", value) if word]
            return self.dump(name, *options, pass_fds=(server,))


@contextlib.contextmanager
def frozen(criu: Path, argv: Sequence[object], env: Mapping[str, str], folder: Path) -> Iterator[Frozen]:
    """Start a program in `folder` and freeze it when it is ready; it is gone in the end.

    One that CRIU would not dump lazily, because of where a stack happens to be, is started again: see smr.shim.lazydump.
    """
    while True:
        with _program(argv, env, folder) as pid, _freezer(pid) as cgroup:
            if not any(thread_at_page_start(process.pid) for process in tree(pid)):
                yield Frozen(criu, folder, pid, cgroup)
                return
        (folder / "ready").unlink()


@contextlib.contextmanager
def _freezer(pid: int) -> Iterator[Path]:
    """The tree of `pid` in a frozen cgroup of v2, which every kernel has that is new enough for CRIU; killed in the end."""
    roots = [root for root in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")) if (root / "cgroup.controllers").exists()]
    folder = roots[0] / f"smr-test-{os.getpid()}-{pid}"
    folder.mkdir()
    try:
        for process in tree(pid):
            (folder / "cgroup.procs").write_text(str(process.pid))
        (folder / "cgroup.freeze").write_text("1")
        eventually(lambda: "frozen 1" in (folder / "cgroup.events").read_text(), what="frozen")
        yield folder
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: "populated 0" in (folder / "cgroup.events").read_text(), what="the tree is gone")
        folder.rmdir()


@contextlib.contextmanager
def _program(argv: Sequence[object], env: Mapping[str, str], folder: Path) -> Iterator[int]:
    """Pid, outside, of a program that is ready."""
    words = ["unshare", "--pid", "--fork", "setsid", *(str(word) for word in argv)]
    null = subprocess.DEVNULL  # CRIU would hold a file's length against what it was
    holder = subprocess.Popen(words, env=env, stdin=null, stdout=null, stderr=null)
    try:
        eventually(lambda: (folder / "ready").exists() or holder.poll() is not None, timeout_s=60, what=f"ready in {folder}")
        assert (folder / "ready").exists(), f"{argv}: {(folder / 'answer').read_text() if (folder / 'answer').exists() else ''}"
        (pid,) = (process.pid for process in tree(holder.pid) if process.ns_pid == 1)
        yield pid
    finally:
        for process in reversed(tree(holder.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        holder.wait(timeout=10)


def _dump(made: Dump, pid: int, *more: object, check: bool = True, pass_fds: Sequence[int] = ()) -> Dump:
    made.images.mkdir()
    options = ["--shell-job", "--images-dir", made.images, "--work-dir", made.images, "--log-file", "dump.log", "-v3", *more]
    argv = [str(word) for word in (made.criu, "dump", "--tree", pid, *options)]
    done = subprocess.run(argv, check=False, capture_output=True, pass_fds=pass_fds)
    assert not check or done.returncode == 0, quote_log(made.images / "dump.log")
    return made


@contextlib.contextmanager
def _reaper() -> Iterator[None]:
    """A restored tree is nobody's child when CRIU ends: meanwhile it is ours."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
