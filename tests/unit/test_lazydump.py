"""When a lazy dump is tried, and what is said when it is not."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from smr.shim import cgroups, lazydump, procs
from smr.shim.lazydump import is_frozen, server_socket
from smr.shim.procs import Process

GIB = 1 << 30
TREE = [Process(pid=100, ns_pid=1, state="S"), Process(pid=101, ns_pid=7, state="S")]


class Machine:
    """/proc and /sys/fs/cgroup as files."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.proc, self.cgroup = root, root / "proc", root / "cgroup"
        monkeypatch.setattr(lazydump, "PROC", self.proc)
        monkeypatch.setattr(cgroups, "ROOT", self.cgroup)
        self.file("proc/sys/fs/pipe-max-size", "1048576\n")
        self.file("proc/sys/fs/nr_open", "1048576\n")

    def file(self, name: str, text: str) -> None:
        """Write one."""
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """One with nothing running."""
    return Machine(tmp_path, monkeypatch)


class Target:
    """As much of a container as is looked at."""

    pid = 100


def obstacle(need_bytes: int, tree: list[Process] = TREE) -> str:
    """Why there is no lazy dump of so much memory."""
    return lazydump._obstacle(Target, tree, need_bytes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lines", "file", "text", "expected"),
    [
        ("4:freezer:/a/b\n1:cpu:/other\n0::/x\n", "freezer/a/b/freezer.state", "FROZEN\n", True),
        ("4:freezer:/a/b\n0::/x\n", "freezer/a/b/freezer.state", "FREEZING\n", False),
        ("4:freezer:/a/b\n0::/x\n", "freezer/a/b/freezer.state", "THAWED\n", False),
        ("0::/a/b\n", "a/b/cgroup.events", "populated 1\nfrozen 1\n", True),
        ("0::/a/b\n", "a/b/cgroup.events", "populated 1\nfrozen 0\n", False),
        ("4:cpu:/x\n0::/a/b\n", "unified/a/b/cgroup.events", "populated 1\nfrozen 1\n", True),
        ("0::/../b\n", "a/b/cgroup.events", "populated 1\nfrozen 1\n", False),
    ],
)
def test_frozen_is_what_the_cgroup_says(machine: Machine, lines: str, file: str, text: str, expected: bool) -> None:
    """Of v1, v2, and v2 beside v1; a cgroup that cannot be found says nothing."""
    machine.file("proc/100/cgroup", lines)
    machine.file(f"cgroup/{file}", text)
    assert is_frozen(100) is expected


def test_a_process_that_is_gone_is_not_frozen(machine: Machine) -> None:
    """And that is no error."""
    assert not is_frozen(100)


@pytest.mark.parametrize(
    ("capable", "hard", "size", "expected"),
    [
        (False, 20000, 9 * GIB, ""),
        (False, 20000, 12 * GIB, "opens 25610 files, 20000 are allowed"),
        (True, 20000, 500 * GIB, ""),
        (True, 20000, 3000 * GIB, "opens 1537034 files, 1048576 are allowed"),
    ],
)
def test_too_many_pipes_are_said_before(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capable: bool, hard: int, size: int, expected: str
) -> None:
    """Two files for each MiB, or for each 4 MiB where CRIU may make pipes of that size and raise its own limit."""
    machine.file("proc/100/cgroup", "0::/a\n")
    machine.file("cgroup/a/cgroup.events", "frozen 1\n")
    for name in ("0", "1"):
        machine.file(f"proc/101/fd/{name}", "")
    asked = []
    monkeypatch.setattr(procs, "has_capability", lambda number: capable)
    monkeypatch.setattr(lazydump.resource, "getrlimit", lambda _: (1024, hard))
    monkeypatch.setattr(lazydump.resource, "setrlimit", lambda _, limits: asked.append(limits))
    found = obstacle(size)
    assert (expected in found) if expected else found == ""
    assert asked == [(hard, hard)]


def test_a_container_that_is_not_seen_to_be_frozen_is_left_to_criu(machine: Machine) -> None:
    """Its memory could change while it is read."""
    assert "frozen" in obstacle(GIB)


