"""Layers that cannot be applied: the reason is told, the container starts cold, and its root is as if nothing had been tried."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from smr.images.store import Store
from smr.images.tar import Entry, Kind, TarWriter
from smr.proto.checkpoint import LayerType
from tests.integration.command import eventually, run
from tests.integration.conftest import Machine, _started, make_warm
from tests.integration.node import Node
from tests.integration.runc import Runc

COMMAND = ("python3", "/app/workload.py", "workers")
MANY = 4000


@pytest.fixture(scope="module")
def overlays(machine: Machine, lower: Path) -> Iterator[Runc]:
    """runc on overlays, with an image to put layers into."""
    node = machine.node("refused", machine.runtime("runc"))
    instance = Runc(machine.box.base / "bundles-refused", node, machine.box, lower)
    _started.append(instance)
    make_warm(instance, "warm:1", "workers")
    yield instance
    instance.remove_all()
    _started.remove(instance)


def with_layer(node: Node, name: str, layer: Path) -> None:
    """Commit a copy of the image with another layer of the root."""
    store = Store(node.store)
    source = store.resolve("warm:1")
    with store.ingest() as ingest:
        for number, old in enumerate(source.layers):
            copy = ingest.path / str(number)
            shutil.copyfile(layer if old.kind is LayerType.ROOTFS else old.path, copy)
            ingest.add(copy, old.kind, title=old.title, annotations=old.annotations)
        ingest.commit(name, source.config)


def tar(path: Path, *entries: tuple[Entry, bytes]) -> Path:
    """A layer that changes, removes and adds files before `entries`."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    with TarWriter(fd) as writer:
        writer.add_bytes(Entry(name="etc/marker", kind=Kind.FILE, size=4), b"evil")
        writer.add(Entry(name="etc/.wh.group", kind=Kind.FILE))
        writer.add(Entry(name="usr/lib/python3.11/.wh.wsgiref", kind=Kind.FILE))
        writer.add(Entry(name="data/loop", kind=Kind.SYMLINK, link="loop"))
        writer.add(Entry(name="data/out", kind=Kind.SYMLINK, link="/../../../tmp"))
        for entry, content in entries:
            writer.add_bytes(entry, content) if content else writer.add(entry)
    os.close(fd)
    return path


HOSTILE: dict[str, tuple[str, Entry]] = {
    "climbs": ("archive_unsafe", Entry(name="../../evil", kind=Kind.FILE)),
    "through a loop": ("archive_unsafe", Entry(name="data/loop/evil", kind=Kind.FILE)),
    "a disk": ("archive_unsafe", Entry(name="data/evil", kind=Kind.BLOCK, device=(8, 0))),
}


def cold(runc: Runc, image: str, code: str, bundle: Path | None = None) -> None:
    """A container that asks for `image` starts cold with `code`, on a root that nobody has touched."""
    folder = bundle or runc.bundle("again", *COMMAND, annotations={"smr.restore": image})
    runc.create("again", folder)
    (record,) = runc.node.records().values()
    assert (record["status"], record["reason_code"]) == ("cold", code), record["reason"]
    assert code != "disk_full" or f"df {folder}/rootfs" in str(record["reason"])
    untouched(runc, folder / "rootfs")
    runc.remove("again")
    runc.node.smr("images", "rm", image)


def untouched(runc: Runc, root: Path) -> None:
    """The root has what the image has."""
    assert (root / "etc/marker").read_text() == "from the image\n"
    assert (root / "etc/group").read_bytes() == (runc.lower / "etc/group").read_bytes()
    assert sorted(os.listdir(root / "data")) == []
    modules = "usr/lib/python3.11/wsgiref"
    assert {path.name: path.stat().st_mtime_ns for path in (root / modules).iterdir()} == {
        path.name: path.stat().st_mtime_ns for path in (runc.lower / modules).iterdir()
    }


def test_hostile_layers(overlays: Runc, tmp_path: Path) -> None:
    """A name that climbs, a link loop, a device that the container may not use: refused, and all is taken back."""
    for number, (code, entry) in enumerate(HOSTILE.values()):
        with_layer(overlays.node, f"hostile:{number}", tar(tmp_path / "layer.tar", (entry, b"")))
        cold(overlays, f"hostile:{number}", code)
    assert not Path("/tmp/evil").exists()


def test_layers_that_are_no_archive(overlays: Runc, tmp_path: Path) -> None:
    """A layer that breaks off in the middle of a file, and one that is no tar at all."""
    layer = tar(tmp_path / "layer.tar", (Entry(name="data/large", kind=Kind.FILE, size=1 << 20), os.urandom(1 << 20)))
    os.truncate(layer, layer.stat().st_size - (1 << 19))
    with_layer(overlays.node, "truncated:1", layer)
    cold(overlays, "truncated:1", "archive_invalid")
    layer.write_bytes(b"\x28\xb5\x2f\xfd" + os.urandom(5000))
    with_layer(overlays.node, "garbage:1", layer)
    cold(overlays, "garbage:1", "archive_invalid")


def test_no_space_in_the_middle(overlays: Runc, tmp_path: Path) -> None:
    """The root's file system runs full half-way: the message says so, and what was written is gone."""
    runc = overlays
    files = [(Entry(name=f"data/{number}", kind=Kind.FILE, size=3), b"new") for number in range(MANY)]
    with_layer(runc.node, "full:1", tar(tmp_path / "layer.tar", *files))
    folder = runc.bundle("again", *COMMAND, annotations={"smr.restore": "full:1"})
    small = tmp_path / "small"
    small.mkdir()
    run(["umount", folder / "rootfs"])
    run(["mount", "-t", "tmpfs", "-o", f"nr_inodes={MANY // 2}", "small", small])
    try:
        (small / "upper").mkdir()
        (small / "work").mkdir()
        layers = f"lowerdir={runc.lower},upperdir={small / 'upper'},workdir={small / 'work'}"
        run(["mount", "-t", "overlay", "overlay", "-o", layers, folder / "rootfs"])
        cold(runc, "full:1", "disk_full", folder)
    finally:
        run(["umount", small])


def test_killed_in_the_middle(overlays: Runc, tmp_path: Path) -> None:
    """kill -9 while the layer is being applied: the guard takes it back, and the bundle can be used again."""
    runc = overlays
    files = [(Entry(name=f"data/{number}", kind=Kind.FILE, size=3), b"new") for number in range(MANY)]
    with_layer(runc.node, "killed:1", tar(tmp_path / "layer.tar", *files))
    folder = runc.bundle("again", *COMMAND, annotations={"smr.restore": "killed:1"})
    root = folder / "rootfs"
    argv = [*runc.smr, "create", "--bundle", str(folder), "again"]
    with runc.output(folder) as output:
        process = subprocess.Popen(argv, env=runc.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        eventually((root / "data/500").exists, what="the layer is half applied")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (root / f"data/{MANY - 1}").exists(), "it was killed in the middle"
    eventually(lambda: not (root / "data").exists() or not os.listdir(root / "data"), what="the guard has undone it")
    eventually(lambda: not runc.node.records(), what="nothing is known of it any more")
    untouched(runc, root)
    runc.node.smr("images", "rm", "killed:1")
