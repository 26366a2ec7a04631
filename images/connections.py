"""The file `FILE` of a checkpoint: TCP connections as SMR saved them (smr.shim.tcp), beside CRIU's images and none of CRIU's.

    "SMRTCP" and the version as two digits, length of the JSON (32 bits, little endian), the JSON, then all queues without gaps

The JSON is a list with one object for each connection; `received` and `queued` are the lengths of its queues, in that order.
An image without TCP connections has no such file. Standard library only: every restore of such an image reads it.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from smr.images import criutar
from smr.images.image import Image
from smr.proto.checkpoint import LayerType
from smr.proto.errors import Code, SmrError
from smr.proto.oci import as_list, as_object

FILE = "smr-connections"
_VERSION = 1
_MAGIC = b"SMRTCP%02d" % _VERSION

# An end of a connection: address, port, scope id (of link-local IPv6).
End = tuple[str, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """The state of one end, in the terms of tcp_repair (tcp(7) has none of it: net/ipv4/tcp.c, criu/soccr/soccr.c).

    `in_seq` and `out_seq` are the sequence numbers behind the data of the queues, a FIN not counted. `received` is what the
    process has not read; `queued` what the other end has not acknowledged, of which the last `unsent` bytes were never sent.
    `window` is struct tcp_repair_window. `read_shut`: the process has shut down reading.
    """

    in_seq: int
    out_seq: int
    unsent: int
    mss: int
    options: int
    send_scale: int
    receive_scale: int
    timestamp: int
    window: tuple[int, ...]
    read_shut: bool = False
    received: bytes = b""
    queued: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """One socket: `fd` of the process `pid` (as the container numbers them), TCP `state` (1 established ... 11 closing).

    `inner`: the other end is in the checkpoint too, or had been closed. `stream` is None for one that was not saved.
    """

    pid: int
    fd: int
    family: int
    state: int
    local: End
    remote: End
    inner: bool
    stream: Stream | None = None


_WINDOW = 5
_NUMBERS = frozenset(f.name for kind in (Stream, Connection) for f in fields(kind) if f.type == "int")


def plain(end: End) -> tuple[str, int]:
    """An end as packets have it: IPv4 in IPv6 as IPv4, and no scope."""
    from ipaddress import IPv6Address, ip_address

    parsed = ip_address(end[0])
    return str(parsed.ipv4_mapped or IPv6Address(parsed.packed)) if isinstance(parsed, IPv6Address) else str(parsed), end[1]


def write_connections(folder: Path, connections: Iterable[Connection]) -> None:
    """Write `FILE` into a directory of CRIU images."""
    rows, queues = [], []
    for one in connections:
        row = {name: value for name, value in asdict(replace(one, stream=None)).items() if name != "stream"}
        if one.stream is not None:
            short = asdict(replace(one.stream, received=b"", queued=b""))
            row["stream"] = {**short, "received": len(one.stream.received), "queued": len(one.stream.queued)}
            queues += [one.stream.received, one.stream.queued]
        rows.append(row)
    header = json.dumps(rows, separators=(",", ":")).encode()
    (folder / FILE).write_bytes(b"".join((_MAGIC, struct.pack("<I", len(header)), header, *queues)))


def read_connections(image: Image) -> tuple[Connection, ...]:
    """Those of an image, from the layer of its small files, which need not be unpacked. Raises IMAGE_VERSION, IMAGE_CORRUPT."""
    data = b""
    for layer in image.layers_of(LayerType.CRIU):
        with layer.path.open("rb") as tar:
            for member in criutar.members(tar):
                if member.name == FILE:
                    data = os.pread(tar.fileno(), member.size_bytes, member.offset)
    return parse_connections(data)


def parse_connections(data: bytes) -> tuple[Connection, ...]:
    """The contents of such a file. Raises as `read_connections`."""
    if data[:8] != _MAGIC and data[:6] == _MAGIC[:6]:
        raise SmrError(
            f"the image's TCP connections are of version {data[6:8].decode(errors='replace')}, this SMR reads {_VERSION:02d}",
            hint="install a newer SMR on this node",
            code=Code.IMAGE_VERSION,
        )
    try:
        return _parse(data)
    except (ValueError, KeyError, TypeError, struct.error, SmrError) as error:
        raise SmrError(
            f"{FILE} of the image cannot be read: {error}", hint="checkpoint again", code=Code.IMAGE_CORRUPT
        ) from error


def _parse(data: bytes) -> tuple[Connection, ...]:
    if data[:8] != _MAGIC:
        raise ValueError("it does not begin as such a file")
    (size,) = struct.unpack_from("<I", data, 8)
    at = 12 + size
    if at > len(data):
        raise ValueError("it ends before its JSON does")
    found = []
    for item in as_list(json.loads(data[12:at]), "connections"):
        row = as_object(item, "connection")
        stream = None
        if row.get("stream"):
            kept = _known(Stream, as_object(row["stream"], "stream"))
            received, queued = int(str(kept["received"])), int(str(kept["queued"]))
            if min(received, queued) < 0 or at + received + queued > len(data):
                raise ValueError("it ends before the queues do")
            kept["received"], kept["queued"] = data[at : at + received], data[at + received : at + received + queued]
            kept["window"] = tuple(as_list(kept["window"], "window"))
            at += received + queued
            stream = Stream(**_checked(kept))  # type: ignore[arg-type]
        kept = _known(Connection, row)
        kept |= {"local": _end(row["local"]), "remote": _end(row["remote"]), "stream": stream}
        found.append(Connection(**_checked(kept)))  # type: ignore[arg-type]
    return tuple(found)


def _end(value: object) -> End:
    address, port, scope = as_list(value, "end")
    end = str(address), int(str(port)), int(str(scope))
    if end[0]:  # one that was being connected has no other end yet
        plain(end)
    if not 0 <= end[1] < 1 << 16 or not 0 <= end[2] < 1 << 32:
        raise ValueError(f"{value!r} is no end of a connection")
    return end


def _checked(values: dict[str, object]) -> dict[str, object]:
    """Every number fits into 32 bits: an image may come from anywhere, and the kernel is who reads them next."""
    window = values.get("window", (0,) * _WINDOW)
    numbers: dict[object, object] = {name: values[name] for name in _NUMBERS & values.keys()}
    numbers |= enumerate(window if isinstance(window, tuple) else ())
    wrong = [name for name, value in numbers.items() if not isinstance(value, int) or not 0 <= value < 1 << 32]
    if wrong or not isinstance(window, tuple) or len(window) != _WINDOW:
        raise ValueError(f"{wrong[0] if wrong else 'window'} is not what it should be")
    return values


def _known(kind: type[Stream] | type[Connection], row: dict[str, object]) -> dict[str, object]:
    names = {f.name for f in fields(kind)}
    return {key: value for key, value in row.items() if key in names}
