"""Open files whose name is gone while another link of theirs is not: the link by which CRIU finds them again.

CRIU makes a link of its own beside the lost name ("link_remap.N"), writes that to the image, and removes it when a dump has left
the container running. A restore needs it, so it is made again while the container's files are read, from the process's open file;
it is in the layer then, and in the container no longer. Not so on volumes: what lies there is not the image's, and such a file
cannot be restored.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from smr.shim import procs

_REG, _LINKED = 1, 0
_DELETED = " (deleted)"


@contextlib.contextmanager
def relinked(folder: Path, pid: int) -> Iterator[tuple[str, ...]]:
    """While in it, CRIU's links of the dump in `folder` are there, below the root of the frozen process `pid`; yields them."""
    made: list[Path] = []
    try:
        if (folder / "remap-fpath.img").exists():
            for name, link in _wanted(folder):
                made += _link(pid, name, Path(f"/proc/{pid}/root{link}"))
        yield tuple(str(path) for path in made)
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.unlink()


def _wanted(folder: Path) -> Iterator[tuple[str, str]]:
    """Lost name and CRIU's link, as the container sees them."""
    from smr.images.criu_files import read_messages
    from smr.proto.criu import identity_pb2

    names = {
        entry.id: entry.reg.name for entry in read_messages(folder / "files.img", identity_pb2.FileEntry) if entry.type == _REG
    }
    for remap in read_messages(folder / "remap-fpath.img", identity_pb2.RemapFilePathEntry):
        if remap.remap_type == _LINKED and remap.orig_id in names and remap.remap_id in names:
            yield f"/{names[remap.orig_id].lstrip('/')}", f"/{names[remap.remap_id].lstrip('/')}"


def _link(pid: int, name: str, link: Path) -> Iterator[Path]:
    files = (file for process in procs.tree(pid) for file in _open_files(process.pid))
    found = next((file for file in files if _target(file) == name + _DELETED), None)
    with contextlib.suppress(OSError):
        folder = os.open(link.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if found is not None:
                # A directory's descriptor makes Python call linkat, which alone follows a link of /proc.
                os.link(found, link.name, dst_dir_fd=folder, follow_symlinks=True)
                yield link
        finally:
            os.close(folder)


def _target(file: str) -> str:
    try:
        return os.readlink(file)  # noqa: PTH115  # text, and no path
    except OSError:
        return ""


def _open_files(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return [entry.path for entry in os.scandir(f"/proc/{pid}/fd")]
    return []
