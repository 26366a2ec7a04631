"""How a change to a container's root is taken back, also by another process after a kill -9.

On disk, in the undo directory (0700):
    journal     one JSON line a change, appended before the change is made; a torn last line stands for a change not made
    saved.tar   what was there before, as tar archives one after the other; a journal line names the offset of its own

A line is {"path": P, "state": S, "offset": N}. S is `absent` (nothing was at P: remove what is), `saved` (the object or tree at
P is in the archive at N), `below` (it is in the lower layers of the overlay, which nobody changes, and so not saved) or
`directory` (only owner, mode, attributes and time of the directory P are). A first line {"below": [DIRECTORY..]} has the lower
layers, the highest first. Undoing goes through the
lines backwards and may itself be interrupted and begun again. The first line of a path counts: below an absent or saved path
nothing more is written. Neither file is synced: they have to outlive a process, not the machine, whose reboot ends the
container as well.

What does not come back: the inode number, the change time, and a hard link between a replaced file and one that was left alone.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType

from smr.images.overlay import Found, Mark, Walker, walk_below
from smr.images.pack import Content, Packer, entry_of, open_content
from smr.images.tar import Entry, Kind, TarWriter, data_segments
from smr.images.tar_reader import FileStream, TarReader
from smr.images.tarsafe import Parts, Tree, create, disk_errors, read_xattrs, safe_parts, set_directory, set_times
from smr.proto.errors import Code, SmrError

_APPEND = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class State(StrEnum):
    """What was at a path before."""

    ABSENT = "absent"
    SAVED = "saved"
    BELOW = "below"
    DIRECTORY = "directory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """The directories of the overlay that a root is: what is not in `upper` is in `lowers` (the highest first)."""

    upper: Path
    lowers: tuple[Path, ...]

    def only_below(self, path: Parts) -> bool:
        """Whether all that is visible at `path` comes from the lower layers, at the same path."""
        place = self.upper
        for part in path:
            place = place / part
            try:
                status = place.lstat()
            except (FileNotFoundError, NotADirectoryError):
                return True
            if not stat.S_ISDIR(status.st_mode) or _redirects(place):
                return False
        return False


def _redirects(directory: Path) -> bool:
    return any(key.endswith(".overlay.redirect") for key in os.listxattr(directory, follow_symlinks=False))


@dataclass(frozen=True, slots=True)
class _Line:
    path: Parts
    state: State
    offset: int


class Journal:
    """The open journal of one application. Each `about_to_...` returns when the old state is safe."""

    def __init__(self, undo_dir: Path, tree: Tree, layers: Layers | None = None) -> None:
        undo_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._tree = tree
        self._layers = layers
        self._covered: set[Parts] = set()
        self._touched: set[Parts] = set()
        try:
            self._journal = os.open(undo_dir / "journal", _APPEND, 0o600)
        except FileExistsError as error:
            raise SmrError(
                f"{undo_dir} holds the journal of an earlier restore", hint="undo it first", code=Code.ROOTFS_FAILED
            ) from error
        try:
            self._saved = os.open(undo_dir / "saved.tar", _APPEND, 0o600)
        except OSError:
            os.close(self._journal)
            raise
        self._writer = TarWriter(self._saved)
        if layers is not None:
            self._write({"below": [str(lower) for lower in layers.lowers]})

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; the journal stays."""
        for fd in (self._journal, self._saved):
            if fd >= 0:
                os.close(fd)
        self._journal = self._saved = -1

    @staticmethod
    def discard(undo_dir: Path) -> None:
        """Remove a journal: from the first step on there is nothing to undo."""
        for name in ("journal", "saved.tar"):
            with suppress(FileNotFoundError):
                (undo_dir / name).unlink()
        with suppress(OSError):
            undo_dir.rmdir()

    def about_to_replace(self, path: Parts, found: os.stat_result | None) -> None:
        """The object at `path` (None: nothing is there) is going to be replaced, removed or made."""
        if self._is_covered(path):
            return
        self.about_to_touch(path[:-1])
        offset, state = self._writer.written_bytes, State.ABSENT
        if found is not None and self._layers is not None and self._layers.only_below(path):
            state = State.BELOW
        elif found is not None:
            self._save(path, found)
            state = State.SAVED
        self._append(_Line(path, state, offset))
        self._covered.add(path)

    def about_to_touch(self, path: Parts) -> None:
        """The directory `path` gets other metadata or other children."""
        if path in self._touched or self._is_covered(path):
            return
        offset = self._writer.written_bytes
        directory = self._tree.directory(path)
        found = Found(mark=Mark.OBJECT, path=path, parent=directory, stat=os.fstat(directory), xattrs=read_xattrs(directory, "."))
        self._writer.add(entry_of(found))
        self._writer.close()
        self._append(_Line(path, State.DIRECTORY, offset))
        self._touched.add(path)

    def _is_covered(self, path: Parts) -> bool:
        return any(path[:depth] in self._covered for depth in range(1, len(path) + 1))

    def _save(self, path: Parts, found: os.stat_result) -> None:
        packer = Packer(self._writer, Content.ALL)
        if stat.S_ISDIR(found.st_mode):
            for item in Walker(self._tree.directory(path), overlay=False, prefix=path):
                packer.add(item)
        else:
            parent = self._tree.directory(path[:-1])
            attributes = read_xattrs(parent, path[-1])
            packer.add(Found(mark=Mark.OBJECT, path=path, parent=parent, stat=found, xattrs=attributes))
        self._writer.close()

    def _append(self, line: _Line) -> None:
        self._write({"path": "/".join(line.path), "state": line.state.value, "offset": line.offset})

    def _write(self, document: dict[str, object]) -> None:
        text = json.dumps(document).encode() + b"\n"
        if os.write(self._journal, text) != len(text):
            raise SmrError("the undo journal could not be written: no space", code=Code.DISK_FULL)


