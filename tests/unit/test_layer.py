"""Layers on plain directories: whiteouts, undo, limits. Real overlays are in tests/integration."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from smr.images.layer import apply_layer, diff_overlay, pack_tree, undo_from, unpack_tree
from smr.images.tar import Kind
from smr.images.tar_reader import FileStream, Limits, TarReader
from smr.images.undo import Journal
from smr.proto.errors import Code, SmrError
from tests.tar_support import Item, directory, file, other, write_tar


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A container's root."""
    root = tmp_path / "root"
    (root / "etc/conf.d").mkdir(parents=True)
    (root / "etc/passwd").write_text("root")
    (root / "etc/conf.d/a").write_text("a")
    (root / "etc/conf.d/b").write_text("b")
    (root / "link").symlink_to("etc")
    os.utime(root / "etc/conf.d", ns=(7, 10**18 + 7))
    os.utime(root / "etc", ns=(7, 10**18 + 8))
    os.utime(root, ns=(7, 10**18 + 9))
    return root


def view(root: Path) -> dict[str, object]:
    """Types, modes, times and content of a tree."""
    seen: dict[str, object] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        status = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        seen[str(path.relative_to(root))] = (status.st_mode, status.st_mtime_ns, content)
    return seen


def applied(root: Path, *items: Item, **options: Limits) -> Path:
    """Apply a layer of these entries; the undo directory."""
    layer = write_tar(root.parent / "layer.tar", items)
    apply_layer(layer, root, root.parent / "undo", **options)
    return root.parent / "undo"


def names(layer: Path) -> list[str]:
    """Names in a tar."""
    with layer.open("rb") as tar:
        return [entry.name for entry in TarReader(FileStream(tar.fileno()))]


LAYERS: dict[str, list[Item]] = {
    "new file": [file("etc/new", b"1")],
    "new tree": [directory("srv/"), file("srv/a/b/c", b"1")],
    "changed file": [file("etc/passwd", b"root app", mode=0o600)],
    "directory over file": [directory("etc/passwd/"), file("etc/passwd/x", b"1")],
    "file over directory": [file("etc/conf.d", b"1")],
    "directory over link": [directory("link/"), file("link/x", b"1")],
    "metadata only": [directory("etc/", mode=0o700, mtime_ns=5), directory("./", mode=0o711, mtime_ns=6)],
    "whiteout": [file("etc/.wh.passwd"), file("etc/.wh.missing"), file("no/such/.wh.x")],
    "whiteout of a tree": [file(".wh.etc")],
    "whiteout and new": [file("etc/.wh.conf.d"), file("etc/conf.d/n", b"1")],
    "new and whiteout": [file("etc/conf.d/n", b"1"), file("etc/.wh.conf.d")],
    "opaque": [directory("etc/conf.d/"), file("etc/conf.d/.wh..wh..opq"), file("etc/conf.d/n", b"1")],
    "opaque last": [directory("etc/conf.d/"), file("etc/conf.d/n", b"1"), file("etc/conf.d/.wh..wh..opq")],
    "links": [other("etc/s", Kind.SYMLINK, link="passwd"), other("etc/h", Kind.HARDLINK, link="etc/passwd")],
    "replaced twice": [file("etc/passwd", b"1"), file("etc/passwd", b"2"), directory("etc/passwd/")],
    "child, then parent": [file("etc/conf.d/a", b"1"), file("etc/conf.d", b"2"), file(".wh.link")],
    "aufs": [file(".wh..wh.plnk"), file("etc/.wh..wh.aufs")],
}


@pytest.mark.parametrize("name", LAYERS)
def test_undo_restores_everything(root: Path, name: str) -> None:
    """Whatever a layer does, its undo gives the tree of before, times of directories included."""
    before = view(root)
    undo = applied(root, *LAYERS[name])
    undo_from(undo, root)
    assert view(root) == before
    assert not undo.exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("whiteout", ["conf.d"]),
        ("whiteout and new", ["conf.d", "passwd"]),
        ("new and whiteout", ["conf.d", "passwd"]),
        ("aufs", ["conf.d", "passwd"]),
    ],
)
def test_whiteouts_remove_what_was_there_before_the_layer(root: Path, name: str, expected: list[str]) -> None:
    """A whiteout removes what lies below the layer, and never what the layer itself brings, in either order."""
    applied(root, *LAYERS[name])
    assert sorted(path.name for path in (root / "etc").iterdir()) == expected
    if "new" in name:
        assert [path.name for path in (root / "etc/conf.d").iterdir()] == ["n"]


