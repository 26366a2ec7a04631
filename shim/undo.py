"""Takes back what a create has done, from the record alone: by the process in charge, by its guard, or by a later call.

The order is the reverse of a restore: processes, the runtime's own state, mounts, cgroups, files, spec, CRIU's directory.
Each step is safe to repeat. A step that fails warns and never hides the first error (the caller's).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from smr.proto.errors import SmrError
from smr.shim import cgroups, mountinfo, procs
from smr.shim.run import run
from smr.shim.state import ContainerState

_MNT_DETACH = 2


def undo(state: ContainerState) -> list[str]:
    """Take everything back but the record itself; returns what could not be taken back, in words."""
    problems: list[str] = []
    steps: tuple[tuple[str, Callable[[ContainerState], None]], ...] = (
        ("processes", _kill),
        ("runtime state", _runtime_delete),
        ("mounts", _unmount),
        ("cgroups", _remove_cgroups),
        ("root filesystem", _undo_rootfs),
        ("shared memory", _undo_tmpfs),
        ("tmpfs", _undo_tmpfs),
        ("spec", _undo_spec),
        ("images", _drop_images),
    )
    for name, step in steps:
        try:
            step(state)
        except (SmrError, OSError) as error:
            problems.append(f"undoing {name} of {state.record.id}: {error}")
    return problems


def runtime_dir(state: ContainerState) -> Path:
    """Where the real runtime keeps the container's state."""
    default = "/run/crun" if "crun" in Path(state.record.runtime).name else "/run/runc"
    return Path(state.record.root or default) / state.record.id


def _kill(state: ContainerState) -> None:
    """CRIU and the runtime hold files of our directory; the restored tree is in the container's cgroup."""
    path, since = cgroups.path_of(state.record.cgroups_path, state.record.id), state.record.started_boottime
    left = procs.kill_all(lambda: [pid for pid in procs.holding(state.path, state.criu_dir) if not _is_ours(pid)])
    left += procs.kill_all(lambda: [pid for pid in cgroups.members(path) if procs.started(pid) >= since])
    if left:
        raise SmrError(f"processes {left} do not end after SIGKILL")


def _is_ours(pid: int) -> bool:
    """Our own processes hold the lock file of the record; they must not kill each other."""
    with contextlib.suppress(OSError):
        return b"smr.shim" in (Path("/proc") / str(pid) / "cmdline").read_bytes()
    return False


def _runtime_delete(state: ContainerState) -> None:
    folder = runtime_dir(state)
    if not folder.exists() or not state.record.runtime:
        return
    root = ["--root", state.record.root] if state.record.root else []
    run([state.record.runtime, *root, "delete", "--force", state.record.id], timeout_s=30, check=False)


def _unmount(state: ContainerState) -> None:
    """runc binds the root below its state directory, and the spec's binds into the root, while CRIU works."""
    folder = runtime_dir(state)
    before = set(state.record.mounts_before)
    rootfs = state.record.rootfs
    for point in reversed(mountinfo.points()):
        # CRIU mounts the cgroup hierarchies below its work directory while it restores.
        in_runtime = point.startswith((f"{folder}/", f"{state.path}/"))
        in_root = bool(rootfs) and point.startswith(f"{rootfs}/") and point not in before
        if in_runtime or in_root:
            unmount(Path(point))
    _remove_criu_roots(state)
    # Never through a mount that is still there: only what is empty of mounts is removed.
    if folder.exists() and not any(point.startswith(f"{folder}/") for point in mountinfo.points()):
        shutil.rmtree(folder, ignore_errors=True)


def _remove_criu_roots(state: ContainerState) -> None:
    """CRIU makes /tmp/.criu.mntns.XXXXXX for its mounts. Only the names in this restore's log are ours to remove."""
    with contextlib.suppress(FileNotFoundError):
        text = (state.work_dir / "restore.log").read_text(errors="replace")
        for name in set(re.findall(r"/tmp/\.criu\.mntns\.\w{6}", text)):
            with contextlib.suppress(OSError):
                Path(name).rmdir()


def _remove_cgroups(state: ContainerState) -> None:
    cgroups.remove(cgroups.path_of(state.record.cgroups_path, state.record.id))


def _undo_rootfs(state: ContainerState) -> None:
    if not state.record.undo_rootfs:
        return
    from smr.images.layer import undo_from

    undo_from(state.undo_dir, Path(state.record.rootfs))
    state.record.undo_rootfs = False
    state.save()


def _undo_tmpfs(state: ContainerState) -> None:
    """They were empty before, or the restore had not touched them."""
    for folder in state.record.undo_tmpfs:
        for entry in Path(folder).iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _undo_tmpfs(state: ContainerState) -> None:
    """They were empty: a restore refuses others."""
    for folder in state.record.undo_tmpfs:
        for entry in os.scandir(folder):
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else Path(entry.path).unlink()


def _undo_spec(state: ContainerState) -> None:
    if state.record.undo_spec and state.spec_backup.exists():
        shutil.copyfile(state.spec_backup, Path(state.record.bundle) / "config.json")


def _drop_images(state: ContainerState) -> None:
    if state.record.store:
        shutil.rmtree(state.criu_dir, ignore_errors=True)
    state.created_marker.unlink(missing_ok=True)


def unmount(path: Path) -> None:
    """Detach a mount; one that is gone already is no error."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), _MNT_DETACH) != 0:
        number = ctypes.get_errno()
        if number not in (2, 22):
            raise OSError(number, os.strerror(number), str(path))
