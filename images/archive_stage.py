"""The files of a checkpoint archive, unpacked into a private directory before anything in them is believed.

Only regular files and directories are taken, each strictly inside; links, devices and everything else are refused. Files belong
to this process, mode 0600, with no attribute of the archive but their time. A file that would fill the disk is not begun.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from smr.images.compression import decompressed
from smr.images.files import disk_full
from smr.images.tar import Entry, Kind
from smr.images.tar_reader import Limits, TarReader
from smr.images.tarsafe import Parts, Tree, create, disk_errors, make_parents, safe_parts, through_links, unsafe
from smr.proto.errors import Code, SmrError

_LIMITS = Limits(entries=200_000, bytes=2 << 40, file_bytes=2 << 40)
_RESERVE_BYTES = 256 << 20
_MAX_DOCUMENT_BYTES = 64 << 20


def stage(archive: Path, target: Path, *, limits: Limits | None = None) -> None:
    """Unpack `archive`, whatever its compression, into the empty directory `target`.

    Raises ARCHIVE_UNSAFE, ARCHIVE_INVALID, DISK_FULL; what was unpacked by then is the caller's to remove.
    """
    with decompressed(archive) as stream, disk_errors(f"unpacking {archive.name}"), Tree(target) as tree:
        reader = TarReader(stream, what=archive.name, limits=limits or _LIMITS)
        for entry in reader:
            with through_links(entry):
                _take(tree, safe_parts(entry.name), entry, reader, target)


def read_document(path: Path) -> object:
    """A JSON file of the archive; None when there is none. ARCHIVE_INVALID when it is not JSON, or is oddly large."""
    try:
        if path.stat().st_size > _MAX_DOCUMENT_BYTES:
            raise SmrError(f"{path.name} of the archive has {path.stat().st_size} bytes", code=Code.ARCHIVE_INVALID)
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise SmrError(f"{path.name} of the archive is not JSON: {error}", code=Code.ARCHIVE_INVALID) from error


def _take(tree: Tree, parts: Parts, entry: Entry, reader: TarReader, target: Path) -> None:
    if entry.kind is Kind.DIRECTORY:
        make_parents(tree, (*parts, ""))
        return
    if parts[-2:] == ("checkpoint", "parent"):
        raise SmrError(
            "the checkpoint is incremental: it needs the pre-checkpoint it was made upon",
            hint="make it again without --with-previous",
            code=Code.UNSUPPORTED,
        )
    if entry.kind is not Kind.FILE:
        raise unsafe(entry.name, f"it is a {entry.kind.name.lower()}; a checkpoint archive holds plain files and directories")
    if not parts:
        raise unsafe(entry.name, "it has no name")
    _check_room(target, entry)
    make_parents(tree, parts)
    ours = replace(entry, mode=0o600, uid=os.geteuid(), gid=os.getegid(), xattrs={})
    try:
        create(tree, parts, ours, reader)
    except (FileExistsError, IsADirectoryError):
        raise unsafe(entry.name, "it is in the archive twice") from None


def _check_room(target: Path, entry: Entry) -> None:
    found = os.statvfs(target)
    if entry.data_bytes + _RESERVE_BYTES > found.f_bavail * found.f_frsize and entry.data_bytes > 1 << 20:
        raise disk_full(target, entry.data_bytes)
