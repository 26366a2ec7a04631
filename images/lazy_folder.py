"""What `criu restore --lazy-pages` is to load by itself: every page that a stripped folder still has.

CRIU leaves out the pages of entries that a dump marked as lazy (PE_LAZY), and expects them of the server. Ours has only those
that were moved to segments; the rest of a stripped folder is small, and is loaded before the first instruction once the mark is
gone.
"""

from __future__ import annotations

from pathlib import Path


def load_all(folder: Path) -> int:
    """Take the mark off every entry of every pagemap-PID.img in `folder`; returns from how many. Raises IMAGE_CORRUPT."""
    from smr.images.pagemap import PE_LAZY, Entry, read_pagemap, write_pagemap

    changed = 0
    for path in sorted(folder.glob("pagemap-[0-9]*.img")):
        pagemap = read_pagemap(path)
        marked = sum(1 for entry in pagemap.entries if entry.flags & PE_LAZY)
        if marked:
            plain = [Entry(entry.begin, entry.end, entry.first, entry.flags & ~PE_LAZY) for entry in pagemap.entries]
            write_pagemap(pagemap, plain)
            changed += marked
    return changed
