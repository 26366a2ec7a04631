"""How a change to a container's root is taken back, also by another process after a kill -9.

On disk, in the undo directory (0700):
    journal     one JSON line a change, appended before the change is made; a torn last line stands for a change not made
    saved.tar   what was there before, as tar archives one after the other; a journal line names the offset of its own

A line is {"path": P, "state": S, "offset": N}. S is `absent` (nothing was at P: remove what is), `saved` (the object or tree at
P is in the archive at N) or `directory` (only owner, mode, attributes and time of the directory P are). Undoing goes through the
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

from smr.images.overlay import Found, Mark, Walker
from smr.images.pack import Content, Packer, entry_of
from smr.images.tar import Entry, Kind, TarWriter
from smr.images.tar_reader import FileStream, TarReader
from smr.images.tarsafe import Parts, Tree, create, disk_errors, read_xattrs, safe_parts, set_directory, set_times
from smr.proto.errors import Code, SmrError

_APPEND = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class State(StrEnum):
    """What was at a path before."""

    ABSENT = "absent"
    SAVED = "saved"
    DIRECTORY = "directory"


@dataclass(frozen=True, slots=True)
class _Line:
    path: Parts
    state: State
    offset: int


class Journal:
    """The open journal of one application. Each `about_to_...` returns when the old state is safe."""

    def __init__(self, undo_dir: Path, tree: Tree) -> None:
        undo_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._tree = tree
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
        offset = self._writer.written_bytes
        if found is not None:
            self._save(path, found)
        self._append(_Line(path, State.ABSENT if found is None else State.SAVED, offset))
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
        text = json.dumps({"path": "/".join(line.path), "state": line.state.value, "offset": line.offset}).encode() + b"\n"
        if os.write(self._journal, text) != len(text):
            raise SmrError("the undo journal could not be written: no space", code=Code.DISK_FULL)


def undo_from(undo_dir: Path, root: Path) -> None:
    """Put `root` back to what it was before the application whose journal is in `undo_dir`, then drop the journal.

    Without a journal there is nothing to undo. Raises ROOTFS_FAILED or DISK_FULL, and may then be called again.
    """
    lines = _lines(undo_dir)
    if lines:
        with disk_errors(f"undoing the changes to {root}"), Tree(root) as tree:
            saved = os.open(undo_dir / "saved.tar", os.O_RDONLY | os.O_CLOEXEC)
            try:
                for line in reversed(lines):
                    _undo(tree, line, saved)
            finally:
                os.close(saved)
    Journal.discard(undo_dir)


def _lines(undo_dir: Path) -> list[_Line]:
    try:
        *complete, _torn = (undo_dir / "journal").read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    try:
        return [_line(json.loads(text)) for text in complete]
    except (ValueError, KeyError, TypeError) as error:
        raise SmrError(f"{undo_dir}/journal cannot be read: {error}", code=Code.ROOTFS_FAILED) from error


def _line(document: dict[str, object]) -> _Line:
    return _Line(safe_parts(str(document["path"])), State(str(document["state"])), int(str(document["offset"])))


def _undo(tree: Tree, line: _Line, saved: int) -> None:
    entries = TarReader(FileStream(saved, line.offset), what="saved.tar")
    if line.state is State.DIRECTORY:
        for entry in entries:
            set_directory(tree.directory(line.path), entry)
        return
    tree.remove(line.path)
    if line.state is State.SAVED:
        directories = dict(_restored(tree, entries))
        set_times(tree, directories)


def _restored(tree: Tree, entries: TarReader) -> Iterator[tuple[Parts, Entry]]:
    for entry in entries:
        parts = safe_parts(entry.name)
        create(tree, parts, entry, entries, devices=True)
        if entry.kind is Kind.DIRECTORY:
            yield parts, entry
