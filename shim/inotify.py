"""Paths of inotify watches, for CRIU: it finds a watched inode by file handle, and an overlay cannot be opened by handle.

CRIU is told to look inodes up by path (force-irmap), and where. A watch shows as "inotify wd:.. ino:HEX sdev:HEX" in
/proc/PID/fdinfo, which numbers devices as the kernel does (20 bits for the minor). Only the root file system of the container is
searched: on others handles work. Standard library only.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from smr.shim import procs

_MARK = re.compile(r"^inotify wd:\S+ ino:([0-9a-f]+) sdev:([0-9a-f]+) ", re.MULTILINE)


def dump_options(pid: int, proc: Path = procs.PROC) -> dict[str, str]:
    """CRIU's options for the watches in the tree of `pid`; nothing when there is none. Several values are lines of one."""
    root = proc / str(pid) / "root"
    try:
        device = root.stat().st_dev
        inodes = {inode for inode, where in watches((process.pid for process in procs.tree(pid)), proc) if where == device}
        paths = sorted(find(root, device, inodes)) if inodes else []
    except OSError:
        return {}
    return {"force-irmap": "", "irmap-scan-path": "\n".join(paths)} if paths else {}


def watches(pids: Iterable[int], proc: Path = procs.PROC) -> Iterator[tuple[int, int]]:
    """Inode and device of every inotify watch of these processes."""
    for pid in pids:
        try:
            files = list((proc / str(pid) / "fdinfo").iterdir())
        except OSError:
            continue
        for file in files:
            try:
                text = file.read_text()
            except OSError:
                continue
            for inode, device in _MARK.findall(text):
                number = int(device, 16)
                yield int(inode, 16), os.makedev(number >> 20, number & 0xFFFFF)


def find(root: Path, device: int, inodes: set[int]) -> Iterator[str]:
    """Paths below `root`, as seen from it, of inodes on `device`; breadth first, and no further than until all are found."""
    missing = set(inodes)
    if (top := root.stat().st_ino) in missing:
        missing.discard(top)
        yield "/"
    todo = deque([""])
    while todo and missing:
        folder = todo.popleft()
        try:
            entries = list(os.scandir(f"{root}{folder}/"))
        except OSError:
            continue
        for entry in entries:
            try:
                facts = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            path = f"{folder}/{entry.name}"
            if facts.st_ino in missing and "\n" not in path:
                missing.discard(facts.st_ino)
                yield path
            if facts.st_dev == device and entry.is_dir(follow_symlinks=False):
                todo.append(path)
