"""Segments that wait in memory until there is time to write them.

Who writes more to files than the kernel wants to have dirty is slowed down to the disk, and a container that is checkpointed
would wait for that. Segments of a `cutting.Job` with `staged` are made in memory of this process; `land` copies them to where
they belong when nobody waits any more, hashes them on the way, and gives the memory back as it goes.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from smr.images.cutting import Segment, Split, thread_count
from smr.images.files import writing

_COPY_BYTES = 2 << 20


def dirty_room(vmstat: str) -> int:
    """How many bytes more may be written before the kernel slows writers down; `vmstat`: /proc/vmstat.

    mm/page-writeback.c: who writes is free below the middle of both thresholds.
    """
    values = {name: int(value) for name, _, value in (line.partition(" ") for line in vmstat.splitlines())}
    limit = (values["nr_dirty_threshold"] + values["nr_dirty_background_threshold"]) // 2
    used = values["nr_dirty"] + values["nr_writeback"]
    return max(0, limit - used) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """Segments in memory, by the path that they are for."""

    files: Mapping[Path, mmap.mmap]

    def land(self, split: Split) -> Split:
        """Write them; the same split, with digests. Once. Raises DISK_FULL."""
        waiting = [segment for segment in split.segments if segment.path in self.files]
        if not waiting:
            return split
        with (
            writing(waiting[0].path.parent, split.stored_bytes),
            ThreadPoolExecutor(thread_count(None), thread_name_prefix="smr-land") as pool,
        ):
            digests = dict(zip((segment.path for segment in waiting), pool.map(self._land, waiting), strict=True))
        return replace(split, segments=[replace(one, digest=digests.get(one.path, one.digest)) for one in split.segments])

    def _land(self, segment: Segment) -> str:
        digest, memory = hashlib.sha256(), self.files[segment.path]
        source = memoryview(memory)
        with segment.path.open("xb", buffering=0) as target:
            segment.path.chmod(0o600)
            for at in range(0, segment.size_bytes, _COPY_BYTES):
                view = source[at : min(at + _COPY_BYTES, segment.size_bytes)]
                digest.update(view)
                while view:
                    view = view[target.write(view) :]
                memory.madvise(mmap.MADV_DONTNEED, at, min(_COPY_BYTES, len(memory) - at))
        return f"sha256:{digest.hexdigest()}"
