"""Whether CRIU's images take the network namespace from outside (`extRootNetNS`, the key of runc and crun) or have one made.

A dump says so in netns-ID.img, which is there only when the namespace was external: runc dumps private ones as empty. It is
written by hand here, without protobuf, which takes longer to import than the rest of this takes.
Source: criu/net.c (dump_net_ns, read_net_ns_img), criu/include/magic.h, images/netdev.proto, images/core.proto; CRIU 4.1 to 4.3.
"""

from __future__ import annotations

import struct
from pathlib import Path

from smr.proto.errors import Code, SmrError

KEY = b"extRootNetNS"
_HEAD = struct.pack("<II", 0x54564319, 0x55933752)  # IMG_COMMON_MAGIC, NETNS_MAGIC
_EXT_KEY = 8 << 3 | 2  # netns_entry.ext_key, length-delimited
_NET_NS_ID = 6  # task_kobj_ids_entry.net_ns_id


def take_from_outside(folder: Path, pid: int) -> bool:
    """Have the first process (`pid` in its namespace) restored into the namespace that the runtime gives; True for an edit.

    Nothing is done where the images have no namespace of their own (the host's).
    """
    number = _namespace_of(folder, pid)
    if number is None:
        return False
    path = folder / f"netns-{number}.img"
    if path.exists() and KEY in path.read_bytes():
        return False
    entry = bytes((_EXT_KEY, len(KEY))) + KEY
    path.write_bytes(_HEAD + struct.pack("<I", len(entry)) + entry)
    return True


def make_inside(folder: Path, pid: int) -> bool:
    """The opposite: CRIU makes an empty namespace, as it must inside a user namespace."""
    number = _namespace_of(folder, pid)
    path = folder / f"netns-{number}.img"
    if number is None or not path.exists() or KEY not in path.read_bytes():
        return False
    path.unlink()
    return True


def _namespace_of(folder: Path, pid: int) -> int | None:
    """CRIU's number of the network namespace of a process; None where the dump has none."""
    path = folder / f"ids-{pid}.img"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    at, found = 12, None  # behind two words of magic and the length
    try:
        while at < len(data):
            tag, at = _varint(data, at)
            value, at = _varint(data, at)  # every field of this message is an integer
            if tag == _NET_NS_ID << 3:
                found = value
            elif tag & 7:
                raise IndexError
    except IndexError:
        raise SmrError(
            f"CRIU image {path.name}: ends within a field", hint="checkpoint again", code=Code.IMAGE_CORRUPT, file=path.name
        ) from None
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value, at