def undo_from(undo_dir: Path, root: Path) -> None:
    """Put `root` back to what it was before the application whose journal is in `undo_dir`, then drop the journal.

    Without a journal there is nothing to undo. Raises ROOTFS_FAILED or DISK_FULL, and may then be called again.
    """
    lowers, lines = _lines(undo_dir)
    if lines:
        with disk_errors(f"undoing the changes to {root}", f"free space and inodes: df {root}; df -i {root}"), Tree(root) as tree:
            saved = os.open(undo_dir / "saved.tar", os.O_RDONLY | os.O_CLOEXEC)
            try:
                for line in reversed(lines):
                    _undo(tree, line, saved, lowers)
            finally:
                os.close(saved)
    Journal.discard(undo_dir)


def _lines(undo_dir: Path) -> tuple[list[Path], list[_Line]]:
    """The lower layers, and the lines."""
    try:
        *complete, _torn = (undo_dir / "journal").read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    try:
        documents = [json.loads(text) for text in complete]
        lowers = [Path(lower) for lower in documents.pop(0)["below"]] if documents and "below" in documents[0] else []
        return lowers, [_line(document) for document in documents]
    except (ValueError, KeyError, TypeError) as error:
        raise SmrError(f"{undo_dir}/journal cannot be read: {error}", code=Code.ROOTFS_FAILED) from error


def _line(document: dict[str, object]) -> _Line:
    return _Line(safe_parts(str(document["path"])), State(str(document["state"])), int(str(document["offset"])))


def _undo(tree: Tree, line: _Line, saved: int, lowers: list[Path]) -> None:
    entries = TarReader(FileStream(saved, line.offset), what="saved.tar")
    if line.state is State.DIRECTORY:
        for entry in entries:
            set_directory(tree.directory(line.path), entry)
        return
    tree.remove(line.path)
    if line.state is State.BELOW:
        set_times(tree, dict(_copied(tree, walk_below(lowers, line.path))))
    if line.state is State.SAVED:
        directories = dict(_restored(tree, entries))
        set_times(tree, directories)


def _restored(tree: Tree, entries: TarReader) -> Iterator[tuple[Parts, Entry]]:
    for entry in entries:
        parts = safe_parts(entry.name)
        create(tree, parts, entry, entries, devices=True)
        if entry.kind is Kind.DIRECTORY:
            yield parts, entry


def _copied(tree: Tree, found: Iterator[Found]) -> Iterator[tuple[Parts, Entry]]:
    """Make what a walk finds, and hard links within it; yields its directories."""
    names: dict[tuple[int, int], str] = {}
    for item in found:
        entry, status = entry_of(item), item.stat
        if entry.kind is Kind.DIRECTORY:
            yield item.path, entry
        elif status.st_nlink > 1:
            first = names.setdefault((status.st_dev, status.st_ino), entry.name)
            if first != entry.name:
                entry = Entry(name=entry.name, kind=Kind.HARDLINK, link=first)
        create(tree, item.path, entry, _Original(item), devices=True)


@dataclass(frozen=True, slots=True)
class _Original:
    """The content of a found file, as `create` asks for it."""

    found: Found

    def copy(self, entry: Entry, fd: int) -> None:
        """Write it to `fd`, holes as holes."""
        source = open_content(self.found)
        try:
            segments = data_segments(source, entry.size)
            for start, length in ((0, entry.size),) if segments is None else segments:
                os.lseek(fd, start, os.SEEK_SET)
                done = 0
                while done < length and (count := os.sendfile(fd, source, start + done, min(length - done, 1 << 30))):
                    done += count
            os.ftruncate(fd, entry.size)
        finally:
            os.close(source)
