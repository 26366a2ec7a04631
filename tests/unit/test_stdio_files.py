"""Files of CRIU's images: what the first process has as stdio, how it is turned over, and what is held on mounts from outside."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import termios
from pathlib import Path

import pytest

from smr.images.criu_files import read_messages, write_messages
from smr.images.held_files import held_files, rename
from smr.images.stdio_files import reroute, stdio_of
from smr.proto.checkpoint import CheckpointConfig, HeldFile, Host, Source, Stdio
from smr.proto.criu import images_pb2 as pb
from smr.proto.oci import parse_spec
from smr.shim import stdio

MAGIC = struct.pack("<II", 0x54564319, 0x56303138)
FOWN = b"\x08\x00\x10\x00\x18\x00\x20\x00\x28\x00"
REG, PIPE = 1, 2


def regular(number: int, name: str, **more: object) -> pb.FileEntry:
    """A file that was opened by its path."""
    reg = pb.RegFileEntry(id=number, flags=os.O_RDWR, pos=5, fown=FOWN, name=name, **more)  # type: ignore[arg-type]
    return pb.FileEntry(type=REG, id=number, reg=reg)


def pipe(number: int, inode: int) -> pb.FileEntry:
    """One end of a pipe."""
    return pb.FileEntry(type=PIPE, id=number, pipe=pb.PipeEntry(id=number, pipe_id=inode, flags=os.O_WRONLY, fown=FOWN))


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    """Two processes: the first has /dev/null, a pipe and a file from outside; the second shares the pipe and holds files."""
    files = [
        regular(1, "/dev/null", mode=0o20666, mnt_id=9),
        pipe(2, 77),
        regular(3, "file[2b:1f]", ext=True, mode=0o100644),
        regular(4, "/data/in/log", mode=0o100600, size=12, mnt_id=21),
        regular(5, "/data", mode=0o40755, mnt_id=21),
        regular(6, "/data/gone", mode=0o100600, size=1, mnt_id=21),
        regular(7, "/real/x", mode=0o100600, mnt_id=22),
        regular(8, "/root-file", mode=0o100600, size=1, mnt_id=20),
    ]
    (tmp_path / "descriptors.json").write_text(json.dumps(["/dev/null", "pipe:[77]", "/srv/out"]))
    write = lambda name, *messages: write_messages(tmp_path / name, MAGIC, list(messages))  # noqa: E731
    write("files.img", *files)
    write("pstree.img", pb.PstreeEntry(pid=1, ppid=0), pb.PstreeEntry(pid=8, ppid=1))
    write("remap-fpath.img", pb.RemapFilePathEntry(orig_id=6))
    write("ids-1.img", pb.TaskKobjIdsEntry(files_id=1))
    write("ids-8.img", pb.TaskKobjIdsEntry(files_id=2))
    types = {1: REG, 2: PIPE, 3: REG}
    write("fdinfo-1.img", *(pb.FdinfoEntry(id=number, flags=0, type=kind, fd=number - 1) for number, kind in types.items()))
    write("fdinfo-2.img", pb.FdinfoEntry(id=2, flags=0, type=PIPE, fd=1), pb.FdinfoEntry(id=4, flags=0, type=REG, fd=6))
    write("fs-8.img", pb.FsEntry(cwd_id=5, root_id=8))
    write("mm-8.img", pb.MmEntry(vmas=[pb.VmaEntry(start=4096, end=8192, shmid=7, prot=1, flags=2, status=1 << 6)]))
    write("core-8.img", pb.CoreEntry(tc=pb.TaskCoreEntry(task_state=1, comm="db")))
    write(
        "mountpoints-9.img",
        pb.MntEntry(mnt_id=20, mountpoint="./"),
        pb.MntEntry(mnt_id=21, mountpoint="./data"),
        pb.MntEntry(mnt_id=22, mountpoint="./real", ext_key="/link"),
    )
    return tmp_path


def test_what_stdio_is(dump: Path) -> None:
    """Each that is what the runtime had given, by its kind."""
    assert stdio_of(dump) == (
        Stdio(fd=0, kind="null", file=1),
        Stdio(fd=1, kind="pipe", file=2),
        Stdio(fd=2, kind="outside", file=3),
    )


def test_stdio_that_the_process_has_replaced(dump: Path) -> None:
    """A process that has opened /dev/null as its output wants it to stay so; without the runtime's list nothing is known."""
    (dump / "descriptors.json").write_text(json.dumps(["pipe:[70]", "pipe:[71]"]))
    assert stdio_of(dump) == (Stdio(fd=2, kind="outside", file=3),)
    (dump / "descriptors.json").unlink()
    assert stdio_of(dump) == ()


