"""What CRIU's images say of the options that they need; and images that are damaged, for everything that reads one."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.message import Message

from smr.images import criu_sockets
from smr.images.criu_files import read_image_file, tasks, without_tcp_close
from smr.images.criu_needs import needs
from smr.images.pagemap import read_pagemap, read_vmas
from smr.images.socket_move import Move
from smr.proto.annotations import CRIU_OPTIONS, Annotations
from smr.proto.criu import identity_pb2, images_pb2
from smr.proto.criu_options import OPTIONS, check_option
from smr.proto.errors import Code, SmrError
from smr.shim import clocks, criu_why
from tests.unit.test_preflight import CONFIG

MAGIC = struct.pack("<II", 0x54564319, 0x56303138)
INVENTORY = struct.pack("<I", 0x58313116)


def write(path: Path, *messages: Message, magic: bytes = MAGIC) -> None:
    """One of CRIU's image files."""
    payloads = [message.SerializeToString() for message in messages]
    path.write_bytes(magic + b"".join(struct.pack("<I", len(payload)) + payload for payload in payloads))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A dump of one process that needs nothing."""
    write(tmp_path / "pstree.img", identity_pb2.PstreeEntry(pid=1, ppid=0, pgid=1, sid=1))
    write(tmp_path / "core-1.img", images_pb2.CoreEntry(tc=images_pb2.TaskCoreEntry(task_state=1, comm="serve")))
    write(tmp_path / "files.img", identity_pb2.FileEntry(type=1, id=1, reg=identity_pb2.RegFileEntry(id=1, name="app/log")))
    write(tmp_path / "inventory.img", images_pb2.InventoryEntry(), magic=INVENTORY)
    write(tmp_path / "mm-1.img", images_pb2.MmEntry())
    time = identity_pb2.Timespec
    write(
        tmp_path / "timens-0.img",
        identity_pb2.TimensEntry(monotonic=time(tv_sec=7, tv_nsec=5), boottime=time(tv_sec=9, tv_nsec=0)),
    )
    write(tmp_path / "pagemap-1.img", images_pb2.PagemapHead(pages_id=1))
    return tmp_path


def test_a_dump_that_needs_nothing(plain: Path) -> None:
    """No option without a reason."""
    found = needs(plain)
    assert (found.restore, found.dump) == ({}, {})


def test_what_was_in_the_tree(plain: Path) -> None:
    """Each option has a reason that names what needs it; a name of the container's cannot write control characters."""
    files = [
        identity_pb2.FileEntry(type=1, id=1, reg=identity_pb2.RegFileEntry(id=1, name="app/\x1b[2Jlog")),
        identity_pb2.FileEntry(type=1, id=2, reg=identity_pb2.RegFileEntry(id=2, name="app/moved")),
        identity_pb2.FileEntry(type=5, id=3, usk=identity_pb2.UnixSkEntry(id=3, uflags=1, name=b"\0journal")),
        identity_pb2.FileEntry(type=5, id=4, usk=identity_pb2.UnixSkEntry(id=4, uflags=0, name=b"/inside")),
        identity_pb2.FileEntry(type=8, id=5, ify=identity_pb2.InotifyFileEntry(id=5, wd=[b"a", b"b"])),
    ]
    write(plain / "files.img", *files)
    write(plain / "pstree.img", identity_pb2.PstreeEntry(pid=1, ppid=0, pgid=0, sid=0))
    write(plain / "filelocks.img", identity_pb2.FileLockEntry(flag=1, type=1, pid=7, fd=3))
    remap = identity_pb2.RemapFilePathEntry
    write(plain / "remap-fpath.img", remap(orig_id=1, remap_id=9, remap_type=1), remap(orig_id=2, remap_id=8, remap_type=0))
    (plain / "ghost-file-9.img").write_bytes(bytes(4096))
    write(plain / "inventory.img", identity_pb2.InventoryEntry(allow_uprobes=True), magic=INVENTORY)
    found = needs(plain)
    assert list(found.restore) == ["shell-job", "file-locks", "ext-unix-sk", "allow-uprobes"]
    assert "outside of the container" in found.restore["shell-job"]
    assert "1 lock of files, the first by process 7" in found.restore["file-locks"]
    assert "1 unix socket" in found.restore["ext-unix-sk"]
    assert "@journal" in found.restore["ext-unix-sk"]
    assert found.dump["ghost-limit"] == "1 open file that was deleted, 4 KiB in all: app/?[2Jlog"
    assert found.dump["link-remap"].endswith("app/moved")
    assert found.dump["force-irmap"] == "2 inotify watches"
    assert {*found.restore, *found.dump} <= CRIU_OPTIONS
    assert not any(OPTIONS[name].value for name in found.restore)  # an image asks for flags only


