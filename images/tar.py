"""Tar as SMR writes it: POSIX (PAX) headers, extended attributes, nanosecond times, holes kept as holes.

`Entry` is what both directions speak: `TarWriter` here, `TarReader` in `smr.images.tar_reader`. The standard library's
tarfile is not used because it can neither write sparse files nor bound what a hostile header makes it allocate.

Formats: POSIX.1-2001 pax; `SCHILY.xattr.*` for extended attributes (as GNU tar, Go and libarchive have them); GNU's sparse
format 1.0, where the file's data begins with its map. Names are `os.fsdecode`d bytes; a name that is not UTF-8 goes out raw.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType

BLOCK = 512
XATTR_PREFIX = "SCHILY.xattr."
_COPY_BYTES = 1 << 30
_SMALL_BYTES = 1 << 16
_ZEROS = bytes(1 << 20)
_MAX_OCTAL_SIZE = 8**11 - 1
_MAX_OCTAL_ID = 8**7 - 1

Segments = tuple[tuple[int, int], ...]


class Kind(Enum):
    """Type of an entry; the value is the type flag."""

    FILE = b"0"
    HARDLINK = b"1"
    SYMLINK = b"2"
    CHAR = b"3"
    BLOCK = b"4"
    DIRECTORY = b"5"
    FIFO = b"6"
    SOCKET = b"s"  # ours alone: no standard has one


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One member. `size` is the file's length in bytes; `segments` its (offset, length) runs of data when it has holes."""

    name: str
    kind: Kind
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    link: str = ""
    xattrs: Mapping[str, bytes] = field(default_factory=dict)
    segments: Segments | None = None
    device: tuple[int, int] = (0, 0)

    @property
    def data_bytes(self) -> int:
        """Bytes of content that the archive holds for it."""
        return self.size if self.segments is None else sum(length for _, length in self.segments)


class TarWriter:
    """Appends entries to `fd` at its position, unbuffered: what `add` returned from is in the file. Does not own `fd`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.written_bytes = 0

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()

    def add(self, entry: Entry, content: int | None = None) -> None:
        """Write `entry`; `content` is the descriptor that a regular file's bytes are read from (short files are zero-filled)."""
        sparse_map = b"" if entry.segments is None else _sparse_map(entry.segments, entry.size)
        stored = 0 if entry.kind is not Kind.FILE else len(sparse_map) + entry.data_bytes
        header = _header(entry, stored) + sparse_map
        if entry.kind is not Kind.FILE or not entry.data_bytes:
            self._write(header)
            return
        if content is None:
            raise ValueError(f"{entry.name}: a file of {entry.data_bytes} bytes needs its content")
        if entry.segments is None and entry.size <= _SMALL_BYTES:
            data = os.pread(content, entry.size, 0)
            self._write(header + data.ljust(entry.size + -entry.size % BLOCK, b"\0"))
            return
        self._write(header)
        for offset, length in entry.segments if entry.segments is not None else ((0, entry.size),):
            self._copy(content, offset, length)
        self._write(bytes(-stored % BLOCK))

    def add_stored(self, entry: Entry, read: Callable[[int], bytes]) -> None:
        """Write a file whose data comes in order from `read` (at most so many bytes, never none), its holes left out."""
        sparse_map = b"" if entry.segments is None else _sparse_map(entry.segments, entry.size)
        left = entry.data_bytes
        stored = len(sparse_map) + left
        self._write(_header(entry, stored) + sparse_map)
        while left:
            data = read(min(left, len(_ZEROS)))
            self._write(data)
            left -= len(data)
        self._write(bytes(-stored % BLOCK))

    def add_bytes(self, entry: Entry, content: bytes) -> None:
        """Write a regular file whose bytes are in memory; `entry.size` must be their number."""
        if entry.size != len(content):
            raise ValueError(f"{entry.name}: {len(content)} bytes for an entry of {entry.size}")
        self._write(_header(entry, entry.size) + content + bytes(-entry.size % BLOCK))

    def close(self) -> None:
        """Write the end mark."""
        self._write(bytes(2 * BLOCK))

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            count = os.write(self._fd, view)
            self.written_bytes += count
            view = view[count:]

    def _copy(self, source: int, offset: int, length: int) -> None:
        while length:
            count = os.sendfile(self._fd, source, offset, min(length, _COPY_BYTES))
            if count == 0:
                break
            self.written_bytes += count
            offset, length = offset + count, length - count
        while length:  # the file became shorter while it was read
            count = min(length, len(_ZEROS))
            self._write(_ZEROS[:count])
            length -= count


