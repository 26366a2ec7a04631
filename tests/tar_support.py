"""Tars and checkpoint archives for the tests, hostile ones among them."""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from smr.images.tar import Entry, Kind, TarWriter

Item = tuple[Entry, bytes]
SPEC = {
    "ociVersion": "1.0.2",
    "process": {"args": ["serve"], "cwd": "/"},
    "root": {"path": "rootfs"},
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/etc/hosts", "type": "bind", "source": "/run/engine/hosts", "options": ["bind"]},
        {"destination": "/dev/shm", "type": "bind", "source": "/run/engine/shm", "options": ["rbind"]},
        {"destination": "/models", "type": "bind", "source": "/srv/models", "options": ["rbind", "ro"]},
    ],
    "annotations": {"org.test": "kept", "smr.restore": "mine:1"},
    "linux": {"cgroupsPath": "/default/c1", "namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/x"}]},
}
PODMAN_CONFIG = {
    "id": "c" * 64,
    "name": "warm",
    "lockID": 3,
    "rootfsImageID": "a" * 64,
    "rootfsImageName": "localhost/serve:1",
    "runtime": "runc",
}


def file(name: str, content: bytes = b"", **fields: object) -> Item:
    """A regular file owned by this process."""
    owner = {"uid": os.geteuid(), "gid": os.getegid()}
    return Entry(name=name, kind=Kind.FILE, size=len(content), **owner | fields), content  # type: ignore[arg-type]


def other(name: str, kind: Kind, **fields: object) -> Item:
    """Anything but a file."""
    owner = {"uid": os.geteuid(), "gid": os.getegid(), "mode": 0o755}
    return Entry(name=name, kind=kind, **owner | fields), b""  # type: ignore[arg-type]


def directory(name: str, **fields: object) -> Item:
    """A directory."""
    return other(name, Kind.DIRECTORY, **fields)


def write_tar(path: Path, items: Sequence[Item], *, end: bool = True) -> Path:
    """Write a tar of these entries, with or without its end mark."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        writer = TarWriter(fd)
        for entry, content in items:
            if entry.kind is Kind.FILE:
                writer.add_stored(entry, io.BytesIO(content).read)
            else:
                writer.add(entry)
        if end:
            writer.close()
    finally:
        os.close(fd)
    return path


def tar_bytes(scratch: Path, items: Sequence[Item]) -> bytes:
    """A tar as bytes."""
    path = write_tar(scratch / "inner.tar", items)
    try:
        return path.read_bytes()
    finally:
        path.unlink()


def criu_image(*messages: bytes) -> bytes:
    """A CRIU image file: two magic words, then messages behind their lengths."""
    head = struct.pack("<II", 0x54564319, 0x1)
    return head + b"".join(struct.pack("<I", len(message)) + message for message in messages)


def criu_files() -> dict[str, bytes]:
    """The images of a checkpoint of one process, 7, whose command is `serve`, on x86_64."""
    task = b"\x08\x01" + b"\x10\x00" + b"\x18\x00" + b"\x20\x00" + b"\x28\x00" + b"\x32\x05serve"
    core = b"\x08\x01" + b"\x1a" + bytes([len(task)]) + task
    pstree = b"\x08\x07" + b"\x10\x00" + b"\x18\x07" + b"\x20\x07" + b"\x28\x07"
    stats = b"\x0a" + bytes([6]) + b"\x08\x05" + b"\x10\xe0\x80\x04"
    return {
        "inventory.img": criu_image(b"\x08\x02"),
        "pstree.img": criu_image(pstree),
        "core-7.img": criu_image(core),
        "pages-1.img": b"page" * 2048,
        "descriptors.json": b'["/dev/null","pipe:[1]","pipe:[2]"]',
        "../stats-dump": criu_image(stats),
    }


def podman_items(
    config: Mapping[str, object] = PODMAN_CONFIG, spec: object = SPEC, *, without: Sequence[str] = (), extra: Sequence[Item] = ()
) -> list[Item]:
    """A checkpoint archive in podman's shape."""
    names = {name: content for name, content in criu_files().items() if name not in without}
    items = [
        directory("checkpoint/"),
        file("config.dump", json.dumps(config).encode()),
        file("spec.dump", json.dumps(spec).encode()),
    ]
    items += [file(name[3:] if name.startswith("../") else f"checkpoint/{name}", content) for name, content in names.items()]
    return [item for item in items if item[0].name not in without] + list(extra)
