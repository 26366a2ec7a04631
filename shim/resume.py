"""`start` of a restored container: every task that ran at the checkpoint runs on, tasks that were stopped stay stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import time

from smr.proto.errors import Code, SmrError
from smr.shim import procs
from smr.shim.config import Config
from smr.shim.files import drop_tree
from smr.shim.log import canonical_line
from smr.shim.state import ContainerState, Status


def resume(state: ContainerState) -> None:
    """SIGCONT to the tree, children first, so that a parent that waits for its children finds them running."""
    with state.stage("start"):
        tree = procs.tree(state.record.pid) if state.task_alive() else []
        if not tree:
            raise SmrError(
                f"the restored process {state.record.pid} of {state.record.id} ended before start",
                hint=f"CRIU's log is {state.work_dir / 'restore.log'}",
                code=Code.RESTORE_FAILED,
            )
        for process in reversed(tree):
            if process.ns_pid not in state.record.stopped_pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGCONT)
    state.record.status = Status.RESTORED
    drop_tree(state.criu_dir)
    drop_tree(state.undo_dir)
    state.record.undo_rootfs = False
    state.record.undo_tmpfs = ()
    state.save()
    with contextlib.suppress(FileNotFoundError):
        state.created_marker.unlink()


def report(state: ContainerState, config: Config) -> None:
    """The one canonical line of a restore, written by a process of its own: the engine need not wait for structlog."""
    if os.fork() != 0:
        return
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        record = state.record
        canonical_line(
            config.log,
            "restored",
            container=record.id,
            image=record.image,
            digest=record.digest,
            pid=record.pid,
            stages_s=record.stages_s(),
            total_s=round(time.monotonic() - record.started_monotonic, 6),
        )
    finally:
        os._exit(0)