def data_segments(fd: int, size: int) -> Segments | None:
    """The runs of data of an open file, or None when it has no hole (or its file system cannot tell)."""
    found: list[tuple[int, int]] = []
    try:
        for start, end in _runs(fd, size):
            found.append((start, end - start))
    except OSError:
        return None
    return None if found == [(0, size)] else tuple(found)


def _runs(fd: int, size: int) -> Iterator[tuple[int, int]]:
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == 6:  # ENXIO: nothing but hole up to the end
                return
            raise
        position = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if start >= size:
            return
        yield start, position


def _sparse_map(segments: Segments, size: int) -> bytes:
    # GNU tar ends every map with an empty segment at the file's length.
    runs = [*segments, (size, 0)]
    text = "".join(f"{number}\n" for number in (len(runs), *(value for run in runs for value in run)))
    return text.encode().ljust(-(-len(text) // BLOCK) * BLOCK, b"\0")


def _header(entry: Entry, stored: int) -> bytes:
    records = _pax_records(entry, stored)
    plain = _ustar(entry, stored)
    if not records:
        return plain
    body = b"".join(_pax_record(key, value) for key, value in records.items())
    name = b"PaxHeaders/" + os.fsencode(entry.name)[-80:].replace(b"/", b"_")
    head = _block(name=name, mode=0o644, uid=0, gid=0, size=len(body), mtime=0, flag=b"x", link=b"", device=(0, 0))
    return head + body.ljust(-(-len(body) // BLOCK) * BLOCK, b"\0") + plain


def _pax_records(entry: Entry, stored: int) -> dict[str, bytes]:
    records: dict[str, bytes] = {}
    name, link = os.fsencode(entry.name), os.fsencode(entry.link)
    if entry.segments is not None:
        records |= {"GNU.sparse.major": b"1", "GNU.sparse.minor": b"0", "GNU.sparse.name": name}
        records["GNU.sparse.realsize"] = b"%d" % entry.size
    elif len(name) > 100 or not name.isascii():
        records["path"] = name
    if len(link) > 100 or not link.isascii():
        records["linkpath"] = link
    if stored > _MAX_OCTAL_SIZE:
        records["size"] = b"%d" % stored
    for key, value in (("uid", entry.uid), ("gid", entry.gid)):
        if value > _MAX_OCTAL_ID:
            records[key] = b"%d" % value
    seconds, nanoseconds = divmod(entry.mtime_ns, 10**9)
    if nanoseconds or not 0 <= seconds <= _MAX_OCTAL_SIZE:
        records["mtime"] = _pax_time(entry.mtime_ns)
    for key, attribute in sorted(entry.xattrs.items()):
        records[XATTR_PREFIX + key] = attribute
    return records


def _pax_time(time_ns: int) -> bytes:
    sign, (seconds, nanoseconds) = b"-" if time_ns < 0 else b"", divmod(abs(time_ns), 10**9)
    return b"%s%d.%09d" % (sign, seconds, nanoseconds)


def _pax_record(key: str, value: bytes) -> bytes:
    rest = b" " + os.fsencode(key) + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return b"%d" % length + rest


def _ustar(entry: Entry, stored: int) -> bytes:
    name = os.fsencode(entry.name)
    if entry.segments is not None:
        name = b"GNUSparseFile.0/" + name
    seconds = entry.mtime_ns // 10**9
    return _block(
        name=name,
        mode=entry.mode & 0o7777,
        uid=entry.uid if entry.uid <= _MAX_OCTAL_ID else 0,
        gid=entry.gid if entry.gid <= _MAX_OCTAL_ID else 0,
        size=stored if stored <= _MAX_OCTAL_SIZE else 0,
        mtime=seconds if 0 <= seconds <= _MAX_OCTAL_SIZE else 0,
        flag=entry.kind.value,
        link=os.fsencode(entry.link),
        device=entry.device,
    )


def _block(
    *, name: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, flag: bytes, link: bytes, device: tuple[int, int]
) -> bytes:
    head = b"%s%07o\0%07o\0%07o\0%011o\0%011o\0" % (name[:100].ljust(100, b"\0"), mode, uid, gid, size, mtime)
    tail = b"%s%sustar\x0000%s%07o\0%07o\0" % (flag, link[:100].ljust(100, b"\0"), bytes(64), *device)
    return head + b"%06o\0 " % (sum(head) + 8 * 32 + sum(tail)) + tail.ljust(BLOCK - 156, b"\0")
