"""`start` of a restored container: every task that ran at the checkpoint runs on, tasks that were stopped stay stopped.

Then, with the engine waiting no longer: the container's resume hook, the record, the log.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from smr.proto.errors import Code, SmrError
from smr.shim import config as settings
from smr.shim import procs
from smr.shim.config import Config
from smr.shim.events import emit
from smr.shim.files import drop_tree, write_atomic
from smr.shim.state import ContainerState, GoneError, Stage, Status, load_path


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
    _started(state)
    with contextlib.suppress(FileNotFoundError):
        state.created_marker.unlink()


def _started(state: ContainerState) -> None:
    """Keep of the record what is worth knowing of a container that runs."""
    state.record.status = Status.RESTORED
    drop_tree(state.criu_dir)
    drop_tree(state.undo_dir)
    drop_tree(state.path / "undo-tmpfs")
    state.record.undo_rootfs = False
    state.record.undo_tmpfs = state.record.undo_merged = ()
    state.save()


def write_marker(state: ContainerState) -> None:
    """Name the processes to wake, children first, with the start of the first one's life: shim/bin/smr-runtime wakes them."""
    tree = procs.tree(state.record.pid)
    pids = [process.pid for process in reversed(tree) if process.ns_pid not in state.record.stopped_pids]
    write_atomic(
        state.created_marker, f"{procs.start_ticks(state.record.pid)}\n{' '.join(map(str, pids))}\n".encode(), durable=False
    )


def finish(path: Path, config: Config, woken: tuple[float, float]) -> None:
    """The rest of a start that the sh part has made: record and log. `woken` are seconds since boot, to hundredths."""
    state = load_path(path)
    if state is None:
        return
    with state.locked():
        if state.record.status is not Status.CREATED:
            return
        began, ended = (moment - state.record.started_boottime for moment in woken)
        state.record.stages.append(Stage(name="start", start_s=round(began, 6), end_s=round(ended, 6)))
        _started(state)
    run_hook(state)
    _report(state, config)


def run_hook(state: ContainerState) -> None:
    """The resume hook, in a container that runs. Its failure cannot be undone any more: it is told in the record and the log."""
    record = state.record
    if not record.resume:
        return
    from smr.shim.quiesce import Place, parse_hook
    from smr.shim.quiesce import run_hook as run

    root = ("--root", record.root) if record.root else ()
    began, warning = time.monotonic(), []
    try:
        place = Place(pid=record.pid, container=record.id, runtime=(record.runtime, *root))
        run(parse_hook(record.resume, "resume"), place, record.resume_timeout_s)
    except SmrError as error:
        warning = [f"the container runs, its resume hook failed: {error}"]
    ended = time.monotonic()
    with contextlib.suppress(GoneError):
        # The lock reads the record again.
        with state.locked():
            state.add_stage("resume", began, ended)
            state.record.warnings += warning
            state.save()
        return
    # The container was deleted meanwhile; the log's line has it all the same.
    state.add_stage("resume", began, ended)
    state.record.warnings += warning


def main(argv: list[str]) -> None:
    """PATH BEFORE AFTER, from shim/bin/smr-runtime, in the background."""
    os.setsid()
    finish(Path(argv[0]), settings.load(), (float(argv[1]), float(argv[2])))


def report(state: ContainerState, config: Config) -> None:
    """The one canonical line of a restore, written by a process of its own: the engine need not wait for structlog."""
    if os.fork() != 0:
        return
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        run_hook(state)
        _report(state, config)
    finally:
        os._exit(0)


def _report(state: ContainerState, config: Config) -> None:
    record = state.record
    facts = {
        "container": record.id,
        "image": record.image,
        "digest": record.digest,
        "pid": record.pid,
        "pages": dict(record.pages),
        "gpus": dict(record.gpus),
        "warnings": list(record.warnings),
        "stages_s": record.stages_s(),
        "total_s": round(time.monotonic() - record.started_monotonic, 6),
        "busy_s": record.busy_s(),
    }
    emit(config, "restored", facts, record.annotations)


if __name__ == "__main__":
    main(sys.argv[1:])
