"""Cgroups of a container, by the path in its spec."""

from __future__ import annotations

from pathlib import Path

import pytest

from smr.shim import cgroups


@pytest.mark.parametrize(
    ("path", "end"),
    [
        ("", "c1"),
        ("/", "c1"),
        ("/default/c1", "default/c1"),
        ("/libpod_parent/libpod-c1/", "libpod_parent/libpod-c1"),
        ("kubepods-besteffort.slice:cri-containerd:c1", "cri-containerd-c1.scope"),
        ("user.slice:libpod:c1", "libpod-c1.scope"),
        (":runc:c1", "runc-c1.scope"),
        ("system.slice::c1", "c1.scope"),
        ("/a:b/c1", "a:b/c1"),
    ],
)
def test_end_of_the_path(path: str, end: str) -> None:
    """As runc names it: cgroupfs path, systemd's slice:prefix:name, or the id where the spec says nothing."""
    assert cgroups.path_of(path, "c1") == end


@pytest.fixture
def v2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of folders that looks like the unified hierarchy."""
    (tmp_path / "cgroup.controllers").touch()
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    return tmp_path


def test_version_by_the_root(v2: Path) -> None:
    """v2 has its controllers at the root."""
    assert cgroups.version() == "v2"
    (v2 / "cgroup.controllers").unlink()
    assert cgroups.version() == "v1"


def test_found_at_every_depth_and_only_whole_names(v2: Path) -> None:
    """A runtime may put the path below a slice or its own cgroup; a longer name is another container."""
    for name in ("default/c1", "a/b/default/c1", "default/c12", "xdefault/c1"):
        (v2 / name).mkdir(parents=True)
    assert sorted(cgroups.folders("default/c1")) == [v2 / "a/b/default/c1", v2 / "default/c1"]


def test_remove_takes_children_first_and_leaves_what_is_in_use(v2: Path) -> None:
    """Empty cgroups go, from the innermost; one that cannot go is named."""
    (v2 / "default/c1/init/deep").mkdir(parents=True)
    (v2 / "x/default/c1").mkdir(parents=True)
    (v2 / "x/default/c1/busy").touch()
    assert cgroups.remove("default/c1") == [v2 / "x/default/c1"]
    assert not (v2 / "default/c1").exists()
    assert (v2 / "default").exists()


def test_v1_hierarchies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each controller has the path; links such as cpu -> cpu,cpuacct count once."""
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    for name in ("memory", "cpu,cpuacct"):
        (tmp_path / name / "c1").mkdir(parents=True)
    (tmp_path / "cpu").symlink_to("cpu,cpuacct")
    assert sorted(cgroups.folders("c1")) == [tmp_path / "cpu,cpuacct/c1", tmp_path / "memory/c1"]


def test_nobody_is_in_a_cgroup_that_is_not_there() -> None:
    """Members are looked up in /proc."""
    assert cgroups.members("no-such/cgroup-of-anybody") == []
