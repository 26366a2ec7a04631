"""The machine's own root as a container's root: an overlay with `/` below and a layer in memory above.

    FOLDER/rw        tmpfs with upper/ and work/; overlayfs refuses an upper directory that lies inside its lower one
    FOLDER/merged    the overlay: what the container sees

Only the file system that is mounted at `/` is in it: other mounts show as the empty folders below them, so what is needed of
them goes in as read-only volumes (`volumes`). What the container writes is gone with the tmpfs; the machine's files stay as
they are.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from smr.proto.errors import Code, SmrError
from smr.shim.run import run


@contextlib.contextmanager
def machine_root(folder: Path) -> Iterator[Path]:
    """Mount an overlay of the machine's root under `folder` and give its path; unmounted and removed at the end."""
    writable, merged = folder / "rw", folder / "merged"
    with contextlib.ExitStack() as stack:
        for path in (folder, writable, merged):
            path.mkdir()
            stack.callback(path.rmdir)
        stack.enter_context(_mounted("smr-demo", writable, "-t", "tmpfs", "-o", "mode=700"))
        upper, work = writable / "upper", writable / "work"
        upper.mkdir(mode=0o755)
        work.mkdir(mode=0o700)
        stack.enter_context(_mounted("overlay", merged, "-t", "overlay", "-o", f"lowerdir=/,upperdir={upper},workdir={work}"))
        yield merged


@contextlib.contextmanager
def _mounted(source: str, target: Path, *options: str) -> Iterator[None]:
    run(["mount", *options, source, target], timeout_s=30, code=Code.ROOTFS_FAILED)
    try:
        yield
    finally:
        _unmount(target)


def _unmount(target: Path, patience_s: float = 5.0) -> None:
    """Unmount, waiting a little for the last process of the container to be gone; at last lazily."""
    deadline = time.monotonic() + patience_s
    while run(["umount", target], timeout_s=30, check=False).returncode != 0:
        if time.monotonic() > deadline:
            run(["umount", "--lazy", target], timeout_s=30, code=Code.ROOTFS_FAILED)
            return
        time.sleep(0.1)


def volumes(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Those of `paths` that an overlay of `/` does not show, because they lie on another mount. None lies in another of them."""
    missing = sorted({path for path in map(Path.absolute, paths) if mount_point(path) != Path("/")})
    return tuple(path for path in missing if not any(other in path.parents for other in missing))


def mount_point(path: Path) -> Path:
    """Where the file system of an existing `path` is mounted."""
    if not path.exists():
        raise SmrError(f"no such file: {path}", code=Code.USAGE, path=path)
    return next(folder for folder in (path, *path.parents) if folder.is_mount())
