"""CRIU's protobuf image files: two magic words (the inventory has one), then messages, each behind its length (32 bits, little
endian).

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
_INVENTORY_MAGIC = 0x58313116
_STATE_STOPPED = 3
_FD_INETSK = 4
_IPPROTO_TCP = 6
_UNCONNECTED = {7, 10}  # TCP_CLOSE, TCP_LISTEN
_M = TypeVar("_M", bound=Message)


def read_image_file(path: Path) -> bytes:
    """The whole file. Raises IMAGE_CORRUPT when it is not there or cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise _corrupt(path.name, error.strerror or "cannot be read") from error


def read_messages(path: Path, kind: Callable[[], _M]) -> Iterator[_M]:
    """The messages of one image file. Raises IMAGE_CORRUPT naming the file when it does not parse."""
    return parse_messages(read_image_file(path), path.name, kind)


def parse_messages(data: bytes, name: str, kind: Callable[[], _M]) -> Iterator[_M]:
    """The same for the contents of a file called `name`."""
    for payload in _payloads(data, name):
        message = kind()
        try:
            message.ParseFromString(payload)
        except DecodeError as error:
            raise _corrupt(name, str(error)) from error
        yield message


def read_message(path: Path, kind: Callable[[], _M]) -> _M:
    """The message of an image file that has one. Raises IMAGE_CORRUPT, also when it has none or several."""
    return parse_message(read_image_file(path), path.name, kind)


def parse_message(data: bytes, name: str, kind: Callable[[], _M]) -> _M:
    """The same for the contents of a file called `name`."""
    found = list(parse_messages(data, name, kind))
    if len(found) != 1:
        raise _corrupt(name, f"holds {len(found)} entries, needed one")
    return found[0]


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
        cores = list(read_messages(folder / f"core-{entry.pid}.img", images_pb2.CoreEntry))
        core = cores[0] if cores else None
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


def dumped_with_tcp_close(inventory: bytes) -> bool:
    """Whether a dump with this inventory.img can be restored only with --tcp-close."""
    return any(entry.tcp_close for entry in parse_messages(inventory, "inventory.img", images_pb2.InventoryEntry))


def has_connections(files: bytes) -> bool:
    """Whether files.img holds a TCP socket that was connected."""
    sockets = (entry.isk for entry in parse_messages(files, "files.img", images_pb2.FileEntry) if entry.type == _FD_INETSK)
    return any(socket.proto == _IPPROTO_TCP and socket.state not in _UNCONNECTED for socket in sockets)


def without_tcp_close(inventory: bytes) -> bytes:
    """The inventory of a dump that can be restored without --tcp-close; right only where `has_connections` is false."""
    entry = parse_message(inventory, "inventory.img", images_pb2.InventoryEntry)
    entry.ClearField("tcp_close")
    payload = entry.SerializeToString()
    return inventory[:4] + struct.pack("<I", len(payload)) + payload


def _payloads(data: bytes, name: str) -> Iterator[bytes]:
    magic = struct.unpack_from("<I", data)[0] if len(data) >= 8 else 0
    if magic not in {_COMMON_MAGIC, _INVENTORY_MAGIC}:
        raise _corrupt(name, "does not begin as a CRIU image")
    at = 4 if magic == _INVENTORY_MAGIC else 8
    while at < len(data):
        if at + 4 > len(data):
            raise _corrupt(name, f"ends within a length at byte {at}")
        (size,) = struct.unpack_from("<I", data, at)
        at += 4
        if at + size > len(data):
            raise _corrupt(name, f"needs {size} bytes at {at}, has {len(data) - at}")
        yield data[at : at + size]
        at += size


def _corrupt(name: str, what: str) -> SmrError:
    return SmrError(f"CRIU image {name}: {what}", hint="checkpoint again", code=Code.IMAGE_CORRUPT, file=name)
