"""The mount behind a container's root, as the host sees it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from smr.shim.mountinfo import entries, unescape


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlayMount:
    """An overlay: its upper directory, and its lower ones, highest first."""

    upper: Path
    lowers: tuple[Path, ...]


def overlay_of(rootfs: Path, mountinfo: str | None = None) -> OverlayMount | None:
    """The overlay mounted at `rootfs`; None when the root is none, or has no upper directory.

    Lower directories may be relative to a folder above the upper one (containers/storage mounts from there): the nearest in
    which they exist is taken.
    """
    found = [entry for entry in entries(mountinfo) if entry.point == str(rootfs)]
    if not found or found[-1].type != "overlay":
        return None
    pairs = (word.partition("=") for word in re.split(r"(?<!\\),", found[-1].options))
    options = {key: value for key, _, value in pairs}
    if not options.get("upperdir"):
        return None
    upper = Path(unescape(options["upperdir"]))
    lowers = [unescape(part) for part in re.split(r"(?<!\\):", options.get("lowerdir", "")) if part]
    return OverlayMount(upper=upper, lowers=tuple(_absolute(Path(lower), upper) for lower in lowers))


def _absolute(lower: Path, upper: Path) -> Path:
    if lower.is_absolute():
        return lower
    return next((parent / lower for parent in upper.parents if (parent / lower).is_dir()), lower)
