"""stdin, stdout and stderr of a dump: what the container was given, and files of an image that take what a restore is given.

Runtimes hand CRIU the new container's pipes in place of those that they had noted, in `descriptors.json`; all else CRIU opens by
its path. `reroute` makes such a file one that CRIU takes from its own descriptor: a regular file whose name is given to it with
--inherit-fd (inherited_fd in criu/files.c) is a duplicate of that descriptor, whatever it is, with no open, seek or check of it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from smr.images.criu_files import read_messages, write_messages
from smr.proto.checkpoint import Stdio
from smr.proto.criu import images_pb2

_REG, _PIPE = 1, 2
_NO_POSITION = (1 << 64) - 1
_NULL = "/dev/null"


def stdio_of(folder: Path) -> tuple[Stdio, ...]:
    """What the dump in `folder` has as its first process's stdio, where it is still what the runtime had given."""
    try:
        given = json.loads((folder / "descriptors.json").read_bytes())
    except (OSError, ValueError):
        return ()  # not a runtime's dump
    first = next(iter(read_messages(folder / "pstree.img", images_pb2.PstreeEntry))).pid
    ids = folder / f"ids-{first}.img"
    if not ids.exists() or not isinstance(given, list):
        return ()
    table = next(iter(read_messages(ids, images_pb2.TaskKobjIdsEntry))).files_id
    own = {entry.fd: entry.id for entry in read_messages(folder / f"fdinfo-{table}.img", images_pb2.FdinfoEntry) if entry.fd < 3}
    files = {entry.id: entry for entry in read_messages(folder / "files.img", images_pb2.FileEntry) if entry.id in own.values()}
    found = []
    for number, file in sorted(own.items()):
        kind = _kind(files[file], str(given[number]) if number < len(given) else "") if file in files else ""
        if kind:
            found.append(Stdio(fd=number, kind=kind, file=file))
    return tuple(found)


def _kind(entry: images_pb2.FileEntry, given: str) -> str:
    if entry.type == _PIPE and given == f"pipe:[{entry.pipe.pipe_id}]":
        return "pipe"
    if entry.type == _REG and entry.reg.ext:
        return "outside"
    if entry.type == _REG and entry.reg.name == given == _NULL:
        return "null"
    return ""


def name_of(fd: int) -> str:
    """The name that CRIU is told a descriptor by."""
    return f"smr-stdio-{fd}"


def reroute(folder: Path, stdio: Collection[Stdio]) -> None:
    """Have CRIU take these from its own descriptors, in all processes that share them."""
    names = {one.file: f"/{name_of(one.fd)}" for one in reversed(tuple(stdio))}
    _edit_files(folder / "files.img", names)
    _forget(folder / "descriptors.json", {one.fd for one in stdio})
    for path in sorted(folder.glob("fdinfo-*.img")):
        entries = list(read_messages(path, images_pb2.FdinfoEntry))
        changed = [entry for entry in entries if entry.id in names and entry.type != _REG]
        for entry in changed:
            entry.type = _REG
        if changed:
            write_messages(path, path.read_bytes()[:8], entries)


def _forget(path: Path, fds: Collection[int]) -> None:
    """The runtime would name them to CRIU too, which takes a descriptor once."""
    given = json.loads(path.read_bytes())
    content = json.dumps(["" if number in fds else one for number, one in enumerate(given)])
    path.unlink()  # it may be a link to the store's
    path.write_text(content)


def _edit_files(path: Path, names: dict[int, str]) -> None:
    entries = list(read_messages(path, images_pb2.FileEntry))
    for entry in entries:
        if entry.id not in names or entry.type not in {_REG, _PIPE}:
            continue
        old = entry.pipe if entry.type == _PIPE else entry.reg
        new = images_pb2.RegFileEntry(id=entry.id, flags=old.flags, pos=_NO_POSITION, fown=old.fown, name=names[entry.id])
        entry.type = _REG
        entry.ClearField("pipe")
        entry.reg.CopyFrom(new)
    write_messages(path, path.read_bytes()[:8], entries)
