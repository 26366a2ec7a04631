"""Takes back what a create has done, from the record alone: by the process in charge, by its guard, or by a later call.

The order is the reverse of a restore: processes, mounts, the runtime's own state, cgroups, files, spec, CRIU's directory.
Mounts must go before the runtime is asked to delete: while CRIU works, runc binds the container's root to criu-root in its
state directory, and `runc delete` removes that directory recursively, through the bind (seen with 1.1.5 and 1.3.6).
Each step is safe to repeat. A step that fails warns and never hides the first error (the caller's).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from smr.proto.errors import SmrError
from smr.shim import cgroups, mountinfo, procs
from smr.shim.files import remove_tree
from smr.shim.run import run
from smr.shim.state import ContainerState

_MNT_DETACH = 2


def undo(state: ContainerState) -> list[str]:
    """Take everything back but the record itself; returns what could not be taken back, in words."""
    problems: list[str] = []
    steps: tuple[tuple[str, Callable[[ContainerState], None]], ...] = (
        ("processes", _kill),
        ("mounts", _unmount),
        ("runtime state", _runtime_delete),
        ("cgroups", _remove_cgroups),
        ("restored.json", _remove_told),
        ("root filesystem", _undo_rootfs),
        ("shared memory", _undo_tmpfs),
        ("spec", _undo_spec),
        ("hooks", _undo_hooks),
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
    """The runtime and CRIU carry the name of our configuration file in their environment; the tree is in the cgroup.

    The prefetch has a file of the record among its arguments, a server of pages some of the work directory.
    """
    path, since = cgroups.path_of(state.record.cgroups_path, state.record.id), state.record.started_boottime
    mark = f"CRIU_CONFIG_FILE={state.work_dir / 'criu.conf'}"
    left = procs.kill_all(
        lambda: [*procs.with_environment(mark), *procs.holding(state.criu_dir, state.work_dir, state.path / "cancel")]
    )
    left += procs.kill_all(lambda: [pid for pid in cgroups.members(path) if procs.started(pid) >= since])
    if left:
        raise SmrError(f"processes {left} do not end after SIGKILL")


def _runtime_delete(state: ContainerState) -> None:
    folder = runtime_dir(state)
    if not folder.exists() or not state.record.runtime:
        return
    if any(point.startswith(f"{folder}/") for point in mountinfo.points()):
        raise SmrError(f"{folder} is not deleted: something is still mounted in it")
    root = ["--root", state.record.root] if state.record.root else []
    done = run([state.record.runtime, *root, "delete", "--force", state.record.id], timeout_s=30, check=False)
    if done.returncode == 0:
        state.record.undo_hooks = False  # the runtime has run those of poststop
    _remove_runtime_dir(folder)


def _unmount(state: ContainerState) -> None:
    """runc binds the root below its state directory, and the spec's binds into the root, while CRIU works."""
    folder = runtime_dir(state)
    before = set(state.record.mounts_before)
    rootfs = state.record.rootfs
    for point in reversed(mountinfo.points()):
        # CRIU mounts the cgroup hierarchies below its work directory while it restores.
        in_runtime = point.startswith((f"{folder}/", f"{state.path}/")) or f"{point}/".startswith(f"{_crun_root(state)}/")
        in_root = bool(rootfs) and point.startswith(f"{rootfs}/") and point not in before
        if in_runtime or in_root:
            unmount(Path(point))
    with contextlib.suppress(OSError):
        _crun_root(state).rmdir()
    _remove_criu_roots(state)


def _crun_root(state: ContainerState) -> Path:
    """crun binds the container's root here while CRIU works, and refuses a folder of that name that it has not made."""
    return Path(state.record.bundle) / "criu-root"


def _remove_runtime_dir(folder: Path) -> None:
    """Drop what a killed runtime left of its state. Never recursively: the container's root is bound into a folder here."""
    with contextlib.suppress(FileNotFoundError):
        for entry in folder.iterdir():
            entry.rmdir() if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        folder.rmdir()


def _remove_criu_roots(state: ContainerState) -> None:
    """CRIU mounts a tmpfs on /tmp/.criu.mntns.XXXXXX; where / is a shared mount, as systemd makes it, that reaches the host's.

    Ours to remove are the names in this restore's log; and, for one that was killed before it wrote its name there, those that
    were made since it began, while no CRIU runs that they could belong to.
    """
    names: set[str] = set()
    with contextlib.suppress(FileNotFoundError):
        text = (state.work_dir / "restore.log").read_text(errors="replace")
        names |= set(re.findall(r"/tmp/\.criu\.mntns\.\w{6}", text))
    if not procs.named("criu"):
        began = datetime.fromisoformat(state.record.started).timestamp() if state.record.started else float("inf")
        names |= {str(path) for path in Path("/tmp").glob(".criu.mntns.*") if path.lstat().st_mtime >= began - 1}
    for name in names:
        with contextlib.suppress(OSError):
            unmount(Path(name))
            Path(name).rmdir()


def _remove_cgroups(state: ContainerState) -> None:
    cgroups.remove(cgroups.path_of(state.record.cgroups_path, state.record.id))


def _remove_told(state: ContainerState) -> None:
    if state.record.undo_told:
        from smr.shim.restored import remove_restored

        remove_restored(Path(state.record.rootfs))


def _undo_rootfs(state: ContainerState) -> None:
    if not state.record.undo_rootfs:
        return
    from smr.images.layer import undo_from

    undo_from(state.undo_dir, Path(state.record.rootfs))
    state.record.undo_rootfs = False
    state.save()


def _undo_tmpfs(state: ContainerState) -> None:
    """They were empty before, or the restore had not touched them; others have a journal."""
    for folder in state.record.undo_tmpfs:
        remove_tree(Path(folder), keep_root=True)
    if state.record.undo_merged:
        from smr.images.layer import undo_from

        for number, merged in enumerate(state.record.undo_merged):
            undo_from(state.merged_dir(number), Path(merged))
        state.record.undo_merged = ()
        state.save()


def _undo_spec(state: ContainerState) -> None:
    if state.record.undo_spec and state.spec_backup.exists():
        shutil.copyfile(state.spec_backup, Path(state.record.bundle) / "config.json")


def _undo_hooks(state: ContainerState) -> None:
    """The network that hooks have connected. What their counterparts say is theirs: a cold start runs the hooks again."""
    if not state.record.undo_hooks:
        return
    from smr.proto.oci import load_spec
    from smr.shim.oci_hooks import run_after

    problems = run_after(state, load_spec(Path(state.record.bundle)).document)
    state.record.undo_hooks = False
    state.record.warnings += problems
    state.save()


def _drop_images(state: ContainerState) -> None:
    if state.record.store:
        remove_tree(state.criu_dir)
    state.created_marker.unlink(missing_ok=True)


def unmount(path: Path) -> None:
    """Detach a mount; one that is gone already is no error."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), _MNT_DETACH) != 0:
        number = ctypes.get_errno()
        if number not in (2, 22):
            raise OSError(number, os.strerror(number), str(path))
