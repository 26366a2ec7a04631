"""CRIU's image of a UTS namespace, `utsns-N.img`: two magic numbers, the length of a message, and the message.

The message is utsns_entry: field 1 the host name, field 2 the domain name, both strings (CRIU's images/utsns.proto). It is read
and written by hand: a protobuf library takes longer to import than most stages of a restore.
"""

from __future__ import annotations

import struct
from pathlib import Path

from smr.proto.errors import Code, SmrError

_HEAD = struct.Struct("<III")
_COMMON_MAGIC, _MAGIC = 0x54564319, 0x54473203
_NAME, _DOMAIN = 0x0A, 0x12
# Linux allows names of 64 bytes, so lengths take one byte.
_LONGEST = 64


def set_hostname(folder: Path, hostname: str) -> None:
    """Have CRIU give every UTS namespace of the images in `folder` that name. Raises IMAGE_CORRUPT."""
    for file in folder.glob("utsns-*.img"):
        file.write_bytes(_replaced(file, hostname))


def _replaced(file: Path, hostname: str) -> bytes:
    data = file.read_bytes()
    name = hostname.encode()[:_LONGEST]
    try:
        common, magic, size = _HEAD.unpack_from(data)
        message = data[_HEAD.size :]
        length = message[1]
        domain = message[2 + length :]
        sound = (common, magic, size, message[0]) == (_COMMON_MAGIC, _MAGIC, len(message), _NAME) and domain[:1] == bytes(
            [_DOMAIN]
        )
    except (struct.error, IndexError):
        sound = False
    if not sound:
        raise SmrError(f"{file} is not CRIU's image of a UTS namespace", code=Code.IMAGE_CORRUPT, path=file)
    changed = bytes([_NAME, len(name)]) + name + domain
    return _HEAD.pack(common, magic, len(changed)) + changed
