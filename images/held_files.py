"""Files that the processes of a dump have open or mapped on mounts from outside: they are not in the image, and CRIU wants them.

CRIU opens each by its path and compares type and permissions, and of a regular file the size (open_path in criu/files-reg.c),
unless it was open for appending alone. What is unlinked travels in the image, and is left out here.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import Message

from smr.images.criu_files import read_messages, write_messages
from smr.proto.checkpoint import HeldFile
from smr.proto.criu import images_pb2

_REG = 1
_FILE_MAPPINGS = (1 << 6) | (1 << 7)  # VMA_FILE_PRIVATE, VMA_FILE_SHARED of criu/include/image.h
_WRITE = 0x3  # O_WRONLY, O_RDWR
# A config is read at every restore: a process with more open files than this is not checked whole.
_MOST = 4096
_M = TypeVar("_M", bound=Message)


def held_files(folder: Path, destinations: Mapping[str, str]) -> tuple[HeldFile, ...]:
    """What is held on the external mounts of the dump in `folder`, by mount and path. Raises IMAGE_CORRUPT.

    `destinations` maps the paths of mounts, without symbolic links, to what they are called in the spec.
    """
    mounts = _external(folder, destinations)
    if not mounts:
        return ()
    gone = {entry.orig_id for entry in _messages(folder / "remap-fpath.img", images_pb2.RemapFilePathEntry)}
    regular = {
        entry.id: entry.reg
        for entry in read_messages(folder / "files.img", images_pb2.FileEntry)
        if entry.type == _REG and entry.reg.mnt_id in mounts and entry.id not in gone
    }
    holders = _holders(folder, regular) if regular else {}
    found = [_held(file, *mounts[file.mnt_id], holders.get(number, "")) for number, file in regular.items()]
    return tuple(sorted(found, key=lambda one: (one.mount, one.path)))[:_MOST]


def _held(file: images_pb2.RegFileEntry, destination: str, point: str, holder: str) -> HeldFile:
    path = posixpath.relpath(_absolute(file.name), point)
    return HeldFile(
        mount=destination,
        path="" if path == "." else path,
        mode=file.mode,
        size_bytes=file.size if file.HasField("size") else -1,
        writable=bool(file.flags & _WRITE),
        holder=holder,
        file=file.id,
    )


def rename(folder: Path, names: Mapping[int, tuple[str, str]]) -> None:
    """Give files of the dump in `folder`, by their ids, another end of their path: (old, new)."""
    path = folder / "files.img"
    entries = list(read_messages(path, images_pb2.FileEntry))
    for entry in entries:
        if entry.type == _REG and entry.id in names:
            old, new = names[entry.id]
            entry.reg.name = entry.reg.name.removesuffix(old) + new
    write_messages(path, path.read_bytes()[:8], entries)


def _external(folder: Path, destinations: Mapping[str, str]) -> dict[int, tuple[str, str]]:
    """The mount's number to its destination, as the spec has it and as it is."""
    found = {}
    for file in sorted(folder.glob("mountpoints-*.img")):
        for entry in read_messages(file, images_pb2.MntEntry):
            point = _absolute(entry.mountpoint)
            name = next((destinations[one] for one in (point, entry.ext_key) if one in destinations), None)
            if name is not None:
                found[entry.mnt_id] = (name, point)
    return found


def _absolute(path: str) -> str:
    return posixpath.normpath("/" + path.removeprefix(".").lstrip("/"))


def _holders(folder: Path, wanted: Mapping[int, object]) -> dict[int, str]:
    """Who holds a file, by its id: the first process that does, in words."""
    found: dict[int, str] = {}
    for task in read_messages(folder / "pstree.img", images_pb2.PstreeEntry):
        new: dict[int, str] = {}
        for number, how in _uses(folder, task.pid):
            if number in wanted and number not in found:
                new.setdefault(number, how)
        command = _command(folder, task.pid) if new else ""
        found |= {number: f"{command} (pid {task.pid}), {how}" for number, how in new.items()}
    return found


def _uses(folder: Path, pid: int) -> Iterator[tuple[int, str]]:
    for ids in _messages(folder / f"ids-{pid}.img", images_pb2.TaskKobjIdsEntry):
        for entry in _messages(folder / f"fdinfo-{ids.files_id}.img", images_pb2.FdinfoEntry):
            yield entry.id, f"descriptor {entry.fd}"
    for place in _messages(folder / f"fs-{pid}.img", images_pb2.FsEntry):
        yield place.cwd_id, "working directory"
        yield place.root_id, "root directory"
    for memory in _messages(folder / f"mm-{pid}.img", images_pb2.MmEntry):
        yield memory.exe_file_id, "program"
        yield from ((vma.shmid, f"mapped at {vma.start:#x}") for vma in memory.vmas if vma.status & _FILE_MAPPINGS)


def _command(folder: Path, pid: int) -> str:
    return next((core.tc.comm for core in _messages(folder / f"core-{pid}.img", images_pb2.CoreEntry)), "")


def _messages(path: Path, kind: Callable[[], _M]) -> Iterator[_M]:
    """Of a file that need not be there."""
    return read_messages(path, kind) if path.exists() else iter(())
