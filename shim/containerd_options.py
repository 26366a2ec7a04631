"""The runtime options of a container, as containerd hands them to a shim: which OCI runtime its client asked for.

On stdin of `start` lies a google.protobuf.Any (containerd 1.6 to 2.2) or the bootstrap parameters, which hold it as an extension
(2.3); the Any holds containerd.runc.v1.Options. For every other verb the stock shim has written them into the bundle. Three
fields are read, so a few lines do for what would take protobuf 35 ms to import. Standard library only.

Source: pkg/shim/util.go, api/runtime/bootstrap/v1/bootstrap.proto, api/types/runc/options/oci.proto, as of containerd 2.3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TYPE = b"containerd.runc.v1.Options"
_ANY_TYPE, _ANY_VALUE = 1, 2
_BOOTSTRAP_EXTENSION, _EXTENSION_VALUE = 8, 1
_BINARY_NAME, _ROOT = 6, 7
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DEFAULT_ROOT = "/run/containerd/runc"


@dataclass(frozen=True, slots=True, kw_only=True)
class RuncOptions:
    """What is read of the options. `binary_name` is empty where the shim is to find runc on PATH."""

    binary_name: str = ""
    root: str = _DEFAULT_ROOT


def parse_start(data: bytes) -> RuncOptions:
    """The options on stdin of `start`; the defaults where there are none, or none that the stock shim would understand."""
    try:
        for value in _candidates(data):
            fields = dict(_fields(value))
            if fields.get(_ANY_TYPE, b"").rpartition(b"/")[2] == _TYPE:
                options = dict(_fields(fields.get(_ANY_VALUE, b"")))
                return _options(options.get(_BINARY_NAME, b"").decode(), options.get(_ROOT, b"").decode())
    except ValueError:
        pass  # the stock shim reports it
    return RuncOptions()


def read_bundle(bundle: Path) -> RuncOptions:
    """The options that the stock shim has written into a bundle."""
    try:
        document = json.loads((bundle / "options.json").read_bytes())
    except (OSError, ValueError):
        return RuncOptions()
    found = document if isinstance(document, dict) else {}
    return _options(str(found.get("binary_name") or ""), str(found.get("root") or ""))


def _options(binary_name: str, root: str) -> RuncOptions:
    return RuncOptions(binary_name=binary_name, root=root or _DEFAULT_ROOT)


def _candidates(data: bytes) -> Iterator[bytes]:
    yield data
    for number, value in _fields(data):
        if number == _BOOTSTRAP_EXTENSION:
            yield dict(_fields(value)).get(_EXTENSION_VALUE, b"")


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Fields of a protobuf message that are strings, bytes or messages. ValueError when it is no message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _BYTES:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("ends within a field")
            yield key >> 3, data[at : at + size]
            at += size
        elif kind in {_FIXED64, _FIXED32}:
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        value |= (data[at] & 0x7F) << shift
        at += 1
        if not data[at - 1] & 0x80:
            return value, at
    raise ValueError("a number without an end")
