"""Where inotify watches lie, as CRIU must be told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from smr.shim import criu, inotify


@pytest.fixture
def process(tmp_path: Path) -> Path:
    """A process 7 in a /proc of our own, with a root of a few folders."""
    folder = tmp_path / "proc/7"
    (folder / "fdinfo").mkdir(parents=True)
    (folder / "task/7").mkdir(parents=True)
    (folder / "task/7/children").write_text("")
    (folder / "status").write_text("Name:\tx\nState:\tS (sleeping)\nNSpid:\t7\t1\n")
    (folder / "root/srv/watched").mkdir(parents=True)
    (folder / "root/etc").mkdir()
    (folder / "root/etc/conf").touch()
    return folder


def mark(path: Path, *, device: int | None = None) -> str:
    """A line of fdinfo as the kernel writes it."""
    facts = path.stat()
    number = device if device is not None else os.major(facts.st_dev) << 20 | os.minor(facts.st_dev)
    return (
        f"inotify wd:1 ino:{facts.st_ino:x} sdev:{number:x} mask:100 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:00\n"
    )


@pytest.fixture(autouse=True)
def proc(process: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """procs.tree looks there too."""
    monkeypatch.setattr("smr.shim.procs.PROC", process.parent)
    return process.parent


def test_watched_files_and_folders_are_found_by_their_path_in_the_container(process: Path, proc: Path) -> None:
    """Each watch gives a path as seen from the container's root."""
    root = process / "root"
    (process / "fdinfo/5").write_text("pos:\t0\nflags:\t00\n" + mark(root / "srv/watched") + mark(root / "etc/conf"))
    assert inotify.dump_options(7, proc) == {"force-irmap": "", "irmap-scan-path": "/etc/conf\n/srv/watched"}


def test_the_root_itself_can_be_watched(process: Path, proc: Path) -> None:
    """A watch on / is found without a search."""
    (process / "fdinfo/5").write_text(mark(process / "root"))
    assert inotify.dump_options(7, proc)["irmap-scan-path"] == "/"


def test_watches_on_other_file_systems_are_left_to_handles(process: Path, proc: Path) -> None:
    """A tmpfs or a volume can be opened by handle, so nothing is searched for them."""
    (process / "fdinfo/5").write_text(mark(process / "root/etc", device=0x12300045))
    assert inotify.dump_options(7, proc) == {}


def test_no_watch_means_no_option(process: Path, proc: Path) -> None:
    """Other descriptors have no such line, and a process that is gone has none at all."""
    (process / "fdinfo/3").write_text("pos:\t0\nflags:\t02\n")
    assert inotify.dump_options(7, proc) == {}
    assert inotify.dump_options(8, proc) == {}


def test_a_watch_on_a_deleted_file_does_not_hide_the_others(process: Path, proc: Path) -> None:
    """What is not found is not named; the rest is."""
    gone = process / "root/etc/gone"
    gone.touch()
    line = mark(gone)
    gone.unlink()
    (process / "fdinfo/5").write_text(line + mark(process / "root/srv"))
    assert "/srv" in inotify.dump_options(7, proc)["irmap-scan-path"].split("\n")


def test_an_option_with_several_values_is_written_once_for_each(tmp_path: Path) -> None:
    """CRIU's configuration file repeats the option."""
    criu.write_options(tmp_path / "criu.conf", {"force-irmap": "", "irmap-scan-path": "/a\n/b"})
    assert (tmp_path / "criu.conf").read_text() == "force-irmap\nirmap-scan-path /a\nirmap-scan-path /b\n"


def test_a_watch_that_is_nowhere_adds_no_option(process: Path, proc: Path) -> None:
    """CRIU then says itself what it cannot dump."""
    gone = process / "root/etc/gone"
    gone.touch()
    line = mark(gone)
    gone.unlink()
    (process / "fdinfo/5").write_text(line)
    assert inotify.dump_options(7, proc) == {}
