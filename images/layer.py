"""The writable layer of a container, taken from an overlay's upper directory and put onto another container's root.

`diff_overlay` writes an OCI layer: a tar where `.wh.NAME` removes NAME and `.wh..wh..opq` hides what lower layers have in its
directory; `diff_tree` does so for a root that is no overlay. `apply_layer` applies one to a merged, mounted root, keeping in
`undo_dir` what it replaces (see `smr.images.undo`), so that a restore that fails later, or a process that is killed, leaves the
root as it was.
`pack_tree` and `unpack_tree` carry the contents of an external tmpfs such as /dev/shm, without whiteouts.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from smr.images.overlay import Walker
from smr.images.pack import OPAQUE, WHITEOUT, Content, Devices, DiffStats, Packer, no_devices
from smr.images.tar import Entry, Kind, TarWriter
from smr.images.tar_reader import FileStream, Limits, Owners, TarReader
from smr.images.tarsafe import (
    Parts,
    Tree,
    create,
    disk_errors,
    portable_xattrs,
    read_xattrs,
    safe_parts,
    set_directory,
    set_times,
    through_links,
    unpack,
    unsafe,
)
from smr.images.treediff import TreeDiffer
from smr.images.undo import Journal, Layers, undo_from

__all__ = ["Applied", "DiffStats", "apply_layer", "diff_overlay", "diff_tree", "pack_tree", "undo_from", "unpack_tree"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """A layer that is on `root`. `undo` takes it off again; `commit` forgets how."""

    root: Path
    undo_dir: Path
    entries: int
    removed: int

    def undo(self) -> None:
        """Put back what was there."""
        undo_from(self.undo_dir, self.root)

    def commit(self) -> None:
        """Keep the layer: drop what was saved."""
        Journal.discard(self.undo_dir)


def diff_overlay(
    upper: Path,
    lowers: Sequence[Path],
    out: Path,
    *,
    exclude: Collection[str],
    marks_in_names: bool = False,
    devices: Devices = no_devices,
) -> DiffStats:
    """Write to the new file `out` what `upper` changes. `lowers` has the highest first, as in the mount's `lowerdir`.

    `exclude` holds absolute paths in the container; they and all below are left out. `marks_in_names`: the upper directory is
    fuse-overlayfs's. `devices` says which device nodes are taken. Raises ROOTFS_FAILED, DISK_FULL.
    """
    walker = Walker(upper, lowers, exclude=_excluded(exclude), marks_in_names=marks_in_names)
    return _pack(walker, out, content=Content.LAYER, devices=devices)


def diff_tree(
    root: Path, base: Path | None, out: Path, *, since_ns: int, exclude: Collection[str], devices: Devices = no_devices
) -> DiffStats:
    """Write to the new file `out` what was changed in the directory `root`, which has no upper directory.

    `base` is the directory it was made from, None where nobody knows; `since_ns` (since the epoch) is before the first change.
    What each means is in `smr.images.treediff`. `exclude`, `devices` and errors as for `diff_overlay`.
    """
    walker = TreeDiffer(root, base, since_ns=since_ns, exclude=_excluded(exclude))
    return _pack(walker, out, content=Content.LAYER, devices=devices)


def _excluded(paths: Collection[str]) -> set[Parts]:
    return {safe_parts(path.lstrip("/")) for path in paths}


def pack_tree(tree: Path, out: Path) -> DiffStats:
    """Write the content of the directory `tree` to the new file `out`."""
    return _pack(Walker(tree, overlay=False), out, content=Content.TREE)


def unpack_tree(tar: Path, target: Path, *, limits: Limits | None = None, owners: Owners | None = None) -> int:
    """Unpack a tar of `pack_tree` into the existing directory `target`; number of entries. ARCHIVE_UNSAFE, ARCHIVE_INVALID."""
    with _reading(tar, limits, owners) as reader:
        return unpack(reader, target, overwrite=True)


def apply_layer(
    tar: Path,
    root: Path,
    undo_dir: Path,
    *,
    limits: Limits | None = None,
    owners: Owners | None = None,
    devices: Devices = no_devices,
    layers: Layers | None = None,
) -> Applied:
    """Apply an OCI layer to the mounted container root `root`. `undo_dir` must not hold an earlier journal.

    `owners` make of the layer's user and group ids those of this root, where the container has another user namespace.
    `devices` says which device nodes the container may have; any other is ARCHIVE_UNSAFE. `layers` are those of the overlay that
    is mounted at `root`: what comes from the lower ones need not be saved. When it fails, the root is as it was. Raises
    ARCHIVE_UNSAFE, ARCHIVE_INVALID, ROOTFS_FAILED, DISK_FULL.
    """
    with ExitStack() as held:
        reader = held.enter_context(_reading(tar, limits, owners))
        held.enter_context(
            disk_errors(f"applying {tar.name} to {root}", f"free space and inodes: df {root} {undo_dir}; df -i {root}")
        )
        tree = held.enter_context(Tree(root))
        applier = _Applier(tree, held.enter_context(Journal(undo_dir, tree, layers)), reader, devices)
        try:
            applier.run()
        except BaseException:
            undo_from(undo_dir, root)
            raise
    return Applied(root=root, undo_dir=undo_dir, entries=applier.entries, removed=applier.removed)


class _Applier:
    """One application of a layer: what is new, what was written, and what has to be done at its end."""

    def __init__(self, tree: Tree, journal: Journal, reader: TarReader, devices: Devices) -> None:
        self._devices = devices
        self._tree = tree
        self._journal = journal
        self._reader = reader
        self._written: set[Parts] = set()
        self._directories: dict[Parts, Entry] = {}
        self.entries = 0
        self.removed = 0

    def run(self) -> None:
        for entry in self._reader:
            with through_links(entry):
                self._entry(safe_parts(entry.name), entry)
            self.entries += 1
        set_times(self._tree, self._directories)

    def _entry(self, parts: Parts, entry: Entry) -> None:
        name = parts[-1] if parts else ""
        if name == OPAQUE:
            self._opaque(parts[:-1])
        elif name.startswith(WHITEOUT + WHITEOUT):
            return  # aufs's own files
        elif name.startswith(WHITEOUT):
            self._remove((*parts[:-1], _whited_out(entry, name)))
        elif entry.kind in (Kind.CHAR, Kind.BLOCK) and not self._devices(entry):
            kind, (major, minor) = "c" if entry.kind is Kind.CHAR else "b", entry.device
            raise unsafe(entry.name, f"it is a device node ({kind} {major}:{minor}) that this container may not use")
        else:
            self._put(parts, entry)

    def _put(self, parts: Parts, entry: Entry) -> None:
        self._note(parts)
        found = self._tree.lstat(parts)
        if found is not None and stat.S_ISDIR(found.st_mode) and entry.kind is Kind.DIRECTORY:
            self._update(parts, entry)
            return
        if not parts:
            raise unsafe(entry.name, "it would replace the root directory")
        self._make_parents(parts)
        self._journal.about_to_replace(parts, found)
        if found is not None:
            self._tree.remove(parts)
        create(self._tree, parts, entry, self._reader, devices=True)
        if entry.kind is Kind.DIRECTORY:
            self._directories[parts] = entry

    def _note(self, parts: Parts) -> None:
        while parts not in self._written:
            self._written.add(parts)
            parts = parts[:-1]

    def _update(self, parts: Parts, entry: Entry) -> None:
        directory = self._tree.directory(parts)
        self._directories[parts] = entry
        self._journal.about_to_touch(parts)
        if not _same(directory, entry):
            set_directory(directory, entry)

    def _make_parents(self, parts: Parts) -> None:
        for missing in self._tree.missing_parents(parts):
            self._journal.about_to_replace(missing, None)
            os.mkdir(missing[-1], 0o755, dir_fd=self._tree.directory(missing[:-1]))

    def _opaque(self, parts: Parts) -> None:
        found = self._tree.lstat(parts)
        if found is None or not stat.S_ISDIR(found.st_mode):
            return
        for name in os.listdir(self._tree.directory(parts)):  # noqa: PTH208  # a descriptor
            self._remove((*parts, name))

    def _remove(self, parts: Parts) -> None:
        """Remove what lower layers have at `parts`; what this layer has put there stays."""
        found = self._tree.lstat(parts)
        if found is None:
            return
        if parts in self._written:
            if stat.S_ISDIR(found.st_mode):
                self._opaque(parts)
            return
        self._journal.about_to_replace(parts, found)
        self._tree.remove(parts)
        self.removed += 1


def _whited_out(entry: Entry, name: str) -> str:
    target = name.removeprefix(WHITEOUT)
    if target in ("", ".", ".."):
        raise unsafe(entry.name, "its whiteout names no file")
    return target


def _same(directory: int, entry: Entry) -> bool:
    found = os.fstat(directory)
    have = (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_mtime_ns)
    same = have == (entry.mode, entry.uid, entry.gid, entry.mtime_ns)
    return same and portable_xattrs(read_xattrs(directory, ".")) == portable_xattrs(entry.xattrs)


@contextmanager
def _reading(tar: Path, limits: Limits | None, owners: Owners | None) -> Iterator[TarReader]:
    fd = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield TarReader(FileStream(fd), what=tar.name, limits=limits, owners=owners)
    finally:
        os.close(fd)


def _pack(walker: Walker | TreeDiffer, out: Path, *, content: Content, devices: Devices = no_devices) -> DiffStats:
    with disk_errors(f"writing {out}"):
        fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with TarWriter(fd) as writer:
                packer = Packer(writer, content, devices)
                for found in walker:
                    packer.add(found)
            return packer.stats(excluded=walker.excluded)
        except BaseException:
            with suppress(OSError):
                out.unlink()
            raise
        finally:
            os.close(fd)
