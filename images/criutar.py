"""The tar of CRIU's small images: flat, regular files only, the same bytes for the same files.

The reader takes exactly that and nothing more, because an image may come from anywhere: no directories, links, devices, sparse
files or paths, no name twice, no extended header that changes a name or a size. It reads headers itself: `tarfile` would take
all of those, and a header of any length into memory. Tars that `tarfile` or GNU tar wrote of plain files are fine.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from smr.images.files import writing
from smr.proto.errors import Code, SmrError

_BLOCK = 512
_MAX_MEMBERS = 1_000_000
_MAX_EXTENDED_BYTES = 64 << 10
_REGULAR = {b"0", b"\0"}
_EXTENDED = b"x"
# Of an extended header, what may stand there because it changes neither where nor how much is written.
_HARMLESS = {b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname", b"comment"}
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"5": "a directory", b"6": "a FIFO"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One file of a tar: its name and where its bytes are."""

    name: str
    offset: int
    size_bytes: int


def is_criu_image(name: str) -> bool:
    """Whether a file of a CRIU image directory belongs in the tar: all but pages, which are layers of their own."""
    return not (name.startswith("pages-") and name.endswith(".img"))


def pack_criu(folder: Path, out: Path) -> None:
    """Write the tar of a CRIU image directory, pages left out."""
    pack((file for file in folder.iterdir() if is_criu_image(file.name)), out)


def pack(files: Iterable[Path], out: Path) -> None:
    """Write the tar of `files` under their last names, sorted. Raises DISK_FULL, ARCHIVE_UNSAFE for other than regular files."""
    from tarfile import GNU_FORMAT, TarInfo

    with writing(out), out.open("wb") as target:
        for path in sorted(files, key=lambda file: file.name):
            with _open_regular(path) as source:
                info = TarInfo(_flat(path.name))
                info.size, info.mode = os.fstat(source.fileno()).st_size, 0o600
                target.write(info.tobuf(GNU_FORMAT, "ascii", "strict"))
                target.flush()
                _copy(source, 0, info.size, target.fileno(), path.name)
            target.seek(0, os.SEEK_END)
            target.write(bytes(-info.size % _BLOCK))
        target.write(bytes(2 * _BLOCK))


def _open_regular(path: Path) -> BinaryIO:
    if not stat.S_ISREG(path.lstat().st_mode):
        raise _unsafe(os.fsencode(path.name), "a link, a directory or a special file")
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")


def unpack(tar: BinaryIO, target: Path) -> list[str]:
    """Write the files of an open tar into the directory `target`, mode 0600; returns their names.

    Raises ARCHIVE_UNSAFE for a member that is no plain file, ARCHIVE_INVALID for a tar that is cut or garbled.
    """
    directory = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        names = []
        for member in members(tar):
            _write_member(tar, member, directory)
            names.append(member.name)
        return names
    finally:
        os.close(directory)


def members(tar: BinaryIO) -> Iterator[Member]:
    """The files of an open tar, each checked. Raises as `unpack`."""
    end = os.fstat(tar.fileno()).st_size
    offset, count = 0, 0
    while (header := os.pread(tar.fileno(), _BLOCK, offset)).strip(b"\0"):
        count += 1
        size = _check_header(header)
        data = offset + _BLOCK
        offset = data + size + (-size % _BLOCK)
        if data + size > end or count > _MAX_MEMBERS:
            raise _invalid("the tar is cut" if data + size > end else f"more than {_MAX_MEMBERS} files")
        if header[156:157] == _EXTENDED:
            _check_extended(os.pread(tar.fileno(), min(size, _MAX_EXTENDED_BYTES + 1), data))
        else:
            yield Member(name=_member_name(header), offset=data, size_bytes=size)
    if len(header) < _BLOCK:
        raise _invalid("its end is missing")


def _check_header(header: bytes) -> int:
    if len(header) < _BLOCK:
        raise _invalid("a header is cut")
    if sum(header[:148]) + sum(header[156:]) + 8 * ord(" ") != _number(header[148:156]):
        raise _invalid("a header is garbled")
    return _number(header[124:136])


def _member_name(header: bytes) -> str:
    raw = header[:100].partition(b"\0")[0]
    kind = header[156:157]
    if kind not in _REGULAR:
        raise _unsafe(raw, _KINDS.get(kind, f"an entry of type {kind!r}"))
    # GNU tar keeps other fields where ustar has the path's prefix.
    if header[257:265] == b"ustar\x0000" and header[345:500].strip(b"\0"):
        raise _unsafe(raw, "in a folder")
    try:
        return _flat(raw.decode("ascii"))
    except UnicodeDecodeError:
        raise _unsafe(raw, "named in other than ASCII") from None


def _flat(name: str) -> str:
    if name in {"", ".", ".."} or "/" in name or not name.isprintable():
        raise _unsafe(name.encode(errors="replace"), "outside the folder or without a name")
    return name


def _check_extended(data: bytes) -> None:
    if len(data) > _MAX_EXTENDED_BYTES:
        raise _invalid(f"an extended header of more than {_MAX_EXTENDED_BYTES} bytes")
    while data:
        length, space, _ = data.partition(b" ")
        if not space or not length.isdigit() or not len(length) < int(length) <= len(data):
            raise _invalid("an extended header is garbled")
        key, equals, _ = data[len(length) + 1 : int(length)].partition(b"=")
        if not equals:
            raise _invalid("an extended header is garbled")
        if key not in _HARMLESS:
            raise _unsafe(key, "an extended header that changes a file")
        data = data[int(length) :]


def _number(raw: bytes) -> int:
    if raw[0] == 0x80:  # GNU's binary form, for sizes of 8 GiB and more
        return int.from_bytes(raw[1:], "big")
    digits = raw.strip(b" \0")
    if not digits or digits.strip(b"01234567"):
        raise _invalid(f"found the number {raw!r}, needed octal digits")
    return int(digits, 8)


def _write_member(tar: BinaryIO, member: Member, directory: int) -> None:
    try:
        fd = os.open(member.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=directory)
    except FileExistsError:
        raise _unsafe(member.name.encode(), "there twice") from None
    try:
        _copy(tar, member.offset, member.size_bytes, fd, member.name)
    finally:
        os.close(fd)


def _copy(source: BinaryIO, offset: int, size_bytes: int, target: int, name: str) -> None:
    left = size_bytes
    while left:
        count = os.sendfile(target, source.fileno(), offset, min(left, 1 << 30))
        if not count:
            raise _invalid(f"'{name}' ended {left} bytes early")
        offset, left = offset + count, left - count


def _unsafe(name: bytes, what: str) -> SmrError:
    shown = name[:100].decode("ascii", "backslashreplace")
    return SmrError(
        f"tar of CRIU's images has {what}: '{shown}'; needed plain files in one folder",
        hint="do not use this image; get it again from where it was made",
        code=Code.ARCHIVE_UNSAFE,
        member=shown,
    )


def _invalid(what: str) -> SmrError:
    return SmrError(f"tar of CRIU's images cannot be read: {what}", code=Code.ARCHIVE_INVALID)
