"""Tar as SMR reads it: one pass, no seek needed, every allocation bounded, nothing trusted.

Reads ustar, pax (extended attributes, GNU sparse 1.0) and GNU long names. All that is malformed, truncated or beyond `Limits`
raises ARCHIVE_INVALID or ARCHIVE_UNSAFE; names come out as they stand in the archive: `smr.images.tarsafe` judges them.
An archive without its end mark counts as truncated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NoReturn, Protocol

from smr.images.tar import BLOCK, XATTR_PREFIX, Entry, Kind, Segments
from smr.proto.errors import Code, SmrError

_COPY_BYTES = 1 << 20
_MAX_PADDING_BYTES = 64 << 20
_XATTR = XATTR_PREFIX.encode()
_IGNORED = frozenset({b"V"})  # GNU volume labels
_KINDS = {kind.value: kind for kind in Kind} | {b"\0": Kind.FILE, b"7": Kind.FILE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an archive may ask for. `bytes` counts content as stored (holes are free), `header_bytes` one extended header."""

    entries: int = 4_000_000
    bytes: int = 4 << 40
    file_bytes: int = 16 << 40
    header_bytes: int = 8 << 20
    name_bytes: int = 4096


class Stream(Protocol):
    """What a reader needs of its input: at most `size` bytes, b"" at the end."""

    def read(self, size: int, /) -> bytes: ...


Owners = tuple[Callable[[int], int], Callable[[int], int]]


class FileStream:
    """A plain file as a stream that can skip without reading. Does not own the descriptor."""

    def __init__(self, fd: int, offset: int = 0) -> None:
        self.fd = fd
        self.offset = offset
        self._size = os.fstat(fd).st_size

    def read(self, size: int, /) -> bytes:
        data = os.pread(self.fd, size, self.offset)
        self.offset += len(data)
        return data

    def skip(self, size: int) -> bool:
        """Move on; False when the file ends before."""
        self.offset += size
        return self.offset <= self._size


