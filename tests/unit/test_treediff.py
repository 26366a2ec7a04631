"""Changes of a root that has no upper directory: found against its base, or by change times alone."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smr.images.layer import apply_layer, diff_tree
from smr.images.tar_reader import FileStream, TarReader

NAMES = ("a", "b", "d/a", "d/b", "d/e/a", "d/e/b", "f/a", "n", "d/n", "d/e/n", "f")


def populate(root: Path) -> None:
    """A small root with every kind of object, and a pair of hard links."""
    (root / "d/e").mkdir(parents=True)
    (root / "f").mkdir()
    for name in ("a", "b", "d/a", "d/b", "d/e/a", "f/a"):
        (root / name).write_text(f"content of {name}")
    os.link(root / "a", root / "d/linked")
    (root / "d/e/b").symlink_to("../a")
    os.mkfifo(root / "pipe")


def copy(source: Path, target: Path) -> Path:
    """As vfs does: contents, owners, modes, times and hard links, with new inodes."""
    shutil.copytree(source, target, symlinks=True, copy_function=_copy_file)
    shutil.copystat(source, target)
    for group in links(source):
        for name in group[1:]:
            (target / name).unlink()
            os.link(target / group[0], target / name)
    for path in sorted(source.rglob("*"), reverse=True):
        shutil.copystat(path, target / path.relative_to(source), follow_symlinks=False)
    shutil.copystat(source, target)
    return target


def _copy_file(source: str, target: str) -> str:
    status = os.lstat(source)
    if stat.S_ISFIFO(status.st_mode):
        os.mkfifo(target, stat.S_IMODE(status.st_mode))
    else:
        shutil.copy2(source, target, follow_symlinks=False)
    return target


def links(root: Path) -> list[list[str]]:
    """Names by inode, of inodes with several."""
    found: dict[int, list[str]] = {}
    for path in sorted(root.rglob("*")):
        if not path.is_dir() or path.is_symlink():
            found.setdefault(path.lstat().st_ino, []).append(str(path.relative_to(root)))
    return sorted(names for names in found.values() if len(names) > 1)


def view(root: Path) -> dict[str, object]:
    """Kinds, modes, times, contents and hard links of a tree."""
    seen: dict[str, object] = {"hard links": links(root)}
    for path in [root, *sorted(root.rglob("*"))]:
        status = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        seen[str(path.relative_to(root))] = (status.st_mode, status.st_mtime_ns, content)
    return seen


def write(root: Path, name: str, text: str) -> None:
    """Write in place, making what is above."""
    path = root / name
    clear(root, name, only="directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.is_fifo():
        path.unlink()
    path.write_text(text)


def clear(root: Path, name: str, *, only: str = "") -> None:
    """Remove what is at `name`, and files where directories above it are needed."""
    for above in reversed((root / name).parents):
        if above.is_relative_to(root) and above != root and (above.is_symlink() or (above.exists() and not above.is_dir())):
            above.unlink()
    path = root / name
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif only != "directory":
        path.unlink(missing_ok=True)


def quietly(root: Path, name: str, _: str) -> None:
    """Other bytes of the same number, with the same time."""
    path = root / name
    if path.is_file() and not path.is_symlink():
        status = path.stat()
        path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def link(root: Path, name: str, other: str) -> None:
    """Another name for a file."""
    source, path = root / other, root / name
    if source.is_file() and not source.is_symlink() and source != path:
        clear(root, name)
        if source.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(source, path)


def move(root: Path, name: str, other: str) -> None:
    """Rename, onto whatever is there."""
    source, path = root / other, root / name
    if (source.exists() or source.is_symlink()) and not path.is_relative_to(source) and not source.is_relative_to(path):
        clear(root, name)
        if source.exists() or source.is_symlink():
            path.parent.mkdir(parents=True, exist_ok=True)
            source.rename(path)


def symlink(root: Path, name: str, other: str) -> None:
    """A symbolic link in its place."""
    clear(root, name)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).symlink_to(other)


def make_directory(root: Path, name: str, _: str) -> None:
    """An empty directory in its place."""
    clear(root, name)
    (root / name).mkdir(parents=True)


def chmod(root: Path, name: str, _: str) -> None:
    """Another mode."""
    if (root / name).exists() and not (root / name).is_symlink():
        (root / name).chmod(0o711)


CHANGES: dict[str, Callable[[Path, str, str], None]] = {
    "write": write,
    "remove": lambda root, name, _: clear(root, name),
    "quietly": quietly,
    "link": link,
    "move": move,
    "symlink": symlink,
    "directory": make_directory,
    "chmod": chmod,
}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.sampled_from(NAMES), st.sampled_from(NAMES)), max_size=8))
def test_whatever_changed_arrives(changes: list[tuple[str, str, str]]) -> None:
    """Any changes to a copy of a base, found against the base and applied to another copy, give the same tree."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "base").mkdir()
        populate(folder / "base")
        root, other = copy(folder / "base", folder / "root"), copy(folder / "base", folder / "other")
        for change, name, second in changes:
            CHANGES[change](root, name, second)
        diff_tree(root, folder / "base", folder / "layer.tar", since_ns=0, exclude=())
        apply_layer(folder / "layer.tar", other, folder / "undo").commit()
        assert view(other) == view(root)


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path, int]:
    """A base, a copy of it, and a time after the copying."""
    (tmp_path / "base").mkdir()
    populate(tmp_path / "base")
    root = copy(tmp_path / "base", tmp_path / "root")
    time.sleep(0.03)  # longer than a tick of the clock for change times
    return tmp_path / "base", root, time.time_ns() - 15_000_000


