"""Objects on disk to entries of a tar: one rule for layers, tmpfs contents and what an undo has to keep.

Hard links within one pack stay hard links, holes stay holes. A file that a running container shortens or removes meanwhile is
zero-filled or left out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import Enum, auto

from smr.images.overlay import Found, Mark
from smr.images.tar import Entry, Kind, TarWriter, data_segments
from smr.images.tarsafe import Parts, portable_xattrs

WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"

_KINDS = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFDIR: Kind.DIRECTORY,
    stat.S_IFIFO: Kind.FIFO,
    stat.S_IFCHR: Kind.CHAR,
    stat.S_IFBLK: Kind.BLOCK,
    stat.S_IFSOCK: Kind.SOCKET,
}


_COUNTED = {Kind.DIRECTORY: "directories", Kind.FIFO: "fifos", Kind.SYMLINK: "links", Kind.SOCKET: "sockets"}


# Which device nodes are let through.
Devices = Callable[[Entry], bool]


def no_devices(_: Entry) -> bool:
    """None."""
    return False


class Content(Enum):
    """What a pack is for: a LAYER has whiteouts, sockets and chosen devices, a TREE neither, ALL is for SMR's own eyes."""

    LAYER = auto()
    TREE = auto()
    ALL = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffStats:
    """What a packed tree held. Left out are a TREE's sockets, device nodes that were not chosen, and names that OCI reserves."""

    files: int = 0
    directories: int = 0
    links: int = 0
    fifos: int = 0
    sockets: int = 0
    others: int = 0
    whiteouts: int = 0
    opaque: int = 0
    sockets_skipped: int = 0
    devices_skipped: int = 0
    names_skipped: int = 0
    excluded: int = 0
    content_bytes: int = 0
    tar_bytes: int = 0

    @property
    def empty(self) -> bool:
        """Whether applying it would change nothing but the times of directories."""
        made = self.files or self.links or self.fifos or self.sockets or self.others
        return not (made or self.whiteouts or self.opaque or self.directories > 1)


class Packer:
    """Writes what a walk finds to a tar, hard links as such, and counts."""

    def __init__(self, writer: TarWriter, content: Content, devices: Devices = no_devices) -> None:
        self._writer = writer
        self._content = content
        self._devices = devices
        self._links: dict[tuple[int, int], str] = {}
        self._counts = dict.fromkeys((field.name for field in fields(DiffStats)), 0)

    def add(self, found: Found) -> None:
        """Write one finding."""
        if found.mark is Mark.WHITEOUT:
            self._mark("whiteouts", (*found.path[:-1], WHITEOUT + found.path[-1]))
        elif found.mark is Mark.OPAQUE:
            self._mark("opaque", (*found.path, OPAQUE))
        elif self._content is Content.LAYER and found.path and found.path[-1].startswith(WHITEOUT):
            self._counts["names_skipped"] += 1
        elif self._content is Content.TREE and stat.S_ISSOCK(found.stat.st_mode):
            self._counts["sockets_skipped"] += 1
        elif self._is_left_out_device(found):
            self._counts["devices_skipped"] += 1
        else:
            self._object(found)

    def stats(self, *, excluded: int = 0) -> DiffStats:
        """The counts so far."""
        return DiffStats(**self._counts | {"excluded": excluded, "tar_bytes": self._writer.written_bytes})

    def _is_left_out_device(self, found: Found) -> bool:
        if self._content is Content.ALL or stat.S_IFMT(found.stat.st_mode) not in (stat.S_IFCHR, stat.S_IFBLK):
            return False
        return self._content is Content.TREE or not self._devices(entry_of(found))

    def _mark(self, what: str, path: Parts) -> None:
        self._counts[what] += 1
        self._writer.add(Entry(name="/".join(path), kind=Kind.FILE, mode=0))

    def _object(self, found: Found) -> None:
        entry = entry_of(found)
        if entry.kind is not Kind.DIRECTORY and found.stat.st_nlink > 1:
            first = self._links.setdefault((found.stat.st_dev, found.stat.st_ino), entry.name)
            if first != entry.name:
                self._writer.add(Entry(name=entry.name, kind=Kind.HARDLINK, link=first, mode=entry.mode))
                self._counts["links"] += 1
                return
        if entry.kind is Kind.FILE:
            self._file(found, entry)
        else:
            self._writer.add(entry)
            self._counts[_COUNTED.get(entry.kind, "others")] += 1

    def _file(self, found: Found, entry: Entry) -> None:
        try:
            content = open_content(found)
        except FileNotFoundError:  # removed by a running container
            return
        try:
            if found.stat.st_blocks * 512 < entry.size or found.content is not None:
                entry = replace(entry, segments=data_segments(content, entry.size))
            self._writer.add(entry, content)
        finally:
            os.close(content)
        self._counts["files"] += 1
        self._counts["content_bytes"] += entry.data_bytes


def entry_of(found: Found) -> Entry:
    """The tar entry of an object on disk; for a symbolic link with where it points."""
    status = found.stat
    kind = _KINDS[stat.S_IFMT(status.st_mode)]
    name = "/".join(found.path)
    link = os.readlink(found.path[-1], dir_fd=found.parent) if kind is Kind.SYMLINK else ""
    return Entry(
        name=(name + "/" if found.path else "./") if kind is Kind.DIRECTORY else name,
        kind=kind,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        size=status.st_size if kind is Kind.FILE else 0,
        mtime_ns=status.st_mtime_ns,
        link=link,
        xattrs=portable_xattrs(found.xattrs),
        device=(os.major(status.st_rdev), os.minor(status.st_rdev)),
    )


def open_content(found: Found) -> int:
    """Open a file that a walk found, where its bytes are. FileNotFoundError when it is no file any more."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    if found.content is not None:
        return os.open(found.content, flags)
    fd = os.open(found.path[-1], flags, dir_fd=found.parent)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):  # a running container put something else there
        os.close(fd)
        raise FileNotFoundError(found.path[-1])
    return fd