@pytest.mark.parametrize("name", ["opaque", "opaque last"])
def test_an_opaque_directory_keeps_only_the_layers_content(root: Path, name: str) -> None:
    """The opaque mark empties the directory of what was below, wherever it stands."""
    applied(root, *LAYERS[name])
    assert [path.name for path in (root / "etc/conf.d").iterdir()] == ["n"]


@pytest.mark.parametrize(
    "item",
    [
        file("../outside", b"evil"),
        file("/etc/x", b"evil"),
        file("link/passwd", b"evil"),
        file("link/.wh.passwd"),
        file(".wh..", b""),
        file("etc/.wh."),
        other("null", Kind.CHAR, device=(1, 3)),
        other("h", Kind.HARDLINK, link="../outside"),
        other("h", Kind.HARDLINK, link="link/passwd"),
        file("."),
    ],
)
def test_an_unsafe_entry_undoes_the_layer(root: Path, item: Item) -> None:
    """What was applied before the unsafe entry is taken back, and the error says ARCHIVE_UNSAFE."""
    before = view(root)
    with pytest.raises(SmrError) as caught:
        applied(root, file("etc/passwd", b"changed"), file("etc/.wh.conf.d"), item)
    assert caught.value.code is Code.ARCHIVE_UNSAFE
    assert view(root) == before
    assert sorted(path.name for path in root.parent.iterdir()) == ["layer.tar", "root"]


def test_a_truncated_layer_is_undone(root: Path) -> None:
    """A layer that breaks off in the middle leaves the root as it was."""
    before = view(root)
    layer = write_tar(root.parent / "layer.tar", [file("etc/passwd", b"x" * 5000), file("etc/n", b"y" * 5000)])
    os.truncate(layer, 8000)
    with pytest.raises(SmrError) as caught:
        apply_layer(layer, root, root.parent / "undo")
    assert caught.value.code is Code.ARCHIVE_INVALID
    assert view(root) == before


def test_limits_stop_a_bomb(root: Path) -> None:
    """A layer beyond the limits is refused and undone."""
    before = view(root)
    with pytest.raises(SmrError) as caught:
        applied(root, file("a", b"x" * 100), file("b", b"x" * 100), limits=Limits(bytes=150))
    assert caught.value.code is Code.ARCHIVE_UNSAFE
    assert view(root) == before


def test_a_torn_journal_line_is_a_change_that_was_not_made(root: Path) -> None:
    """A process killed while it wrote a line had not yet made that change."""
    undo = applied(root, file("etc/passwd", b"changed"))
    with (undo / "journal").open("ab") as journal:
        journal.write(b'{"path": "etc/conf.d", "state": "abs')
    undo_from(undo, root)
    assert (root / "etc/passwd").read_text() == "root"
    assert (root / "etc/conf.d/a").exists()


def test_undo_can_be_repeated_and_is_idle_without_a_journal(root: Path, tmp_path: Path) -> None:
    """Undoing twice, or where nothing was applied, changes nothing."""
    before = view(root)
    undo = applied(root, *LAYERS["child, then parent"])
    kept = {path.name: path.read_bytes() for path in undo.iterdir()}
    undo_from(undo, root)
    undo.mkdir()
    for name, content in kept.items():
        (undo / name).write_bytes(content)
    undo_from(undo, root)
    undo_from(tmp_path / "never", root)
    assert view(root) == before


def test_an_old_journal_is_not_overwritten(root: Path) -> None:
    """A second layer must not destroy what an earlier one would need to be undone."""
    undo = applied(root, file("etc/passwd", b"changed"))
    with pytest.raises(SmrError) as caught:
        apply_layer(root.parent / "layer.tar", root, undo)
    assert caught.value.code is Code.ROOTFS_FAILED
    assert "undo it first" in caught.value.hint
    undo_from(undo, root)
    assert (root / "etc/passwd").read_text() == "root"