class TarReader:
    """Iterates over the entries of `stream`; between two steps an entry's content may be read, in part or not at all.

    `owners`, where given, make of an entry's user and group id those that it is to have here.
    """

    def __init__(
        self, stream: Stream, *, what: str = "archive", limits: Limits | None = None, owners: Owners | None = None
    ) -> None:
        self._stream = stream
        self._owners = owners
        self._what = what
        self._limits = limits or Limits()
        self._left = 0
        self._padding = 0
        self._globals: dict[bytes, bytes] = {}
        self._entries = 0
        self._bytes = 0

    def __iter__(self) -> Iterator[Entry]:
        while (entry := self._next()) is not None:
            if self._owners is not None:
                entry = replace(entry, uid=self._owners[0](entry.uid), gid=self._owners[1](entry.gid))
            yield entry
        self._drain()

    def copy(self, entry: Entry, fd: int) -> None:
        """Write the content of `entry`, the one just returned, to `fd`; holes stay holes."""
        for offset, length in entry.segments if entry.segments is not None else ((0, entry.size),):
            self._copy(fd, offset, length)
        if entry.segments is not None:
            os.ftruncate(fd, entry.size)

    def read(self, entry: Entry, limit: int) -> bytes:
        """The content of `entry`, the one just returned, when it has at most `limit` bytes; ARCHIVE_INVALID otherwise."""
        if entry.size > limit or entry.segments is not None:
            self._invalid(f"'{entry.name}' has {entry.size} bytes, at most {limit} were expected")
        self._left -= entry.size
        return self._exactly(entry.size)

    def read_some(self, size: int) -> bytes:
        """Up to `size` further bytes of the current entry as they are stored; b"" at its end."""
        data = self._exactly(min(size, self._left))
        self._left -= len(data)
        return data

    def _copy(self, fd: int, offset: int, length: int) -> None:
        self._left -= length
        if isinstance(self._stream, FileStream):
            os.lseek(fd, offset, os.SEEK_SET)
            while length:
                count = os.sendfile(fd, self._stream.fd, self._stream.offset, min(length, 1 << 30))
                if count == 0:
                    self._invalid("it is truncated")
                self._stream.offset += count
                length -= count
            return
        while length:
            data = self._some(min(length, _COPY_BYTES))
            _pwrite_all(fd, data, offset)
            offset, length = offset + len(data), length - len(data)

    def _drain(self) -> None:
        """Read a stream to its end, where its compression has a check sum; behind the end mark there is little but padding."""
        if isinstance(self._stream, FileStream):
            return
        left = _MAX_PADDING_BYTES
        while data := self._stream.read(_COPY_BYTES):
            left -= len(data)
            if left < 0:
                self._unsafe("it goes on after its end mark")

    def _next(self) -> Entry | None:
        self._skip(self._left + self._padding)
        self._left = self._padding = 0
        pax: dict[bytes, bytes] = {}
        while True:
            block = self._exactly(BLOCK)
            if not any(block):
                return None
            self._count()
            self._check_sum(block)
            flag, size = block[156:157], self._number(block[124:136])
            if flag in (b"x", b"X"):
                pax = self._parse_pax(self._extension(size))
            elif flag == b"g":
                self._globals |= self._parse_pax(self._extension(size))
            elif flag == b"L":
                pax[b"path"] = self._extension(size).rstrip(b"\0")
            elif flag == b"K":
                pax[b"linkpath"] = self._extension(size).rstrip(b"\0")
            elif flag in _IGNORED:
                self._skip(size + -size % BLOCK)
            else:
                return self._entry(block, self._globals | pax)

    def _entry(self, block: bytes, pax: dict[bytes, bytes]) -> Entry:
        flag = block[156:157]
        kind = _KINDS.get(flag)
        if kind is None:
            self._invalid(f"entry type {flag!r} is not known")
        name = pax.get(b"GNU.sparse.name") or pax.get(b"path") or _name(block)
        if kind is Kind.FILE and name.endswith(b"/"):
            kind = Kind.DIRECTORY  # how tar spelled a directory before it had a type for it
        stored = self._decimal(pax[b"size"]) if b"size" in pax else self._number(block[124:136])
        self._check_size(name, stored)
        self._left = stored if kind is Kind.FILE else 0
        self._padding = -stored % BLOCK if kind is Kind.FILE else 0
        size, segments = (stored, None) if kind is Kind.FILE else (0, None)
        if kind is Kind.FILE and any(key.startswith(b"GNU.sparse.") for key in pax):
            size, segments = self._sparse(pax, stored)
        return Entry(
            name=self._text(name),
            kind=kind,
            mode=self._number(block[100:108]) & 0o7777,
            uid=self._decimal(pax[b"uid"]) if b"uid" in pax else self._number(block[108:116]),
            gid=self._decimal(pax[b"gid"]) if b"gid" in pax else self._number(block[116:124]),
            size=size,
            mtime_ns=self._time(pax[b"mtime"]) if b"mtime" in pax else self._number(block[136:148], signed=True) * 10**9,
            link=self._text(pax.get(b"linkpath") or block[157:257].split(b"\0", 1)[0]),
            xattrs={self._text(key.removeprefix(_XATTR)): value for key, value in pax.items() if key.startswith(_XATTR)},
            segments=segments,
            device=(self._number(block[329:337]), self._number(block[337:345])) if kind in (Kind.CHAR, Kind.BLOCK) else (0, 0),
        )

    def _sparse(self, pax: dict[bytes, bytes], stored: int) -> tuple[int, Segments]:
        if (pax.get(b"GNU.sparse.major"), pax.get(b"GNU.sparse.minor")) != (b"1", b"0"):
            self._invalid("it holds a sparse file in a format other than GNU 1.0")
        size = self._decimal(pax.get(b"GNU.sparse.realsize", b""))
        numbers = self._sparse_map()
        segments = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        end = 0
        for offset, length in segments:
            if offset < end:
                self._invalid("the map of a sparse file is not in order")
            end = offset + length
        if end > size or size > self._limits.file_bytes or sum(length for _, length in segments) != self._left:
            self._invalid(f"the map of a sparse file does not fit its {size} bytes (stored {stored})")
        return size, tuple(run for run in segments if run[1])

    def _sparse_map(self) -> list[int]:
        numbers: list[int] = []
        pending = b""
        wanted = -1
        taken = 0
        while wanted < 0 or len(numbers) < wanted:
            if self._left < BLOCK or taken > self._limits.header_bytes:
                self._invalid("the map of a sparse file does not end")
            *lines, pending = (pending + self._exactly(BLOCK)).split(b"\n")
            self._left -= BLOCK
            taken += BLOCK
            for line in lines:
                if wanted < 0:
                    wanted = 2 * self._decimal(line)
                elif len(numbers) < wanted:
                    numbers.append(self._decimal(line))
        return numbers

    def _parse_pax(self, body: bytes) -> dict[bytes, bytes]:
        records: dict[bytes, bytes] = {}
        position = 0
        while position < len(body) and body[position]:
            digits = body[position : position + 20].split(b" ", 1)[0]
            length = self._decimal(digits)
            record = body[position : position + length]
            key, mark, value = record[len(digits) + 1 : -1].partition(b"=")
            if len(record) != length or not mark or not key or record[-1:] != b"\n":
                self._invalid("an extended header is malformed")
            records[key] = value
            position += length
        return records

    def _extension(self, size: int) -> bytes:
        if size > self._limits.header_bytes:
            self._unsafe(f"an extended header has {size} bytes, at most {self._limits.header_bytes} are taken")
        body = self._exactly(size + -size % BLOCK)
        return body[:size]

    def _count(self) -> None:
        self._entries += 1
        if self._entries > self._limits.entries:
            self._unsafe(f"it has more than {self._limits.entries} entries")

    def _check_size(self, name: bytes, stored: int) -> None:
        self._bytes += stored
        if self._bytes > self._limits.bytes or stored > self._limits.file_bytes:
            self._unsafe(f"it unpacks to more than {min(self._limits.bytes, self._limits.file_bytes)} bytes")
        if len(name) > self._limits.name_bytes:
            self._unsafe(f"a name has {len(name)} bytes, at most {self._limits.name_bytes} are taken")

    def _check_sum(self, block: bytes) -> None:
        if self._number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * 32:
            self._invalid("the check sum of a header is wrong")

    def _number(self, raw: bytes, *, signed: bool = False) -> int:
        digits = raw.rstrip(b"\0 ")
        if digits.isdigit() and b"8" not in digits and b"9" not in digits:  # as nearly all are
            return int(digits, 8)
        if raw[0] & 0x80:
            value = int.from_bytes(raw, "big", signed=True) if raw[0] == 0xFF else int.from_bytes(raw[1:], "big")
            if value < 0 and not signed:
                self._invalid("a number in a header is negative")
            return value
        text = raw.split(b"\0", 1)[0].strip(b" ")
        if text.strip(b"01234567"):
            self._invalid(f"{raw!r} in a header is not a number")
        return int(text or b"0", 8)

    def _decimal(self, raw: bytes) -> int:
        if not raw.isdigit() or len(raw) > 19:
            self._invalid(f"{raw[:40]!r} in an extended header is not a number")
        return int(raw)

    def _time(self, raw: bytes) -> int:
        negative, digits = raw[:1] == b"-", raw.removeprefix(b"-")
        seconds, _, fraction = digits.partition(b".")
        value = self._decimal(seconds) * 10**9 + (self._decimal(fraction[:9].ljust(9, b"0")))
        return -value if negative else value

    def _text(self, raw: bytes) -> str:
        if b"\0" in raw:
            self._invalid("a name holds a NUL byte")
        return os.fsdecode(raw)

    def _skip(self, size: int) -> None:
        if isinstance(self._stream, FileStream):
            if not self._stream.skip(size):
                self._invalid("it is truncated")
            return
        while size:
            size -= len(self._some(min(size, _COPY_BYTES)))

    def _exactly(self, size: int) -> bytes:
        data = self._some(size) if size else b""
        while len(data) < size:
            data += self._some(size - len(data))
        return data

    def _some(self, size: int) -> bytes:
        data = self._stream.read(size)
        if not data:
            self._invalid("it is truncated")
        return data

    def _invalid(self, why: str) -> NoReturn:
        raise SmrError(f"{self._what} is not a valid tar archive: {why}", code=Code.ARCHIVE_INVALID)

    def _unsafe(self, why: str) -> NoReturn:
        raise SmrError(f"{self._what} is refused: {why}", code=Code.ARCHIVE_UNSAFE)


def _name(block: bytes) -> bytes:
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pwrite_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
