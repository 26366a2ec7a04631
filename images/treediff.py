"""What a container changed in a root that has no upper directory, found by one walk over it, beside its base where that is known.

`TreeDiffer` yields `Found` in tar order like `smr.images.overlay.Walker`: a directory before what is in it, only directories that
changed or hold a change, whiteouts for what only the base has. Hard links come last, when all names of an inode are known.

With a base (the directory the root was copied or snapshotted from) objects are compared by their metadata: type, mode, owner,
size, modification time, target, device. The same inode number with the same change time is the same object (a snapshot's). Where
that much is equal, the change time decides: it cannot be set, so what has one from before `since_ns` (in which the container
could not yet change anything) is as it was copied; of the rest attributes and contents are compared. Directories from before
`since_ns` count as unchanged whatever their times, because copies do not keep those.

Without a base, what has a change time of `since_ns` or later was changed. What was removed nobody knows.

Directories of other file systems that the host has mounted below the root are left out, as mounts of the container are.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from smr.images.overlay import MAX_DEPTH, Found, Mark
from smr.images.tarsafe import Parts, Tree, read_xattrs
from smr.proto.errors import Code, SmrError

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_COMPARE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Name:
    """One name of an inode with several: whether it is as in the base, and the base's inode there (0: none)."""

    path: Parts
    status: os.stat_result
    same: bool
    base_inode: int


@dataclass(slots=True)
class _Pair:
    """A directory of the root and of its base (-1: the base has none)."""

    path: Parts
    own: int
    base: int