def test_commit_forgets_how(root: Path) -> None:
    """After a commit there is nothing to undo."""
    layer = write_tar(root.parent / "layer.tar", [file("etc/passwd", b"changed")])
    result = apply_layer(layer, root, root.parent / "undo")
    result.commit()
    result.undo()
    assert (root / "etc/passwd").read_text() == "changed"
    Journal.discard(root.parent / "undo")


def test_a_diff_counts_what_it_leaves_out(tmp_path: Path) -> None:
    """Excluded mount points, devices and names that OCI reserves are not in the layer, and are counted; sockets are in it."""
    upper = tmp_path / "upper"
    (upper / "run").mkdir(parents=True)
    (upper / "proc/1").mkdir(parents=True)
    (upper / "run/.containerenv").touch()
    (upper / "run/.wh.evil").touch()
    (upper / "kept").write_text("kept")
    os.link(upper / "kept", upper / "kept-too")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(upper, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{here}/socket")
        os.close(here)
    stats = diff_overlay(upper, (), tmp_path / "layer.tar", exclude=["/proc", "/run/.containerenv"])
    assert names(tmp_path / "layer.tar") == ["./", "kept", "kept-too", "run/", "socket"]
    assert (stats.sockets, stats.excluded, stats.names_skipped) == (1, 2, 1)
    assert (stats.files, stats.links, stats.content_bytes) == (1, 1, 4)
    assert stats.tar_bytes == (tmp_path / "layer.tar").stat().st_size


def test_whiteouts_of_unprivileged_overlays(tmp_path: Path) -> None:
    """With `userxattr` overlay's marks are user attributes: they count, and leave no trace."""
    upper = tmp_path / "upper"
    (upper / "d").mkdir(parents=True)
    (upper / "d/new").touch()
    (upper / "gone").touch()
    try:
        os.setxattr(upper / "gone", "user.overlay.whiteout", b"y")
        os.setxattr(upper / "d", "user.overlay.opaque", b"y")
    except OSError as error:
        pytest.skip(f"no user attributes here: {error}")
    diff_overlay(upper, (), tmp_path / "layer.tar", exclude=())
    assert names(tmp_path / "layer.tar") == ["./", "d/", "d/.wh..wh..opq", "d/new", ".wh.gone"]
    with (tmp_path / "layer.tar").open("rb") as tar:
        assert all(not entry.xattrs for entry in TarReader(FileStream(tar.fileno())))


def test_a_failed_diff_leaves_no_file(tmp_path: Path) -> None:
    """A diff that cannot be made removes what it has written."""
    with pytest.raises(SmrError) as caught:
        diff_overlay(tmp_path / "missing", (), tmp_path / "layer.tar", exclude=())
    assert caught.value.code is Code.ROOTFS_FAILED
    assert not list(tmp_path.iterdir())


def test_trees_of_a_tmpfs_come_back(tmp_path: Path) -> None:
    """`pack_tree` and `unpack_tree` keep names that a layer would take for whiteouts, and replace what is in the way."""
    shm, back = tmp_path / "shm", tmp_path / "back"
    shm.mkdir(mode=0o1777)
    (shm / ".wh.x").write_text("plain")
    (shm / "sem").write_bytes(bytes(32))
    back.mkdir()
    (back / "sem").write_text("old")
    pack_tree(shm, tmp_path / "shm.tar")
    assert unpack_tree(tmp_path / "shm.tar", back) == 3
    assert view(back) == view(shm)


def test_an_unsafe_tree_is_refused(tmp_path: Path) -> None:
    """tmpfs contents are as untrusted as layers."""
    (tmp_path / "target").mkdir()
    with pytest.raises(SmrError) as caught:
        unpack_tree(write_tar(tmp_path / "a.tar", [file("../evil", b"x")]), tmp_path / "target")
    assert caught.value.code is Code.ARCHIVE_UNSAFE
    assert not (tmp_path / "evil").exists()
