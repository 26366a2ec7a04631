"""Which options of CRIU a dump needs when it is restored, and why: read from CRIU's own images, so it is what was in the tree.

At a dump these options are only leave: they cost nothing where nothing asks for them, and what a tree holds is known for certain
only when CRIU has looked. So a dump is given all of them, and its images say which were used. A restore gets those alone.

`link-remap`, `ghost-limit` and `force-irmap` matter to a dump only; they are told with their reasons all the same. TCP is not
here: what becomes of connections is the user's choice (`smr.tcp`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from smr.images.criu_files import read_message, read_messages
from smr.proto.criu import identity_pb2

_REG, _UNIXSK, _INOTIFY = 1, 5, 8  # fd_types of fdinfo.proto
_USK_EXTERN = 1
_LINKED, _GHOST = 0, 1
_SHOWN = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Option to reason: `restore` for those that a restore of the dump must have, `dump` for those that only the dump used."""

    restore: Mapping[str, str] = field(default_factory=dict)
    dump: Mapping[str, str] = field(default_factory=dict)


def needs(folder: Path) -> Needs:
    """What the dump in `folder` needs. Raises IMAGE_CORRUPT naming the file when one of CRIU's images does not parse."""
    files = tuple(read_messages(folder / "files.img", identity_pb2.FileEntry)) if (folder / "files.img").exists() else ()
    return Needs(
        restore=dict((*_session(folder), *_locks(folder), *_sockets(files), *_uprobes(folder))),
        dump=dict((*_remaps(folder, files), *_watches(files))),
    )


def _session(folder: Path) -> Iterator[tuple[str, str]]:
    """CRIU's own rule: dump_pstree in criu/pstree.c."""
    processes = list(read_messages(folder / "pstree.img", identity_pb2.PstreeEntry))
    if processes and (root := processes[0]).sid != root.pid:
        yield "shell-job", f"process {root.pid} is in session {root.sid or 'outside of the container'}, which it does not lead"


def _locks(folder: Path) -> Iterator[tuple[str, str]]:
    path = folder / "filelocks.img"
    if path.exists() and (locks := list(read_messages(path, identity_pb2.FileLockEntry))):
        yield "file-locks", f"{_count(len(locks), 'lock')} of files, the first by process {locks[0].pid}"


def _sockets(files: tuple[identity_pb2.FileEntry, ...]) -> Iterator[tuple[str, str]]:
    outside = [entry.usk for entry in files if entry.type == _UNIXSK and entry.usk.uflags & _USK_EXTERN]
    if outside:
        yield "ext-unix-sk", f"{_count(len(outside), 'unix socket')} outside of the container, such as {_name(outside[0].name)}"


def _uprobes(folder: Path) -> Iterator[tuple[str, str]]:
    if read_message(folder / "inventory.img", identity_pb2.InventoryEntry).allow_uprobes:
        yield "allow-uprobes", "memory in which the kernel has traced a function"


def _remaps(folder: Path, files: tuple[identity_pb2.FileEntry, ...]) -> Iterator[tuple[str, str]]:
    path = folder / "remap-fpath.img"
    if not path.exists():
        return
    names = {entry.id: entry.reg.name for entry in files if entry.type == _REG}
    entries = list(read_messages(path, identity_pb2.RemapFilePathEntry))
    linked = [names.get(entry.orig_id, "?") for entry in entries if entry.remap_type == _LINKED]
    if linked:
        yield "link-remap", f"{_count(len(linked), 'open file')} whose name is gone but not its last link: {_shown(linked[0])}"
    ghosts = [names.get(entry.orig_id, "") for entry in entries if entry.remap_type == _GHOST]
    if ghosts:
        size = sum(file.stat().st_size for file in folder.glob("ghost-file-*.img"))
        named = next((f": {_shown(name)}" for name in ghosts if name), "")
        yield "ghost-limit", f"{_count(len(ghosts), 'open file')} that was deleted, {size >> 10} KiB in all{named}"


def _watches(files: tuple[identity_pb2.FileEntry, ...]) -> Iterator[tuple[str, str]]:
    watches = sum(len(entry.ify.wd) for entry in files if entry.type == _INOTIFY)
    if watches:
        yield "force-irmap", _count(watches, "inotify watch", "inotify watches")


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def _name(name: bytes) -> str:
    """A unix socket's name; those of the abstract namespace begin with a zero byte, shown as ss(8) does."""
    return _shown(name.replace(b"\0", b"@").decode(errors="backslashreplace")) if name else "one without a name"


def _shown(text: str) -> str:
    """A name of the container's, short and without control characters: it is printed on a terminal."""
    plain = "".join(c if c.isprintable() else "?" for c in text)
    return plain if len(plain) <= _SHOWN else f"{plain[:_SHOWN]}..."