class TreeDiffer:
    """Walks `root`, against `base` if there is one; `since_ns` as in the module, in nanoseconds since the epoch."""

    def __init__(self, root: Path, base: Path | None, *, since_ns: int, exclude: Collection[Parts] = ()) -> None:
        self._root = root
        self._base = base
        self._since_ns = since_ns
        self._exclude = frozenset(exclude)
        self._links: dict[tuple[int, int], list[_Name]] = {}
        # Directories above the place of the walk that nothing was yielded for yet, the highest first.
        self._pending: list[tuple[Parts, int, os.stat_result]] = []
        self._yielded: set[Parts] = {()}
        self._device = 0
        self.excluded = 0

    def __iter__(self) -> Iterator[Found]:
        own = os.open(self._root, _DIRECTORY & ~os.O_NOFOLLOW)
        base = -1
        try:
            if self._base is not None:
                base = os.open(self._base, _DIRECTORY & ~os.O_NOFOLLOW)
            status = os.fstat(own)
            self._device = status.st_dev
            yield Found(mark=Mark.OBJECT, path=(), parent=own, stat=status, xattrs=read_xattrs(own, "."))
            yield from self._directory(_Pair((), own, base))
            yield from self._linked()
        finally:
            os.close(own)
            if base >= 0:
                os.close(base)

    def _directory(self, pair: _Pair) -> Iterator[Found]:
        if len(pair.path) > MAX_DEPTH:
            raise SmrError(f"/{'/'.join(pair.path[:8])}/... is more than {MAX_DEPTH} directories deep", code=Code.UNSUPPORTED)
        before = set(os.listdir(pair.base)) if pair.base >= 0 else set()  # noqa: PTH208  # a descriptor
        with os.scandir(pair.own) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            known = name in before
            before.discard(name)
            yield from self._child(pair, name, known=known)
        for name in sorted(before):
            yield from self._removed(pair, name)

    def _child(self, pair: _Pair, name: str, *, known: bool) -> Iterator[Found]:
        path = (*pair.path, name)
        if path in self._exclude:
            self.excluded += 1
            return
        try:
            status = os.stat(name, dir_fd=pair.own, follow_symlinks=False)
        except FileNotFoundError:
            return
        before = os.stat(name, dir_fd=pair.base, follow_symlinks=False) if known else None
        same = self._same(pair, name, status, before)
        if stat.S_ISDIR(status.st_mode):
            yield from self._enter(pair, name, status, before, same=same)
        elif status.st_nlink > 1:
            inode = before.st_ino if before is not None else 0
            self._links.setdefault((status.st_dev, status.st_ino), []).append(_Name(path, status, same, inode))
        elif not same:
            yield from self._found(path, pair.own, status)

    def _enter(
        self, pair: _Pair, name: str, status: os.stat_result, before: os.stat_result | None, *, same: bool
    ) -> Iterator[Found]:
        path = (*pair.path, name)
        if status.st_dev != self._device and not _is_subvolume(status):
            self.excluded += 1
            return
        if not same:
            yield from self._found(path, pair.own, status)
        else:
            self._pending.append((path, pair.own, status))
        with suppress(FileNotFoundError):
            own, base = os.open(name, _DIRECTORY, dir_fd=pair.own), -1
            try:
                if before is not None and stat.S_ISDIR(before.st_mode):
                    base = os.open(name, _DIRECTORY, dir_fd=pair.base)
                yield from self._directory(_Pair(path, own, base))
            finally:
                os.close(own)
                if base >= 0:
                    os.close(base)
        if self._pending and self._pending[-1][0] == path:
            self._pending.pop()

    def _removed(self, pair: _Pair, name: str) -> Iterator[Found]:
        path = (*pair.path, name)
        if path in self._exclude:
            self.excluded += 1
            return
        yield from self._parents()
        yield Found(mark=Mark.WHITEOUT, path=path, parent=pair.own, stat=os.fstat(pair.own), xattrs={})

    def _parents(self) -> Iterator[Found]:
        pending, self._pending = self._pending, []
        for path, parent, status in pending:
            yield self._object(path, parent, status)

    def _found(self, path: Parts, parent: int, status: os.stat_result) -> Iterator[Found]:
        yield from self._parents()
        with suppress(FileNotFoundError):
            yield self._object(path, parent, status)

    def _object(self, path: Parts, parent: int, status: os.stat_result) -> Found:
        if stat.S_ISDIR(status.st_mode):
            self._yielded.add(path)
        return Found(mark=Mark.OBJECT, path=path, parent=parent, stat=status, xattrs=read_xattrs(parent, path[-1]))

    def _same(self, pair: _Pair, name: str, now: os.stat_result, before: os.stat_result | None) -> bool:
        if self._base is None:
            return now.st_ctime_ns < self._since_ns
        if before is None or (now.st_mode, now.st_uid, now.st_gid) != (before.st_mode, before.st_uid, before.st_gid):
            return False
        if (now.st_ino, now.st_ctime_ns) == (before.st_ino, before.st_ctime_ns):
            return True
        if stat.S_ISDIR(now.st_mode):
            return now.st_ctime_ns < self._since_ns or (
                now.st_mtime_ns == before.st_mtime_ns and read_xattrs(pair.own, name) == read_xattrs(pair.base, name)
            )
        if (now.st_size, now.st_mtime_ns, now.st_rdev) != (before.st_size, before.st_mtime_ns, before.st_rdev):
            return False
        if stat.S_ISLNK(now.st_mode):
            return os.readlink(name, dir_fd=pair.own) == os.readlink(name, dir_fd=pair.base)
        if now.st_ctime_ns < self._since_ns:
            return True
        if read_xattrs(pair.own, name) != read_xattrs(pair.base, name):
            return False
        return not stat.S_ISREG(now.st_mode) or _equal(pair, name, now.st_size)

    def _linked(self) -> Iterator[Found]:
        """Inodes with several names: all of them when one is new or changed, unless the base has the others' content."""
        if not self._links:
            return
        with Tree(self._root) as tree:
            for names in self._links.values():
                for name in self._of_inode(names):
                    yield from self._missing_parents(tree, name.path)
                    yield self._object(name.path, tree.directory(name.path[:-1]), name.status)

    def _of_inode(self, names: list[_Name]) -> list[_Name]:
        if self._base is None:
            return [] if all(name.same for name in names) else names
        together = len({name.base_inode for name in names}) == 1
        return [] if together and all(name.same for name in names) else names

    def _missing_parents(self, tree: Tree, path: Parts) -> Iterator[Found]:
        for depth in range(1, len(path)):
            above = path[:depth]
            if above not in self._yielded:
                parent = tree.directory(above[:-1])
                yield self._object(above, parent, os.stat(above[-1], dir_fd=parent, follow_symlinks=False))


def _is_subvolume(status: os.stat_result) -> bool:
    """Roots of btrfs's subvolumes have a device number of their own, and this inode number."""
    return status.st_ino == 256


def _equal(pair: _Pair, name: str, size: int) -> bool:
    own = os.open(name, _FILE, dir_fd=pair.own)
    try:
        base = os.open(name, _FILE, dir_fd=pair.base)
        try:
            return all(
                os.pread(own, _COMPARE_BYTES, at) == os.pread(base, _COMPARE_BYTES, at) for at in range(0, size, _COMPARE_BYTES)
            )
        finally:
            os.close(base)
    finally:
        os.close(own)
