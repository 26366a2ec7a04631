"""Records whose container is gone: undone when their create never ended, dropped when the runtime has forgotten them."""

from __future__ import annotations

from smr.shim import procs
from smr.shim.config import Config
from smr.shim.state import ContainerState, Status, all_states
from smr.shim.undo import runtime_dir, undo


def sweep(config: Config) -> list[str]:
    """Clean up; returns the ids of containers whose records were dropped."""
    dropped = []
    for state in all_states(config.run):
        if procs.alive(state.record.owner_pid) and state.record.status is Status.RESTORING:
            continue
        with state.locked():
            if _is_gone(state):
                undo(state) if state.record.status is Status.RESTORING else None
                state.remove()
                dropped.append(state.record.id)
    return dropped


def _is_gone(state: ContainerState) -> bool:
    if state.record.status is Status.RESTORING:
        return True
    return not procs.alive(state.record.pid) and not runtime_dir(state).exists()
