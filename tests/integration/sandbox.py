"""The test run's own corner of the machine, and what is left in it.

The run gets a mount namespace with a fresh /run and /dev/shm, so that engines of the machine (and of another test run) are
not seen, every mount in it is ours, and all of them vanish with the test process. As on a systemd machine all mounts are
shared ones. On disk everything lies under BASE, temporary files in BASE/tmp. Cgroups are named by a token; processes are
known by BASE or the token in their command line, environment or cgroup.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.integration.command import run

_CLONE_NEWNS = 0x20000
# Made once by an engine and kept for all containers of its life.
_KEPT_MOUNTS = ("/run/netns",)
# CRIU asks no TMPDIR.
_CRIU_FOLDERS = "/tmp/.criu"


@dataclass(frozen=True)
class Sandbox:
    """`base` is on disk; `token` is in the name of every cgroup and namespace that the tests make."""

    base: Path
    token: str

    def snapshot(self) -> Snapshot:
        """What there is now of everything that may be left over."""
        return Snapshot(
            mounts=tuple(sorted(_mounts())),
            cgroups=frozenset(self.cgroups()),
            processes=frozenset(self.processes()),
            namespaces=frozenset(entry.name for entry in Path("/run/netns").glob("*")),
            files=frozenset(self._files()),
            shared=self._shared(),
        )

    def cgroups(self) -> Iterator[str]:
        """Cgroup directories of test containers. Their parent, and podman's for its monitors, are made once and stay."""
        for top in self.tops():
            for directory, folders, _ in os.walk(top):
                yield from (f"{directory}/{name}" for name in folders if name != "conmon")

    def tops(self) -> list[Path]:
        """Their parents: at the top of a hierarchy. What has our name further below is a copy of another session's."""
        cgroup = Path("/sys/fs/cgroup")
        found = [*cgroup.glob(self.token), *cgroup.glob(f"*/{self.token}")]
        unified = (cgroup / "cgroup.controllers").exists()
        return [path for path in found if path.is_dir() and (path.parent == cgroup or not unified)]

    def _shared(self) -> bool:
        """Whether other sessions of tests, or others' CRIU, are at work on this machine."""
        ours = {pid for pid, _ in self.processes()}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) not in ours:
                with contextlib.suppress(OSError):
                    if (entry / "comm").read_text() == "criu\n":
                        return True
        sessions = (path.name.partition("-")[0] for path in self.base.parent.glob("smrt*-*"))
        return any(Path(f"/proc/{token.removeprefix('smrt')}").exists() for token in sessions if token != self.token)

    def processes(self) -> Iterator[tuple[int, str]]:
        """Processes of the tests: engines, monitors, shims, runtimes, containers."""
        marks = (str(self.base).encode(), self.token.encode())
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                command = (entry / "cmdline").read_bytes()
                facts = command + (entry / "environ").read_bytes() + (entry / "cgroup").read_bytes()
            except OSError:
                continue
            if any(mark in facts for mark in marks):
                yield int(entry.name), command.replace(b"\0", b" ").decode(errors="replace").strip()

    def _files(self) -> Iterator[str]:
        for folder in (self.base / "tmp", *self.base.glob("node-*/run/containers"), *self.base.glob("node-*/store/ingest")):
            yield from (str(path) for path in folder.glob("*") if path.name != ".lock")
        yield from (str(path) for path in self.base.glob("node-*/store/**/*.tmp*"))
        yield from (str(path) for path in self.base.glob("node-*/store/leases/*"))
        yield from (str(path) for path in Path("/tmp").glob(f"{Path(_CRIU_FOLDERS).name}*"))
        yield from (str(path) for path in Path("/run/runc").glob("*"))
        yield from (str(path) for path in Path("/run/containerd").glob("runc/*/*"))
        yield from (str(path) for path in Path("/run/containerd").glob("s/*"))


@dataclass(frozen=True)
class Snapshot:
    """One look at everything that may be left over."""

    mounts: tuple[str, ...]
    cgroups: frozenset[str]
    processes: frozenset[tuple[int, str]]
    namespaces: frozenset[str]
    files: frozenset[str]
    shared: bool = False

    def left_since(self, before: Snapshot) -> list[str]:
        """What is here and was not there, one line each. CRIU's folders in /tmp tell nobody whose they are: only alone."""
        mounts = list(self.mounts)
        for mount in before.mounts:
            with contextlib.suppress(ValueError):
                mounts.remove(mount)
        return [
            *(f"mount {mount}" for mount in mounts),
            *(f"cgroup {cgroup}" for cgroup in sorted(self.cgroups - before.cgroups)),
            *(f"process {pid} {command[:200]}" for pid, command in sorted(self.processes - before.processes)),
            *(f"network namespace {name}" for name in sorted(self.namespaces - before.namespaces)),
            *(
                f"file {path}"
                for path in sorted(self.files - before.files)
                if not (path.startswith(_CRIU_FOLDERS) and (self.shared or before.shared))
            ),
        ]


def _mounts() -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words = line.split()
        if words[4] not in _KEPT_MOUNTS:
            yield f"{words[4]} {words[words.index('-') + 1]}"


@contextlib.contextmanager
def sandbox() -> Iterator[Sandbox]:
    """Move this process into a sandbox for good; on exit the processes, cgroups and files of the tests are gone.

    OSError where the machine allows no mount namespace.
    """
    token = f"smrt{os.getpid()}"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNS)")
    run(["mount", "--make-rprivate", "/"])
    run(["mount", "--make-rshared", "/"])
    run(["mount", "-t", "tmpfs", "-o", "mode=755", f"tmpfs-{token}", "/run"])
    run(["mount", "-t", "tmpfs", "-o", "mode=1777", f"tmpfs-{token}", "/dev/shm"])  # podman keeps its locks there
    Path("/run/lock").mkdir()
    base = Path(tempfile.mkdtemp(prefix=f"{token}-", dir="/var/tmp"))
    base.chmod(0o755)  # for containers in a user namespace
    (base / "tmp").mkdir()
    box = Sandbox(base=base, token=token)
    try:
        yield box
    finally:
        _clean(box)


def _clean(box: Sandbox) -> None:
    for _ in range(50):
        pids = [pid for pid, _ in box.processes()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not pids:
            break
        time.sleep(0.1)
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in reversed(points):
        if point.startswith((f"{box.base}/", "/run/")):
            run(["umount", "-l", point], check=False)
    for top in box.tops():
        for directory, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
    shutil.rmtree(box.base, ignore_errors=True)
