"""Memory that a program asked to be empty in a copy of itself (MADV_WIPEONFORK), emptied in a dump.

Libraries keep in such memory what must not exist twice, or a mark by which they see that it does: BoringSSL, AWS-LC and s2n draw
new seeds when their mark is gone, and the state of the vDSO's getrandom lies there (CRIU 4.2 leaves that out itself, older ones
do not). A restored process is a copy as a forked one is, so it finds the same: zeros.
The pages stay CRIU's (smr.images.eligible), and are overwritten in its pages-N.img; nothing else of the dump changes.
"""

from __future__ import annotations

import os
from pathlib import Path

from smr.images.eligible import is_wiped, read_memories, span_of
from smr.images.pagemap import PE_PRESENT
from smr.images.pagetable import PAGE_BYTES
from smr.images.spans import intersect


def wipe(folder: Path) -> int:
    """Overwrite such memory in the dump in `folder`; returns how many pages there were. Raises IMAGE_CORRUPT."""
    count = 0
    for memory in read_memories(folder):
        wiped = [span_of(vma) for vma in memory.vmas if is_wiped(vma)]
        if not wiped or not memory.pagemap.pages_path.exists():
            continue
        fd = os.open(memory.pagemap.pages_path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for entry in memory.pagemap.entries:
                if not entry.flags & PE_PRESENT:
                    continue
                for begin, end in intersect([(entry.begin, entry.end)], wiped):
                    _zero(fd, (entry.first + begin - entry.begin) * PAGE_BYTES, end - begin)
                    count += end - begin
        finally:
            os.close(fd)
    return count


def _zero(fd: int, offset: int, pages: int) -> None:
    for page in range(pages):
        os.pwrite(fd, bytes(PAGE_BYTES), offset + page * PAGE_BYTES)
