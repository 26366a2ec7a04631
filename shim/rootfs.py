"""The mount behind a container's root, as the host sees it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from smr.shim.mountinfo import entries, unescape

# Between colons that no backslash stands before.
_LOWER = re.compile(r"(?:\\.|[^:\\])+")


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlayMount:
    """An overlay: its upper directory, and its lower ones, highest first."""

    upper: Path
    lowers: tuple[Path, ...]


def overlay_of(rootfs: Path, mountinfo: str | None = None) -> OverlayMount | None:
    """The overlay mounted at `rootfs`; None when the root is none, or has no upper directory.

    Lower directories may be relative to a folder above the upper one (containers/storage mounts from there): the nearest in
    which they exist is taken. The kernel shows values as they were given, a comma, colon or backslash of a path behind a
    backslash, and all that again in mountinfo's octal escapes; `lowerdir+` (Linux 6.8, mount by fsconfig) names one as it is.
    """
    found = [entry for entry in entries(mountinfo) if entry.point == str(rootfs)]
    if not found or found[-1].type != "overlay":
        return None
    options = [(key, unescape(value)) for key, _, value in (word.partition("=") for word in found[-1].options.split(","))]
    uppers = [_plain(value) for key, value in options if key == "upperdir"]
    if not uppers:
        return None
    lowers = [_plain(part) for key, value in options if key == "lowerdir" for part in _LOWER.findall(value)]
    lowers += [value for key, value in options if key == "lowerdir+"]
    upper = Path(uppers[0])
    return OverlayMount(upper=upper, lowers=tuple(_absolute(Path(lower), upper) for lower in lowers))


def _plain(value: str) -> str:
    return re.sub(r"\\(.)", r"\1", value)


def _absolute(lower: Path, upper: Path) -> Path:
    if lower.is_absolute():
        return lower
    return next((parent / lower for parent in upper.parents if (parent / lower).is_dir()), lower)
