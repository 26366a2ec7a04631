"""The file system behind a container's root, as the host sees it, and how what the container changed in it is found.

    overlay, fuse-overlayfs       the upper directory has it
    podman's vfs and btrfs        the root is a copy or a snapshot of its parent layer, a directory beside it
    containerd's native           the same, of the parent snapshot, whose directory containerd names
    anything else                 nobody knows what it was made from: what has changed since the container was created

`find` looks, before the container is paused; `capture` writes the layer while it is.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smr.proto.errors import Code, SmrError
from smr.shim.mountinfo import MountEntry, entries, unescape

if TYPE_CHECKING:
    from smr.images.pack import DiffStats
    from smr.images.undo import Layers
    from smr.proto.oci import Spec
    from smr.shim.config import Config
    from smr.shim.engines.target import Target

# Between colons that no backslash stands before.
_LOWER = re.compile(r"(?:\\.|[^:\\])+")
_FUSE = "fuse-overlayfs"
# The kernel's clock for change times is behind by up to a tick; whatever is between is compared or saved once too often.
_SLACK_NS = 50_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlayMount:
    """An overlay: its upper directory, and its lower ones, highest first; `fuse` for fuse-overlayfs."""

    upper: Path
    lowers: tuple[Path, ...]
    fuse: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """A container's root at `path`. Without an `overlay`, `base` is the directory that it was made from, where that is known,

    and `since_ns` is before the first change of the container (since the epoch).
    """

    path: Path
    overlay: OverlayMount | None = None
    base: Path | None = None
    since_ns: int = 0

    @property
    def warning(self) -> str:
        """What a layer of it lacks, "" for nothing."""
        if self.overlay is not None or self.base is not None:
            return ""
        return (
            f"nobody knows what the root {self.path} was made from: files that were made or changed since the container was"
            " created are in the image, and that files were removed is not"
        )

    def capture(self, out: Path, spec: Spec) -> tuple[str, ...]:
        """Write the changes as the layer `out`, without what is mounted; what it lacks, in words. ROOTFS_FAILED, DISK_FULL."""
        from smr.images.layer import diff_overlay, diff_tree
        from smr.shim.device_rules import usable

        exclude, devices = [mount.destination for mount in spec.mounts], usable(spec)
        if self.overlay is not None:
            upper, lowers = self.overlay.upper, self.overlay.lowers
            if self.overlay.fuse:
                _write_back(self.path)
            stats = diff_overlay(upper, lowers, out, exclude=exclude, marks_in_names=self.overlay.fuse, devices=devices)
        else:
            stats = diff_tree(self.path, self.base, out, since_ns=self.since_ns, exclude=exclude, devices=devices)
        return (self.warning, *_left_out(stats))


def _write_back(mounted: Path) -> None:
    """What was written through FUSE is the kernel's until it has told the server: contents, and times at least."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(mounted, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if libc.syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise SmrError(f"{mounted} cannot be written back: {os.strerror(number)}", code=Code.ROOTFS_FAILED)
    finally:
        os.close(fd)


def _left_out(stats: DiffStats) -> Iterator[str]:
    if stats.devices_skipped:
        yield f"device nodes that the container may not use are not in the image: {stats.devices_skipped} in its root"
    if stats.names_skipped:
        yield f"files whose names begin with .wh. are not in the image, such names mark removed files: {stats.names_skipped}"


def find(target: Target, config: Config) -> Root:
    """What is behind the root of a container. Raises ROOTFS_FAILED where the engine cannot say what it must know."""
    overlay = overlay_of(target.rootfs)
    if overlay is not None:
        return Root(path=target.rootfs, overlay=overlay)
    from smr.shim.rootbase import base_of, created_ns

    return Root(path=target.rootfs, base=base_of(target), since_ns=created_ns(target, config) - _SLACK_NS)


def layers_of(root: Path) -> Layers | None:
    """The layers of a root that is the kernel's overlay, for a journal."""
    from smr.images.undo import Layers

    overlay = overlay_of(root)
    return Layers(upper=overlay.upper, lowers=overlay.lowers) if overlay is not None and not overlay.fuse else None


def overlay_of(rootfs: Path, mountinfo: str | None = None) -> OverlayMount | None:
    """The overlay mounted at `rootfs`; None when the root is none, or has no upper directory.

    Lower directories may be relative to a folder above the upper one (containers/storage mounts from there): the nearest in
    which they exist is taken. The kernel shows values as they were given, a comma, colon or backslash of a path behind a
    backslash, and all that again in mountinfo's octal escapes; `lowerdir+` (Linux 6.8, mount by fsconfig) names one as it is.
    """
    found = [entry for entry in entries(mountinfo) if entry.point == str(rootfs)]
    if not found:
        return None
    if found[-1].type == f"fuse.{_FUSE}":
        return _fuse_overlay(found[-1])
    if found[-1].type != "overlay":
        return None
    options = [(key, unescape(value)) for key, _, value in (word.partition("=") for word in found[-1].options.split(","))]
    return _overlay(options)


def _overlay(options: list[tuple[str, str]], *, fuse: bool = False) -> OverlayMount | None:
    uppers = [_plain(value) for key, value in options if key == "upperdir"]
    if not uppers:
        return None
    lowers = [_plain(part) for key, value in options if key == "lowerdir" for part in _LOWER.findall(value)]
    lowers += [value for key, value in options if key == "lowerdir+"]
    upper = Path(uppers[0])
    return OverlayMount(upper=upper, lowers=tuple(_absolute(Path(lower), upper) for lower in lowers), fuse=fuse)


def _fuse_overlay(mount: MountEntry) -> OverlayMount | None:
    """mountinfo has no directories of a FUSE mount; its server's command line has, in the order of podman or of mount(8)."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = [os.fsdecode(word) for word in (entry / "cmdline").read_bytes().split(b"\0")[:-1]]
        except OSError:
            continue
        if words and Path(words[0]).name == _FUSE and mount.point in (str(Path(word)) for word in words[1:]):
            given = [word for before, word in itertools.pairwise(words) if before == "-o"]
            given += [word.removeprefix("-o") for word in words if word.startswith("-o") and word != "-o"]
            pairs = (option.partition("=") for options in given for option in re.split(r"(?<!\\),", options))
            return _overlay([(key, value) for key, _, value in pairs], fuse=True)
    return None


def _plain(value: str) -> str:
    return re.sub(r"\\(.)", r"\1", value)


def _absolute(lower: Path, upper: Path) -> Path:
    if lower.is_absolute():
        return lower
    return next((parent / lower for parent in upper.parents if (parent / lower).is_dir()), lower)
