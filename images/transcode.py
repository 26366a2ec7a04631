"""Another tool's tar into one of ours, entry by entry: nothing gets into the store that a restore would later refuse.

What is checked here is what `tarsafe` and `layer` ask again when they unpack: names inside, no device nodes, hard links inside.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from smr.images.compression import decompressed
from smr.images.pack import WHITEOUT
from smr.images.tar import Entry, Kind, TarWriter
from smr.images.tar_reader import Limits, TarReader
from smr.images.tarsafe import Parts, disk_errors, portable_xattrs, safe_parts, unsafe

_LIMITS = Limits(bytes=2 << 40)


def transcode_layer(source: Path | None, out: Path, *, deleted: Iterable[str] = (), whiteouts: bool) -> None:
    """Write the layer `out`: the whiteouts of `deleted` (paths in the container), then what the tar `source` holds.

    `whiteouts` says that the source is an OCI layer; else names that OCI reserves are plain files, which a layer cannot hold, and
    are left out. A deleted path under which the source has something was a directory that was removed and made again.
    """
    with disk_errors(f"writing {out.name}"), _writing(out) as writer:
        for path in deleted:
            parts = safe_parts(path.lstrip("/"))
            if parts:
                writer.add(Entry(name="/".join((*parts[:-1], WHITEOUT + parts[-1])), kind=Kind.FILE, mode=0))
        if source is not None:
            _copy(source, writer, reserved=whiteouts)


def transcode_tree(source: Path, out: Path) -> None:
    """Write `out`, the tar of a tree without whiteouts, from `source`."""
    with disk_errors(f"writing {out.name}"), _writing(out) as writer:
        _copy(source, writer, reserved=True)


class _writing:  # noqa: N801  # used as a function
    """A writer on a new file."""

    def __init__(self, out: Path) -> None:
        self._fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._writer = TarWriter(self._fd)

    def __enter__(self) -> TarWriter:
        return self._writer

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._writer.close()
        finally:
            os.close(self._fd)


def _copy(source: Path, writer: TarWriter, *, reserved: bool) -> None:
    with decompressed(source) as stream:
        reader = TarReader(stream, what=source.name, limits=_LIMITS)
        for entry in reader:
            parts = safe_parts(entry.name)
            if parts and parts[-1].startswith(WHITEOUT) and not reserved:
                continue
            ours = _checked(entry, parts)
            if ours.kind is Kind.FILE:
                writer.add_stored(ours, reader.read_some)
            else:
                writer.add(ours)


def _checked(entry: Entry, parts: Parts) -> Entry:
    if entry.kind in (Kind.CHAR, Kind.BLOCK, Kind.SOCKET):
        raise unsafe(entry.name, "it is a device node")
    if not parts and entry.kind is not Kind.DIRECTORY:
        raise unsafe(entry.name, "it would replace the root directory")
    link = "/".join(safe_parts(entry.link)) if entry.kind is Kind.HARDLINK else entry.link
    name = "/".join(parts) if parts else "."
    name += "/" if entry.kind is Kind.DIRECTORY else ""
    return replace(entry, name=name, link=link, xattrs=portable_xattrs(entry.xattrs))
