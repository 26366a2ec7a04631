"""CRIU's protobuf image files: two magic words, then messages, each behind its length (32 bits, little endian).

Source: criu/include/magic.h and criu/protobuf.c, versions 4.1 to 4.3. Files with raw contents (pages-*, *.tar.gz.img) have no
such form and are refused. protobuf takes 35 ms to import: only callers that need a message come here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from smr.proto.checkpoint import Task
from smr.proto.criu import images_pb2
from smr.proto.errors import Code, SmrError

_COMMON_MAGIC = 0x54564319
_STATE_STOPPED = 3
_FD_INETSK = 4
_M = TypeVar("_M", bound=Message)


def read_messages(path: Path, kind: Callable[[], _M]) -> Iterator[_M]:
    """The messages of one image file. Raises IMAGE_CORRUPT naming the file when it does not parse."""
    for payload in _payloads(path):
        message = kind()
        try:
            message.ParseFromString(payload)
        except DecodeError as error:
            raise _corrupt(path, str(error)) from error
        yield message


def write_messages(path: Path, magic: bytes, messages: list[_M]) -> None:
    """Write an image file; `magic` is the eight bytes that the original began with."""
    parts = [magic]
    for message in messages:
        payload = message.SerializeToString()
        parts += [struct.pack("<I", len(payload)), payload]
    path.write_bytes(b"".join(parts))


def tasks(folder: Path) -> tuple[Task, ...]:
    """The process tree of a dump, parents first as CRIU writes it; zombies have no core image worth a state."""
    found = []
    for entry in read_messages(folder / "pstree.img", images_pb2.PstreeEntry):
        core = next(iter(read_messages(folder / f"core-{entry.pid}.img", images_pb2.CoreEntry)), None)
        found.append(
            Task(
                pid=entry.pid,
                ppid=entry.ppid,
                threads=max(1, len(entry.threads)),
                command=core.tc.comm if core else "",
                stopped=bool(core) and core.tc.task_state == _STATE_STOPPED if core else False,
            )
        )
    return tuple(found)


def replace_addresses(folder: Path, mapping: dict[str, str]) -> int:
    """Give sockets of `files.img` that are bound to an old address the new one; returns how many were changed."""
    import ipaddress

    table = {_words(ipaddress.ip_address(old)): _words(ipaddress.ip_address(new)) for old, new in mapping.items()}
    path = folder / "files.img"
    magic = path.read_bytes()[:8]
    entries = list(read_messages(path, images_pb2.FileEntry))
    changed = 0
    for entry in entries:
        new = table.get(tuple(entry.isk.src_addr)) if entry.type == _FD_INETSK else None
        if new is not None:
            entry.isk.src_addr[:] = new
            changed += 1
    if changed:
        write_messages(path, magic, entries)
    return changed


def _words(address: object) -> tuple[int, ...]:
    """An address as CRIU keeps it: 32-bit words as they lie in memory."""
    packed = address.packed  # type: ignore[attr-defined]  # IPv4Address or IPv6Address
    return struct.unpack(f"={len(packed) // 4}I", packed)


def _payloads(path: Path) -> Iterator[bytes]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _corrupt(path, error.strerror or "cannot be read") from error
    if len(data) < 8 or struct.unpack_from("<I", data)[0] != _COMMON_MAGIC:
        raise _corrupt(path, "does not begin as a CRIU image")
    at = 8
    while at < len(data):
        if at + 4 > len(data):
            raise _corrupt(path, f"ends within a length at byte {at}")
        (size,) = struct.unpack_from("<I", data, at)
        at += 4
        if at + size > len(data):
            raise _corrupt(path, f"needs {size} bytes at {at}, has {len(data) - at}")
        yield data[at : at + size]
        at += size


def _corrupt(path: Path, what: str) -> SmrError:
    return SmrError(f"CRIU image {path.name}: {what}", hint="checkpoint again", code=Code.IMAGE_CORRUPT, file=path)
