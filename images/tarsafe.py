"""Unpacking what nobody vouches for: entries land strictly inside one directory, whatever their names and links say.

Every path is walked from a descriptor of the root, one component at a time and never through a symbolic link, so neither the
archive nor a process that edits the tree meanwhile can lead out of it. Device nodes, absolute names and '..' are refused with
ARCHIVE_UNSAFE. A symbolic link may point anywhere (it is only text until somebody inside the container follows it).
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

from smr.images.tar import Entry, Kind
from smr.images.tar_reader import TarReader
from smr.proto.errors import Code, SmrError

Parts = tuple[str, ...]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_DEPTH = 256
# Labels are the new container's own; overlay's marks would reach the layer below ours.
_FOREIGN_XATTRS = (
    *("trusted.overlay.", "user.overlay.", "user.fuseoverlayfs."),
    *("security.selinux", "security.ima", "security.evm"),
)


def unsafe(what: str, why: str) -> SmrError:
    """The error for an entry that is not let in."""
    return SmrError(f"archive entry '{what}' is refused: {why}", code=Code.ARCHIVE_UNSAFE, entry=what)


def safe_parts(name: str) -> Parts:
    """The components of an entry's name; () is the root itself. ARCHIVE_UNSAFE when it is absolute or climbs."""
    if name.startswith("/"):
        raise unsafe(name, "its name is absolute")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise unsafe(name, "its name climbs with '..'")
    if len(parts) > _MAX_DEPTH:
        raise unsafe(f"{name[:80]}...", f"it lies {len(parts)} directories deep")
    if "\0" in name or any(len(os.fsencode(part)) > 255 for part in parts):
        raise unsafe(f"{name[:80]}...", "it is no file name")
    return parts


@contextmanager
def disk_errors(what: str, full: str = "free space, or move the store with 'store' in /etc/smr/smr.toml") -> Iterator[None]:
    """Turn an OSError of the body into DISK_FULL, with `full` as its hint, or ROOTFS_FAILED."""
    try:
        yield
    except OSError as error:
        no_space = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise SmrError(
            f"{what}: {error}", hint=full if no_space else "", code=Code.DISK_FULL if no_space else Code.ROOTFS_FAILED
        ) from error


class Tree:
    """A directory tree addressed by components from an open root. Keeps the descriptors of the last path walked."""

    def __init__(self, root: Path) -> None:
        self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._open: list[tuple[str, int]] = []

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close_from(0)
        os.close(self._root)

    def directory(self, parts: Parts) -> int:
        """Descriptor of the directory, valid until the next call. NotADirectoryError also where a part is a symbolic link."""
        shared = 0
        while shared < min(len(parts), len(self._open)) and self._open[shared][0] == parts[shared]:
            shared += 1
        self._close_from(shared)
        for part in parts[shared:]:
            parent = self._open[-1][1] if self._open else self._root
            self._open.append((part, os.open(part, _DIRECTORY, dir_fd=parent)))
        return self._open[-1][1] if self._open else self._root

    def lstat(self, parts: Parts) -> os.stat_result | None:
        """What lies there, None when nothing does."""
        try:
            if not parts:
                return os.fstat(self._root)
            return os.stat(parts[-1], dir_fd=self.directory(parts[:-1]), follow_symlinks=False)
        except FileNotFoundError:
            return None

    def missing_parents(self, parts: Parts) -> list[Parts]:
        """The directories above `parts` that are not there, the highest first. NotADirectoryError as in `directory`."""
        try:
            self.directory(parts[:-1])
        except FileNotFoundError:
            return [parts[:depth] for depth in range(1, len(parts)) if self.lstat(parts[:depth]) is None]
        return []

    def remove(self, parts: Parts) -> None:
        """Remove a file or a whole tree; nothing happens when it is not there."""
        found = self.lstat(parts)
        if found is None:
            return
        self.forget(parts)
        parent = self.directory(parts[:-1])
        if stat.S_ISDIR(found.st_mode):
            shutil.rmtree(parts[-1], dir_fd=parent)
        else:
            os.unlink(parts[-1], dir_fd=parent)

    def forget(self, parts: Parts) -> None:
        """Close what is open of `parts` and below, because it is about to go."""
        if len(self._open) >= len(parts) and tuple(name for name, _ in self._open[: len(parts)]) == parts:
            self._close_from(len(parts) - 1)

    def _close_from(self, depth: int) -> None:
        while len(self._open) > depth:
            os.close(self._open.pop()[1])


