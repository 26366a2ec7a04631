"""Leaving a cgroup: what is written where, on v1, v2 and both, and where the root refuses."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from smr.images import charge


def node(tmp_path: Path, lines: str, *hierarchies: str) -> tuple[Path, Path]:
    """A /proc whose process is in these cgroups, and the roots of hierarchies."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(lines)
    for name in hierarchies:
        (tmp_path / "cgroup" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name / "cgroup.procs").write_text("")
    return tmp_path / "proc", tmp_path / "cgroup"


def joined(cgroups: Path) -> set[str]:
    """Where a process was moved to."""
    return {str(file.parent.relative_to(cgroups)) for file in cgroups.rglob("cgroup.procs") if file.read_text() == "0"}


@pytest.mark.parametrize(
    ("lines", "hierarchies", "expected"),
    [
        ("0::/pod/conmon\n", (".",), {"."}),
        ("0::/\n", (".",), set()),
        ("0::/smr\n", (".",), set()),
        (
            "4:memory:/pod\n3:cpuset:/pod\n1:name=systemd:/pod\n0::/pod\n",
            ("memory", "cpuset", "systemd", "unified"),
            {"memory", "systemd", "unified"},
        ),
        ("7:blkio:/\n4:memory:/pod\n0::/\n", ("memory", "blkio", "unified"), {"memory"}),
        ("4:memory:/pod\n", (), set()),
    ],
)
def test_root_of_each_hierarchy(tmp_path: Path, lines: str, hierarchies: tuple[str, ...], expected: set[str]) -> None:
    """Only where it is not there already, and only in hierarchies that charge or end it; one that is missing is no error."""
    proc, cgroups = node(tmp_path, lines, *hierarchies)
    charge.leave_cgroup(proc, cgroups)
    assert joined(cgroups) == expected


def test_own_cgroup_where_the_root_takes_no_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root of a cgroup namespace, once it has controllers for its children, answers EBUSY."""
    proc, cgroups = node(tmp_path, "0::/pod\n", ".", "smr")
    join = charge._join

    def refuse(cgroup: Path) -> None:
        if cgroup == cgroups:
            raise OSError(errno.EBUSY, "busy")
        join(cgroup)

    monkeypatch.setattr(charge, "_join", refuse)
    charge.leave_cgroup(proc, cgroups)
    assert joined(cgroups) == {"smr"}


def test_process_stays_where_it_may_not_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the right to, nothing is made and nothing raised."""
    proc, cgroups = node(tmp_path, "0::/pod\n", ".")

    def refuse(_: Path) -> None:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(charge, "_join", refuse)
    charge.leave_cgroup(proc, cgroups)
    assert [path.name for path in cgroups.iterdir()] == ["cgroup.procs"]