def test_what_is_turned_over(dump: Path) -> None:
    """The files get CRIU's names of descriptors, without position, size or mode; processes that share them follow."""
    found = stdio_of(dump)
    reroute(dump, found)
    files = {entry.id: entry for entry in read_messages(dump / "files.img", pb.FileEntry)}
    for number, one in enumerate(found):
        reg = files[one.file].reg
        assert files[one.file].type == REG
        assert (reg.name, reg.pos, reg.fown) == (f"/smr-stdio-{number}", (1 << 64) - 1, FOWN)
        assert not (reg.HasField("size") or reg.HasField("mode") or reg.ext or files[one.file].HasField("pipe"))
    assert files[2].reg.flags == os.O_WRONLY
    assert files[4].reg.name == "/data/in/log"
    assert [entry.type for entry in read_messages(dump / "fdinfo-2.img", pb.FdinfoEntry)] == [REG, REG]
    assert json.loads((dump / "descriptors.json").read_text()) == ["", "", ""]


def test_what_needs_turning_over(dump: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pipes and /dev/null go into pipes and /dev/null by themselves; with a terminal nothing of it is the container's."""
    read, write = os.pipe()
    null, file = os.open(os.devnull, os.O_RDWR), os.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY)
    config = CheckpointConfig(
        created="",
        host=Host(architecture="", kernel="", criu="", runtime=""),
        source=Source(engine="", container_id=""),
        spec={},
        stdio=(Stdio(fd=0, kind="null", file=1), Stdio(fd=1, kind="pipe", file=2)),
    )
    try:
        for given, options in (
            ((null, write), {}),
            ((null, null), {}),
            ((null, file), {"inherit-fd": "fd[1]:smr-stdio-1"}),
            ((read, file), {"inherit-fd": "fd[0]:smr-stdio-0\nfd[1]:smr-stdio-1"}),
        ):
            real = {number: os.fstat(fd) for number, fd in enumerate(given)}
            with monkeypatch.context() as patch:
                patch.setattr(stdio.os, "fstat", real.__getitem__)
                patch.setattr("smr.images.stdio_files.reroute", lambda *_: None)
                assert stdio.fit(config, parse_spec({}), dump) == options
                assert stdio.fit(config, parse_spec({"process": {"terminal": True}}), dump) == {}
    finally:
        for fd in (read, write, null, file):
            os.close(fd)


def test_options_that_may_stand_twice() -> None:
    """Externals of several parts are all named; of another option the last one counts."""
    assert stdio.merged({"external": "a", "x": "1"}, {"external": "b", "x": "2"}) == {"external": "a\nb", "x": "2"}


def test_what_is_held(dump: Path) -> None:
    """Files of external mounts, by destination and path, with the first who has them; nothing that is unlinked or of the root."""
    found = held_files(dump, {"/data": "/data", "/link": "/link", "/real": "/link"})
    assert found == (
        HeldFile(mount="/data", path="", mode=0o40755, writable=True, holder="db (pid 8), working directory", file=5),
        HeldFile(
            mount="/data", path="in/log", mode=0o100600, size_bytes=12, writable=True, holder="db (pid 8), descriptor 6", file=4
        ),
        HeldFile(mount="/link", path="x", mode=0o100600, writable=True, holder="db (pid 8), mapped at 0x1000", file=7),
    )
    assert held_files(dump, {"/other": "/other"}) == ()


def test_another_name(dump: Path) -> None:
    """The end of a path is replaced, for the files that are named."""
    rename(dump, {4: ("in/log", "in/other")})
    names = {entry.id: entry.reg.name for entry in read_messages(dump / "files.img", pb.FileEntry) if entry.type == REG}
    assert (names[4], names[5]) == ("/data/in/other", "/data")


@pytest.mark.parametrize(
    ("size", "found"),
    [({"height": 40, "width": 132}, (132, 40)), ({"height": 0, "width": 0}, (80, 24)), (None, (80, 24)), ("large", (80, 24))],
)
def test_the_size_that_a_spec_has(monkeypatch: pytest.MonkeyPatch, size: object, found: tuple[int, int]) -> None:
    """The terminal gets it; without one it keeps its own."""
    ours, theirs = os.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        monkeypatch.setattr(stdio.os, "open", lambda *_: os.dup(theirs))
        stdio.size_terminal(1, parse_spec({"process": {"terminal": True, "consoleSize": size}}))
        assert tuple(os.get_terminal_size(ours)) == found
    finally:
        os.close(ours)
        os.close(theirs)