def names(layer: Path) -> list[str]:
    """Names in a layer."""
    with layer.open("rb") as tar:
        return [entry.name for entry in TarReader(FileStream(tar.fileno()))]


def test_nothing_changed_is_an_empty_layer(trees: tuple[Path, Path, int], tmp_path: Path) -> None:
    """A copy that nobody touched differs in nothing, whatever times its directories have."""
    base, root, since = trees
    stats = diff_tree(root, base, tmp_path / "layer.tar", since_ns=since, exclude=())
    assert names(tmp_path / "layer.tar") == ["./"]
    assert stats.empty


def test_a_change_that_hides_is_found_by_its_change_time(trees: tuple[Path, Path, int], tmp_path: Path) -> None:
    """The same length and the same time of modification: the change time cannot be set, so contents are compared."""
    base, root, since = trees
    quietly(root, "d/e/a", "")
    diff_tree(root, base, tmp_path / "layer.tar", since_ns=since, exclude=())
    assert names(tmp_path / "layer.tar") == ["./", "d/", "d/e/", "d/e/a"]


def test_a_file_that_was_only_touched_is_not_in_the_layer(trees: tuple[Path, Path, int], tmp_path: Path) -> None:
    """A later change time alone is no difference: contents and attributes are the base's."""
    base, root, since = trees
    (root / "b").chmod(0o600)
    (root / "b").chmod((base / "b").stat().st_mode)
    diff_tree(root, base, tmp_path / "layer.tar", since_ns=since, exclude=())
    assert names(tmp_path / "layer.tar") == ["./"]


def test_without_a_base_change_times_decide(trees: tuple[Path, Path, int], tmp_path: Path) -> None:
    """New and changed files, with the directories above them; nothing of what was removed."""
    _, root, since = trees
    write(root, "d/e/new", "x")
    quietly(root, "f/a", "")
    (root / "b").unlink()
    link(root, "n", "d/a")
    diff_tree(root, None, tmp_path / "layer.tar", since_ns=since, exclude=())
    assert sorted(names(tmp_path / "layer.tar")) == ["./", "d/", "d/a", "d/e/", "d/e/new", "f/", "f/a", "n"]


def test_mount_points_are_left_out(trees: tuple[Path, Path, int], tmp_path: Path) -> None:
    """What is excluded is neither in the layer nor marked as removed."""
    base, root, since = trees
    shutil.rmtree(root / "d")
    (root / "f/a").write_text("of a mount")
    diff_tree(root, base, tmp_path / "layer.tar", since_ns=since, exclude=["/d", "/f"])
    assert names(tmp_path / "layer.tar") == ["./"]


def test_a_link_to_a_file_of_the_base(trees: tuple[Path, Path, int], tmp_path: Path) -> None:
    """A new name of an old file travels with all its names, so that they are one file again."""
    base, root, since = trees
    link(root, "f/third", "a")
    other = copy(base, tmp_path / "other")
    diff_tree(root, base, tmp_path / "layer.tar", since_ns=since, exclude=())
    apply_layer(tmp_path / "layer.tar", other, tmp_path / "undo").commit()
    assert links(other) == [["a", "d/linked", "f/third"]]