READERS: dict[str, tuple[Callable[[Path], object], ...]] = {
    "pstree.img": (needs, tasks),
    "core-1.img": (tasks,),
    "files.img": (needs, lambda folder: criu_sockets.move(folder, Move(), lambda *_: True)),
    "inventory.img": (needs, lambda folder: without_tcp_close(read_image_file(folder / "inventory.img"))),
    "timens-0.img": (clocks.of_dump,),
    "mm-1.img": (lambda folder: read_vmas(folder, 1),),
    "pagemap-1.img": (lambda folder: read_pagemap(folder / "pagemap-1.img"),),
}
ABSENT = {("files.img", needs), ("timens-0.img", clocks.of_dump)}
DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "empty": lambda _: b"",
    "a few bytes": lambda data: data[:3],
    "cut in a length": lambda data: data + b"\x01\x02",
    "cut in a message": lambda data: data + struct.pack("<I", 100) + b"short",
    "other magic": lambda data: b"\x7fELF" + data[4:],
    "not protobuf": lambda data: data + struct.pack("<I", 4) + b"\xff\xff\xff\xff",
    "a huge length": lambda data: data + b"\xff\xff\xff\xff",
    "text": lambda _: b"this is no image of CRIU's, it is a text of some length",
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("damage", [*DAMAGE, "missing"])
def test_damaged_images(plain: Path, name: str, damage: str) -> None:
    """Whatever is wrong with a file: one error that names it and has a hint, never another exception."""
    file = plain / name
    if damage == "missing":
        file.unlink()
    else:
        changed = DAMAGE[damage](file.read_bytes())
        assert changed is not None
        file.write_bytes(changed)
    for reader in READERS[name]:
        if len(file.read_bytes() if file.exists() else b"") <= 8 and reader is clocks.of_dump:
            continue  # what CRIU writes where the kernel has no time namespaces
        if damage == "missing" and (name == "inventory.img" or (name == "files.img" and reader is needs)):
            continue  # a tree may have no open files at all
        with pytest.raises(SmrError) as caught:
            reader(plain)
        assert caught.value.code is Code.IMAGE_CORRUPT
        assert name in caught.value.message
        assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("ghost-limit", ["4G", "100", "64M"], ["", "4 G", "4Gi", "-1", "٤G", "1\n"]),
        ("timeout", ["30"], ["", "30s", "999999"]),
        ("manage-cgroups", ["soft", "ignore"], ["full", "strict", "props", ""]),
        ("cpu-cap", ["none", "ins"], ["all,^fpu", "op=noxsaves"]),
        ("file-validation", ["buildid"], ["", "none"]),
        ("file-locks", [""], ["1", "true", " "]),
    ],
)
def test_values_of_options(name: str, good: list[str], bad: list[str]) -> None:
    """Each option takes its own kind of value; the hint says which."""
    for value in good:
        check_option(name, value, f"smr.criu.{name}")
    for value in bad:
        with pytest.raises(SmrError) as caught:
            check_option(name, value, f"smr.criu.{name}")
        assert caught.value.code is Code.ANNOTATION_INVALID
        assert OPTIONS[name].form in caught.value.hint


def test_clocks_of_a_dump(plain: Path, tmp_path: Path) -> None:
    """Seconds of both; where no clock would go back, or the kernel has time namespaces, any may be restored."""
    seen = clocks.of_dump(plain)
    assert seen == {"monotonic": 7 + 5e-9, "boottime": 9.0}
    clocks.check(seen, tmp_path / "none")
    clocks.check({"monotonic": 1e12}, tmp_path)
    with pytest.raises(SmrError, match="CLOCK_MONOTONIC would go back") as caught:
        clocks.check({"monotonic": 1e12}, tmp_path / "none")
    assert caught.value.code is Code.UNSUPPORTED


def test_every_option_has_a_reason() -> None:
    """The dump's own, the restore's own, those of the annotations, and those of an image that gives none."""
    why = criu_why.of_dump({"file-locks": "", "network-lock": "skip", "ghost-limit": "1G"}, {"ghost-limit": "1 file"})
    assert why["ghost-limit"] == "1 file"
    assert why["file-locks"] == criu_why.NOT_USED
    assert "connections" in why["network-lock"]
    options = dict.fromkeys(("file-locks", "leave-stopped", "tcp-close", "cpu-cap", "external"), "")
    why = criu_why.of_restore(options, CONFIG, Annotations(restore="llama", criu={"cpu-cap": "none"}), {"external": "ours"})
    assert why["cpu-cap"] == "smr.criu.cpu-cap asks for it"
    assert why["file-locks"] == "the image asks for it"
    assert why["tcp-close"].startswith("smr.tcp=close")
    assert why["external"] == "ours"
    assert all(why.values())
