"""The runtime options that containerd hands to a shim, in each of the forms it has had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.struct_pb2 import Struct
from hypothesis import given
from hypothesis import strategies as st

from smr.shim.containerd_options import RuncOptions, parse_start, read_bundle


def field(number: int, value: bytes | int) -> bytes:
    """One protobuf field: bytes, or a varint under 128."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    size = len(value)
    length = bytes([size]) if size < 128 else bytes([size & 0x7F | 0x80, size >> 7])
    return bytes([number << 3 | 2]) + length + value


def options(name: str = "/usr/bin/runc", root: str = "/run/other") -> bytes:
    """containerd.runc.v1.Options with a flag, a shim cgroup, the two that are read, and SystemdCgroup after them."""
    return field(1, 1) + field(3, b"/cgroup") + field(6, name.encode()) + field(7, root.encode()) + field(9, 1)


def any_of(value: bytes, kind: str = "containerd.runc.v1.Options") -> bytes:
    """A google.protobuf.Any, made by protobuf itself."""
    return Any(type_url=kind, value=value).SerializeToString()


FOUND = RuncOptions(binary_name="/usr/bin/runc", root="/run/other")


@pytest.mark.parametrize("kind", ["containerd.runc.v1.Options", "type.googleapis.com/containerd.runc.v1.Options"])
def test_any_of_containerd_1_6_to_2_2(kind: str) -> None:
    """The Any is all that is on stdin."""
    assert parse_start(any_of(options(), kind)) == FOUND


def test_bootstrap_parameters_of_containerd_2_3() -> None:
    """The Any is one of the extensions, among other fields."""
    other = field(8, field(1, any_of(b"x", "containerd.other.v1.Config")))
    ours = field(8, field(1, any_of(options())))
    head = field(1, b"c1") + field(2, b"k8s.io") + field(3, 1) + field(4, b"v2.3.0") + field(7, b"/usr/bin/containerd")
    assert parse_start(head + other + ours + field(9, b"/run/containerd/s")) == FOUND


def test_long_values() -> None:
    """Lengths of more than one byte."""
    name = "/" + "x" * 300 + "/runc"
    assert parse_start(any_of(options(name))).binary_name == name


@pytest.mark.parametrize(
    "data",
    [
        b"",
        any_of(b""),
        any_of(options(), "runtimeoptions.v1.Options"),
        Struct(fields={"binary_name": {"string_value": "x"}}).SerializeToString(),  # type: ignore[dict-item]
        any_of(options())[:-5],
        any_of(b"\x32\x7fshort"),
        any_of(field(6, b"\xff\xfe")),
        b"\xff" * 40,
        b"\x0b\x0c",
    ],
)
def test_nothing_that_is_known_gives_the_defaults(data: bytes) -> None:
    """No options, another message, cut short, no message at all: the stock shim judges."""
    assert parse_start(data) == RuncOptions(binary_name="", root="/run/containerd/runc")


@given(st.binary(max_size=100))
def test_any_bytes_end(data: bytes) -> None:
    """Whatever is on stdin, the container's start goes on."""
    assert parse_start(data).root
    assert parse_start(any_of(data)).root


def test_options_in_the_bundle(tmp_path: Path) -> None:
    """As the stock shim writes them for its other verbs."""
    (tmp_path / "options.json").write_text(json.dumps({"binary_name": "crun", "root": "", "systemd_cgroup": True}))
    assert read_bundle(tmp_path) == RuncOptions(binary_name="crun", root="/run/containerd/runc")


@pytest.mark.parametrize("text", [None, "", "[]", "null", "{}", '{"binary_name": null}'])
def test_bundle_without_options(tmp_path: Path, text: str | None) -> None:
    """The defaults."""
    if text is not None:
        (tmp_path / "options.json").write_text(text)
    assert read_bundle(tmp_path) == RuncOptions()
