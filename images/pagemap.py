"""CRIU's memory images of one process: pagemap-PID.img, the pages-N.img that it names, mm-PID.img.

A pagemap is a head with the number of the pages file, then entries in ascending order; the pages of those that are present lie
in that file one after the other. Counts are in 64 bits since CRIU 4.2, beside a field of 32 bits that older ones read. Addresses
and lengths here are in pages of 4096 bytes. Facts: images/pagemap.proto, criu/pagemap.c and criu/page-xfer.c, 4.1 to 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from smr.images.criu_files import parse_message, parse_messages, read_image_file, read_message, write_messages
from smr.images.pagetable import PAGE_BYTES
from smr.proto.criu import images_pb2
from smr.proto.errors import Code, SmrError

PE_PARENT, PE_LAZY, PE_PRESENT = 1, 2, 4


@dataclass(frozen=True, slots=True)
class Entry:
    """Pages [begin, end) of a process; when they are present, the first is page `first` of the pages file."""

    begin: int
    end: int
    first: int
    flags: int

    @property
    def present(self) -> bool:
        """Whether the pages lie in the pages file, and not in a parent dump's."""
        return bool(self.flags & PE_PRESENT)

    @property
    def left_out(self) -> bool:
        """Whether a lazy dump has left the pages in the process; `first` says nothing then."""
        return self.flags & (PE_PRESENT | PE_LAZY) == PE_LAZY


@dataclass(frozen=True, slots=True, kw_only=True)
class Pagemap:
    """A pagemap that was read. `wide`: its counts are in 64 bits too."""

    path: Path
    magic: bytes
    pages_id: int
    entries: Sequence[Entry]
    wide: bool

    @property
    def pages_path(self) -> Path:
        """The file of the pages."""
        return self.path.parent / f"pages-{self.pages_id}.img"


def read_pagemap(path: Path) -> Pagemap:
    """Read one; its pages file is as long as it says. Raises IMAGE_CORRUPT."""
    data = read_image_file(path)
    split = 12 + int.from_bytes(data[8:12], "little")
    head = parse_message(data[:split], path.name, images_pb2.PagemapHead)
    entries, first, wide = [], 0, False
    for message in parse_messages(data[:8] + data[split:], path.name, images_pb2.PagemapEntry):
        wide = message.HasField("nr_pages")
        count = message.nr_pages if wide else message.compat_nr_pages
        flags = message.flags if message.HasField("flags") else (PE_PARENT if message.in_parent else PE_PRESENT)
        begin = message.vaddr // PAGE_BYTES
        entries.append(Entry(begin, begin + count, first, flags))
        first += count if flags & PE_PRESENT else 0
    pagemap = Pagemap(path=path, magic=data[:8], pages_id=head.pages_id, entries=entries, wide=wide)
    _check(pagemap, first)
    return pagemap


def write_pagemap(pagemap: Pagemap, entries: Sequence[Entry]) -> None:
    """Replace the entries of a pagemap's file; where they lie in the pages file follows from their order."""
    messages = []
    for entry in entries:
        count = entry.end - entry.begin
        message = images_pb2.PagemapEntry(vaddr=entry.begin * PAGE_BYTES, compat_nr_pages=count & 0xFFFFFFFF, flags=entry.flags)
        if pagemap.wide:
            message.nr_pages = count
        if entry.flags & PE_PARENT:
            message.in_parent = True
        messages.append(message)
    write_messages(pagemap.path, pagemap.magic, [images_pb2.PagemapHead(pages_id=pagemap.pages_id), *messages])


def read_vmas(folder: Path, pid: int) -> tuple[bytes, images_pb2.MmEntry]:
    """mm-PID.img: its first eight bytes, for `write_messages`, and its one message. Raises IMAGE_CORRUPT."""
    path = folder / f"mm-{pid}.img"
    message = read_message(path, images_pb2.MmEntry)
    return path.read_bytes()[:8], message


def _check(pagemap: Pagemap, needed: int) -> None:
    path = pagemap.pages_path
    have = path.stat().st_size // PAGE_BYTES if path.exists() else 0
    if needed > have:
        raise _corrupt(pagemap, f"names {needed} pages, {path.name} has {have}")
    if any(before.end > after.begin for before, after in pairwise(pagemap.entries)):
        raise _corrupt(pagemap, "names a page twice, or is not in order")


def _corrupt(pagemap: Pagemap, what: str) -> SmrError:
    return SmrError(f"CRIU image {pagemap.path.name}: {what}", hint="checkpoint again", code=Code.IMAGE_CORRUPT)