class Bytes(Protocol):
    """Where a file's content comes from."""

    def copy(self, entry: Entry, fd: int, /) -> None:
        """Write the content of `entry` to `fd`, holes as holes."""


def create(tree: Tree, parts: Parts, entry: Entry, reader: Bytes, *, devices: bool = False) -> None:
    """Make the object of `entry` at `parts`, where nothing may be and whose parent must exist, with all its metadata.

    A directory's time is set as well, and changes with what is put in later. A hard link's target is looked up inside the tree.
    `devices`: sockets, and device nodes, which the caller has judged, are made too.
    """
    if entry.kind is Kind.HARDLINK:
        _hardlink(tree, parts, entry)
        return
    name, parent = parts[-1], tree.directory(parts[:-1])
    if entry.kind is Kind.FILE:
        _file(parent, name, entry, reader)
    elif entry.kind is Kind.DIRECTORY:
        os.mkdir(name, 0o700, dir_fd=parent)
        directory = os.open(name, _DIRECTORY, dir_fd=parent)
        try:
            set_directory(directory, entry)
        finally:
            os.close(directory)
    else:
        _special(parent, name, entry, devices=devices)


def set_directory(fd: int, entry: Entry) -> None:
    """Give an open directory the owner, mode, extended attributes (exactly these) and time of `entry`."""
    os.fchown(fd, entry.uid, entry.gid)
    os.fchmod(fd, entry.mode)
    for key in os.listxattr(fd):
        if not key.startswith(_FOREIGN_XATTRS) and key not in entry.xattrs:
            os.removexattr(fd, key)
    _set_xattrs(fd, entry)
    os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))


def read_xattrs(parent: int, name: str) -> dict[str, bytes]:
    """The extended attributes of an object, whatever its type, without following it; {} where there can be none."""
    return read_xattrs_of(f"/proc/self/fd/{parent}/{name}")


def read_xattrs_of(path: str | Path) -> dict[str, bytes]:
    """The same of what is at `path`, of which only the last component is not followed."""
    try:
        return {key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)}
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENODATA):
            return {}
        raise


def portable_xattrs(xattrs: Mapping[str, bytes]) -> dict[str, bytes]:
    """Those that belong to the file and not to this machine's policy or to overlayfs."""
    return {key: value for key, value in xattrs.items() if not key.startswith(_FOREIGN_XATTRS)}


def _file(parent: int, name: str, entry: Entry, reader: Bytes) -> None:
    fd = os.open(name, _NEW_FILE, 0o600, dir_fd=parent)
    try:
        reader.copy(entry, fd)
        os.fchown(fd, entry.uid, entry.gid)
        os.fchmod(fd, entry.mode)
        _set_xattrs(fd, entry)
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
    finally:
        os.close(fd)


