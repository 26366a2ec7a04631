"""Unpacking hostile archives: everything lands inside, or nothing does."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smr.images.tar import Kind
from smr.images.tar_reader import TarReader
from smr.images.tarsafe import safe_parts, unpack
from smr.proto.errors import Code, SmrError
from tests.tar_support import Item, directory, file, other, tar_bytes

_evil = st.lists(st.sampled_from(["..", ".", "", "a", "b", "link", "/", "c" * 256, "\0", "a\nb", "…"]), max_size=6).map("/".join)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """The directory that archives are unpacked into, beside a file that must not change."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("mine")
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def unpacked(target: Path, items: list[Item], **options: bool) -> int:
    """Unpack a tar of these entries."""
    return unpack(TarReader(io.BytesIO(tar_bytes(target.parent, items))), target, **options)


def refused(target: Path, items: list[Item], **options: bool) -> SmrError:
    """The ARCHIVE_UNSAFE that unpacking raises; what is outside is as it was."""
    with pytest.raises(SmrError) as caught:
        unpacked(target, items, **options)
    assert caught.value.code is Code.ARCHIVE_UNSAFE
    assert sorted(path.name for path in target.parent.iterdir()) == ["outside", "target"]
    assert [(path.name, path.read_text()) for path in (target.parent / "outside").iterdir()] == [("secret", "mine")]
    return caught.value


@given(name=_evil)
def test_a_name_gives_plain_components_or_an_error(name: str) -> None:
    """What `safe_parts` lets through has no component that leads up, is empty, or is no file name."""
    try:
        parts = safe_parts(name)
    except SmrError as error:
        assert error.code is Code.ARCHIVE_UNSAFE
        return
    assert not name.startswith("/")
    assert not {"..", ".", ""} & set(parts)
    assert all("/" not in part and "\0" not in part and len(os.fsencode(part)) < 256 for part in parts)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.tuples(_evil, st.sampled_from(["file", "dir", "link", "hard"])), max_size=6))
def test_no_sequence_of_entries_leaves_the_target(tmp_path_factory: pytest.TempPathFactory, names: list[tuple[str, str]]) -> None:
    """Files, directories, symbolic and hard links in any order and under any name: outside of the target nothing changes."""
    base = tmp_path_factory.mktemp("case")
    target = base / "target"
    target.mkdir()
    (base / "secret").write_text("mine")
    items = []
    for name, kind in names:
        if "\0" in name:
            continue
        items.append(
            {
                "file": lambda n: file(n, b"evil"),
                "dir": directory,
                "link": lambda n: other(n, Kind.SYMLINK, link=".."),
                "hard": lambda n: other(n, Kind.HARDLINK, link="../secret"),
            }[kind](name)
        )
    try:
        unpacked(target, items, overwrite=True)
    except SmrError as error:
        assert error.code in (Code.ARCHIVE_UNSAFE, Code.ARCHIVE_INVALID)
    assert sorted(path.name for path in base.iterdir()) == ["secret", "target"]
    assert (base / "secret").read_text() == "mine"
    assert (base / "secret").stat().st_nlink == 1


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside/secret", "a/../../outside/secret", "..", "a/..", "x" * 256])
def test_names_that_lead_out_are_refused(target: Path, name: str) -> None:
    """Absolute names, climbing ones, and what is no file name."""
    refused(target, [file(name, b"evil")])
    assert not list(target.iterdir())


@pytest.mark.parametrize("link", ["..", "/", "../outside", "/tmp"])
def test_no_path_goes_through_a_symbolic_link(target: Path, link: str) -> None:
    """A link that the archive itself made is not followed, for files, directories and hard links below it."""
    for second in (file("l/secret", b"evil"), directory("l/d/"), other("h", Kind.HARDLINK, link="l/secret")):
        for path in target.iterdir():
            path.unlink()
        refused(target, [other("l", Kind.SYMLINK, link=link), second])


def test_a_link_that_was_there_is_not_followed(target: Path) -> None:
    """Neither is a symbolic link that was in the target before."""
    (target / "l").symlink_to("../outside")
    refused(target, [file("l/secret", b"evil")], overwrite=True)


def test_a_file_over_a_link_replaces_the_link(target: Path) -> None:
    """With `overwrite`, an entry at a link's place replaces the link and not what it points to."""
    (target / "l").symlink_to("../outside/secret")
    unpacked(target, [file("l", b"new")], overwrite=True)
    assert (target / "l").read_bytes() == b"new"
    assert not (target / "l").is_symlink()
    assert (target.parent / "outside/secret").read_text() == "mine"


@pytest.mark.parametrize("link", ["../outside/secret", "/etc/passwd", "missing", "d", "", "."])
def test_hard_links_stay_inside(target: Path, link: str) -> None:
    """A hard link's target has to be a file of the tree."""
    refused(target, [directory("d/"), other("h", Kind.HARDLINK, link=link)])


@pytest.mark.parametrize("kind", [Kind.CHAR, Kind.BLOCK, Kind.SOCKET])
def test_device_nodes_are_refused(target: Path, kind: Kind) -> None:
    """No device node and no socket is made."""
    refused(target, [other("null", kind, device=(1, 3))])
    assert not list(target.iterdir())


def test_an_entry_twice_is_refused(target: Path) -> None:
    """Two files of one name are a contradiction; directories may come again with new metadata."""
    refused(target, [file("a", b"1"), file("a", b"2")])
    assert unpacked(target, [directory("d/", mode=0o755), directory("d/", mode=0o700)]) == 2
    assert (target / "d").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("item", [file("."), file("./"), other("", Kind.SYMLINK, link="x"), other("./", Kind.FIFO)])
def test_the_root_is_not_replaced(target: Path, item: Item) -> None:
    """Only a directory may be named as the root."""
    if item[0].name == "./" and item[0].kind is Kind.FILE:
        assert unpacked(target, [item]) == 1  # an old tar's way to write a directory
    else:
        refused(target, [item])


def test_deep_trees_are_refused(target: Path) -> None:
    """More directories deep than any program makes: refused, before one is made."""
    refused(target, [directory("a/" * 300)])


def test_metadata_arrives(target: Path) -> None:
    """Modes, set-user-ID bits, times and links are as the archive says; times of directories are set last."""
    items = [
        directory("d/", mode=0o710, mtime_ns=1_000_000_005),
        file("d/f", b"x" * 10, mode=0o4751, mtime_ns=2_000_000_006),
        other("d/s", Kind.SYMLINK, link="/anywhere", mtime_ns=3_000_000_007),
        other("d/h", Kind.HARDLINK, link="d/f"),
        other("d/p", Kind.FIFO, mode=0o640),
    ]
    assert unpacked(target, items) == 5
    assert (target / "d").stat().st_mtime_ns == 1_000_000_005
    assert (target / "d/f").stat().st_mode & 0o7777 == 0o4751
    assert (target / "d/f").stat().st_mtime_ns == 2_000_000_006
    assert os.readlink(target / "d/s") == "/anywhere"
    assert (target / "d/s").lstat().st_mtime_ns == 3_000_000_007
    assert (target / "d/h").samefile(target / "d/f")
    assert (target / "d/p").is_fifo()
