"""What killed processes and engines that forgot a container have left: records, and CRIU's directories beside the store.

A record is undone when its create never ended, and dropped when the runtime has forgotten the container.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from smr.proto.errors import SmrError
from smr.shim import procs
from smr.shim.config import Config
from smr.shim.files import drop_tree
from smr.shim.state import ContainerState, Status, all_states, drop_half_made
from smr.shim.undo import runtime_dir, undo


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """Ids of containers whose records went, the number of CRIU's directories that did, and what could not be undone, in words."""

    containers: list[str] = field(default_factory=list)
    restores: int = 0
    problems: list[str] = field(default_factory=list)


def sweep(config: Config) -> Swept:
    """Clean up. What another process works on is left alone."""
    problems: list[str] = []
    dropped = [state.record.id for state in all_states(config.run) if drop_if_gone(state, problems)]
    drop_half_made(config.run)
    return Swept(containers=dropped, restores=_drop_restores(config), problems=problems)


def drop_if_gone(state: ContainerState, problems: list[str]) -> bool:
    """Undo and drop one record if nothing stands behind it. What cannot be undone goes to `problems`, and the record stays."""
    try:
        with state.locked(wait=False):
            if not is_gone(state):
                return False
            left = undo(state) if state.record.status in {Status.RESTORING, Status.FAILED} else []
            problems += left
            if not left:
                state.remove()
            return not left
    except SmrError:
        return False  # another process works on it, or has dropped it


def is_gone(state: ContainerState) -> bool:
    """Whether the record is all that is left: of a create that was killed, or of a container that the runtime has forgotten."""
    if state.owner_alive():
        return False
    unfinished = state.record.status in {Status.RESTORING, Status.FAILED}
    return unfinished or not (state.task_alive() or runtime_dir(state).exists())


def _drop_restores(config: Config) -> int:
    """The directories are listed before the records: a create records itself before it makes its directory."""
    try:
        found = list((config.store / "restores").iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return 0
    known = {state.criu_dir.name for state in all_states(config.run)}
    # A store may serve several state directories, whose restores keep theirs open.
    unused = [folder for folder in found if folder.name not in known and not procs.holding(folder)]
    for folder in unused:
        _drop(folder)
    return len(unused)


def _drop(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        drop_tree(folder)
    else:
        folder.unlink(missing_ok=True)