def _hardlink(tree: Tree, parts: Parts, entry: Entry) -> None:
    target = safe_parts(entry.link)
    if not target:
        raise unsafe(entry.name, "it is a hard link to the root")
    try:
        found = tree.lstat(target)
    except NotADirectoryError:
        raise unsafe(entry.name, f"its hard link target '{entry.link}' lies behind a symbolic link") from None
    if found is None or stat.S_ISDIR(found.st_mode):
        raise unsafe(entry.name, f"its hard link target '{entry.link}' is not a file of the archive's tree")
    source = os.dup(tree.directory(target[:-1]))
    try:
        parent = tree.directory(parts[:-1])
        os.link(target[-1], parts[-1], src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
    finally:
        os.close(source)


def _special(parent: int, name: str, entry: Entry, *, devices: bool) -> None:
    if entry.kind is Kind.SYMLINK:
        os.symlink(entry.link, name, dir_fd=parent)
    elif entry.kind is Kind.FIFO:
        os.mkfifo(name, 0o600, dir_fd=parent)
    elif devices:
        kind = {Kind.CHAR: stat.S_IFCHR, Kind.BLOCK: stat.S_IFBLK}.get(entry.kind, stat.S_IFSOCK)
        os.mknod(name, kind | 0o600, os.makedev(*entry.device), dir_fd=parent)
    else:
        raise unsafe(entry.name, "it is a device node")
    os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
    if entry.kind is not Kind.SYMLINK:
        os.chmod(name, entry.mode, dir_fd=parent)
    _set_xattrs(f"/proc/self/fd/{parent}/{name}", entry)
    os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)


def _set_xattrs(target: int | str, entry: Entry) -> None:
    follow = isinstance(target, int)
    for key, value in portable_xattrs(entry.xattrs).items():
        try:
            os.setxattr(target, key, value, follow_symlinks=follow)
        except OSError as error:
            if error.errno != errno.ENOTSUP or key == "security.capability":
                raise


def unpack(reader: TarReader, target: Path, *, overwrite: bool = False) -> int:
    """Unpack all entries into the existing directory `target`; number of entries.

    An entry that is there already is ARCHIVE_UNSAFE (an archive that names a file twice), or replaced with `overwrite`; a
    directory takes the new metadata. Missing parents are made 0755.
    """
    directories: dict[Parts, Entry] = {}
    count = 0
    with disk_errors(f"unpacking into {target}"), Tree(target) as tree:
        for entry in reader:
            parts = safe_parts(entry.name)
            _check_kind(parts, entry)
            with through_links(entry):
                _unpack_one(tree, parts, entry, reader, overwrite=overwrite)
            if entry.kind is Kind.DIRECTORY:
                directories[parts] = entry
            count += 1
        set_times(tree, directories)
    return count


def set_times(tree: Tree, directories: Mapping[Parts, Entry]) -> None:
    """Set the times of directories again, after the last change inside them."""
    for parts, entry in directories.items():
        with suppress(FileNotFoundError, NotADirectoryError):  # replaced by a later entry
            os.utime(tree.directory(parts), ns=(entry.mtime_ns, entry.mtime_ns))


@contextmanager
def through_links(entry: Entry) -> Iterator[None]:
    """Say that a path of `entry` led through a symbolic link or a file, which is refused."""
    try:
        yield
    except NotADirectoryError:
        raise unsafe(entry.name, "its path leads through a symbolic link or a file") from None


def make_parents(tree: Tree, parts: Parts) -> None:
    """Make the missing directories above `parts`, 0755 and root's."""
    for missing in tree.missing_parents(parts):
        os.mkdir(missing[-1], 0o755, dir_fd=tree.directory(missing[:-1]))


def _check_kind(parts: Parts, entry: Entry) -> None:
    if not parts and entry.kind is not Kind.DIRECTORY:
        raise unsafe(entry.name, "it would replace the root directory")
    if entry.kind in (Kind.CHAR, Kind.BLOCK, Kind.SOCKET):
        raise unsafe(entry.name, "it is a device node")


def _unpack_one(tree: Tree, parts: Parts, entry: Entry, reader: TarReader, *, overwrite: bool) -> None:
    found = tree.lstat(parts)
    if found is not None and stat.S_ISDIR(found.st_mode) and entry.kind is Kind.DIRECTORY:
        set_directory(tree.directory(parts), entry)
        return
    if found is not None:
        if not overwrite:
            raise unsafe(entry.name, "it is in the archive twice")
        tree.remove(parts)
    make_parents(tree, parts)
    create(tree, parts, entry, reader)


def names(parts: Sequence[str]) -> str:
    """The absolute path in the container that `parts` stand for."""
    return "/" + "/".join(parts)