@pytest.mark.parametrize(
    ("text", "memory_kib", "expected"),
    [
        ("202 0x1 0x2 0x3 0x4 0x5 0x6 0x7ffe12568000 0x7fcef5b26cae\n", 1 << 20, "stack pointer of thread 107 "),
        ("-1 0x7ffe12568000 0x7fcef5b26cae\n", 1 << 20, "stack pointer of thread 107 "),
        ("202 0x1 0x2 0x3 0x4 0x5 0x6 0x7ffe12568010 0x7fcef5b26000\n", 1 << 20, ""),
        ("running\n", 1 << 20, ""),
        ("-1 0x7ffe12568000 0x7fcef5b26cae\n", 1 << 10, ""),
    ],
)
def test_a_stack_pointer_at_the_start_of_a_page_is_left_to_criu(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, text: str, memory_kib: int, expected: str
) -> None:
    """In a call or not; of a process with so much memory that it matters."""
    monkeypatch.setattr(procs, "PROC", machine.proc)
    monkeypatch.setattr(procs, "has_capability", lambda _: True)
    machine.file("proc/100/cgroup", "0::/a\n")
    machine.file("cgroup/a/cgroup.events", "frozen 1\n")
    machine.file("proc/100/status", f"RssAnon:\t {memory_kib} kB\n")
    machine.file("proc/100/task/100/syscall", "7 0x1 0x1 0x1 0x0 0x0 0x0 0x7ffe12561230 0x7fcef5b26cae\n")
    machine.file("proc/100/task/107/syscall", text)
    found = obstacle(GIB)
    assert (expected in found) if expected else found == ""


def test_pids_that_are_not_one_process_each_are_left_to_criu(machine: Machine) -> None:
    """A pid namespace within the container's."""
    assert "namespaces" in obstacle(GIB, [*TREE, Process(pid=102, ns_pid=1, state="S")])


def test_memory_is_counted_in_memory_and_swapped_out(machine: Machine) -> None:
    """Of all processes; files and shared memory are not CRIU's to leave out."""
    machine.file("proc/100/status", "Name:\tx\nRssAnon:\t  1024 kB\nRssFile:\t 9 kB\nRssShmem:\t 9 kB\nVmSwap:\t 512 kB\n")
    machine.file("proc/101/status", "RssAnon:\t 1 kB\n")
    assert lazydump._anonymous_bytes(TREE) == (1024 + 512 + 1) << 10


VMSTAT = "nr_dirty {}\nnr_writeback {}\nnr_dirty_threshold 4000000\nnr_dirty_background_threshold 2000000\n"


@pytest.mark.parametrize(
    ("dirty", "writeback", "available", "size", "expected"),
    [
        (0, 0, 100 * GIB, 11 * GIB, False),
        (0, 0, 100 * GIB, 12 * GIB, True),
        (1_000_000, 1_000_000, 100 * GIB, 5 * GIB, True),
        (5_000_000, 0, 100 * GIB, GIB, True),
        (0, 0, 13 * GIB + GIB // 2, 12 * GIB, True),
        (0, 0, 13 * GIB, 12 * GIB, False),
        (0, 0, 100 * GIB, 95 * GIB, False),
    ],
)
def test_segments_wait_in_memory_where_the_disk_would_be_waited_for(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, dirty: int, writeback: int, available: int, size: int, expected: bool
) -> None:
    """More than may be dirty (here 11.4 GiB, less what is dirty already), and memory for it with something left."""
    machine.file("proc/vmstat", VMSTAT.format(dirty, writeback))
    monkeypatch.setattr(lazydump, "available_bytes", lambda: available)
    assert lazydump._wait_in_memory(size) is expected


def test_who_serves_finds_the_end_at_once() -> None:
    """A number that programs in between do not use for themselves, and nothing to wait for."""
    with server_socket() as fd, socket.socket(fileno=fd) as server:
        assert fd >= 200
        server.settimeout(5)
        assert server.recv(64) == b""
        server.detach()
