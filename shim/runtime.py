"""smr-runtime, the part behind the sh fast path: calls that concern a restored container, or one that asks to be.

Every other call, and every call this module does not change, ends in an exec of the real runtime with its arguments
untouched. Errors reach the engine as runc's do: in --log, in --log-format, on stderr, with exit status 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from smr.proto.annotations import RESTORE, Annotations, Fallback, wanted
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec, as_object, load_spec
from smr.proto.pod import CONTAINER, NAMED_PREFIX
from smr.shim import config as settings
from smr.shim import log, rootless
from smr.shim.asked import asked
from smr.shim.cold import begin_capture, begin_record, captured_first, start_cold
from smr.shim.config import Config
from smr.shim.events import emit, emit_failure
from smr.shim.files import write_atomic
from smr.shim.oci_args import RuntimeCall, parse_call
from smr.shim.pods import is_meant
from smr.shim.real_runtime import real_runtime
from smr.shim.state import ContainerState, GoneError, Record, Status, find

# An id is a folder's name: not "." and not "..".
_ID = re.compile(r"(?!\.\.?$)[\w+.-]+", re.ASCII)
_UNFINISHED = {Status.RESTORING, Status.FAILED}
_FATAL = {"TERM", "INT", "QUIT", "HUP", "SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "15", "2", "3", "1"}


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status of the runtime call, if it returns."""
    call = parse_call(sys.argv[1:] if argv is None else argv)
    try:
        return dispatch(call, settings.load())
    except SmrError as error:
        log.runtime_failure(call.log, call.log_format, error)
        return 1
    except Exception as error:  # noqa: BLE001  # the outermost edge: an engine must see a sentence, not a traceback
        log.runtime_failure(call.log, call.log_format, SmrError(f"internal error in {call.verb}: {error!r}"))
        return 1


def dispatch(call: RuntimeCall, config: Config) -> int:
    """Act on one call. A record that another process drops meanwhile leaves the call to the real runtime."""
    verbs: dict[str, Callable[[RuntimeCall, Config], int]] = {
        "create": create,
        "run": run_container,
        "start": start,
        "state": show_state,
        "kill": kill,
        "delete": delete,
        "checkpoint": engine_checkpoint,
        "restore": engine_restore,
    }
    act = verbs.get(call.verb)
    if act is None or (call.verb not in {"checkpoint", "restore"} and not _ID.fullmatch(call.id)):
        exec_real(call, config)
    try:
        return act(call, config)
    except GoneError:
        exec_real(call, config)


def exec_real(call: RuntimeCall, config: Config, env: dict[str, str] | None = None) -> NoReturn:
    """Become the real runtime."""
    path = real_runtime(config)
    try:
        os.execve(path, [path, *call.argv], {**os.environ, **(env or {})})
    except OSError as error:
        raise SmrError(f"cannot run {path}: {error.strerror}", code=Code.RUNTIME_MISSING) from error


def create(call: RuntimeCall, config: Config) -> int:
    """Restore into a bundle, or start it cold when that is what its annotation wants for a failure."""
    spec = load_spec(call.bundle)
    if not wanted(spec.annotations):
        exec_real(call, config)
    annotations = _asked(call, config, spec)
    if annotations is None or not is_meant(annotations, spec, config):
        begin_capture(call, config, spec)
        exec_real(call, config)
    error = try_restore(call, spec, annotations, config, then_exit=True)
    if error is None:
        return 0
    if annotations.fallback is Fallback.FAIL and not captured_first(spec, error):
        emit_failure(config, "restore_failed", call.id, spec.annotations, error, annotations.restore)
        raise error
    start_cold(call, config, annotations, error)
    begin_capture(call, config, spec, annotations.restore, error)
    # Not as a child: the engine's signals, descriptors and kill -9 are the real runtime's to get.
    exec_real(call, config)


def _asked(call: RuntimeCall, config: Config, spec: Spec) -> Annotations | None:
    """What the annotations ask for; a wrong one is told, and raised, whatever they say of a fallback."""
    try:
        found = asked(spec)
        if any(key.startswith(NAMED_PREFIX) or key == CONTAINER for key in spec.annotations):
            from smr.shim import podnames

            podnames.note(spec, call.bundle, config)
        if found is None or ":" in found.restore:
            return found
        from smr.shim.capture_key import resolved

        return resolved(found, spec, call.bundle, call.id, config)
    except SmrError as error:
        emit_failure(config, "restore_failed", call.id, spec.annotations, error, spec.annotations.get(RESTORE, ""))
        raise


def try_restore(
    call: RuntimeCall, spec: Spec, annotations: Annotations, config: Config, *, then_exit: bool = False
) -> SmrError | None:
    """Restore; on failure everything is undone and the error returned.

    `then_exit` ends the process after a success while the guard still watches: an engine that sees this process killed takes
    the create for failed, so then there must be no container.
    """
    try:
        rootless.check()
    except SmrError as error:
        return error
    from smr.shim.guard import Guard
    from smr.shim.restore import mounts_below, restore

    rootfs = str(spec.rootfs_path(call.bundle).resolve())
    record = Record(
        id=call.id,
        root=call.root,
        bundle=str(call.bundle),
        image=annotations.restore,
        runtime=real_runtime(config),
        store=str(config.store),
        rootfs=rootfs,
        cgroups_path=spec.cgroups_path,
        annotations=dict(spec.annotations),
        mounts_before=mounts_below(rootfs),
    )
    state = begin_record(config, record)
    with state.locked(), Guard(lambda: _guard_undo(state.path, config)) as guard:
        try:
            restore(call, spec, annotations, config, state)
        except SmrError as error:
            return _failed(state, config, error)
        except BaseException as error:  # whatever it was, an interrupt too, nothing may be left behind
            failure = _failed(state, config, SmrError(f"internal error while restoring {annotations.restore}: {error!r}"))
            if isinstance(error, Exception):
                return failure
            raise
        if then_exit:
            guard.exit(0)
    return None


def _failed(state: ContainerState, config: Config, error: SmrError) -> SmrError:
    """Take back what was done. Raises when that cannot be: what is left must not start cold on a half-restored root."""
    from smr.shim.undo import undo

    problems = undo(state)
    if not problems:
        state.remove()
        return error
    state.record.status, state.record.reason, state.record.reason_code = Status.FAILED, str(error), error.code.value
    with contextlib.suppress(OSError):
        state.save()
    emit_failure(config, "restore_failed", state.record.id, state.record.annotations, error, state.record.image)
    raise SmrError(
        f"{error.message}; it cannot start cold either: {'; '.join(problems)}",
        hint="'smr gc' tries again to clean up",
        code=error.code,
        container=state.record.id,
    )


def _guard_undo(path: Path, config: Config) -> None:
    """In the guard, after the process in charge was killed. It re-reads the record: its own copy is from the beginning."""
    from smr.shim.state import load_path
    from smr.shim.undo import undo

    state = load_path(path)
    if state is None:
        return
    with state.locked():
        problems = undo(state)
        if not problems:
            state.remove()
    reason = f"process {state.record.owner_pid} was killed"
    facts = {"container": state.record.id, "image": state.record.image, "reason": reason, "problems": problems}
    emit(config, "restore_killed", facts, state.record.annotations)


def start(call: RuntimeCall, config: Config) -> int:
    """Let a restored tree run."""
    from smr.shim.resume import report, resume

    state = find(config.run, call.root, call.id)
    if state is None:
        exec_real(call, config)
    with state.locked():
        if _is_another(call, config, state):
            state.remove()
            exec_real(call, config)
        if state.record.status is not Status.CREATED:
            exec_real(call, config)
        resume(state)
    report(state, config)
    return 0


def _is_another(call: RuntimeCall, config: Config, state: ContainerState) -> bool:
    """Whether the runtime's container is not the record's, but one of the same id after a delete that went past us."""
    if state.task_alive():
        return False
    found = subprocess.run([real_runtime(config), *call.global_args, "state", call.id], capture_output=True, check=False)
    with contextlib.suppress(ValueError, SmrError):
        return as_object(json.loads(found.stdout), "state").get("pid") not in {0, None, state.record.pid}
    return False


def show_state(call: RuntimeCall, config: Config) -> int:
    """The real runtime calls a restored tree running; until start it is created."""
    result = subprocess.run([real_runtime(config), *call.argv], stdout=subprocess.PIPE, check=False)
    output = result.stdout
    state = find(config.run, call.root, call.id)
    with contextlib.suppress(ValueError, SmrError):
        document = as_object(json.loads(output), "state")
        stopped = state is not None and state.waits_for_start() and document.get("pid") == state.record.pid
        if stopped and document.get("status") == "running":
            output = json.dumps({**document, "status": "created"}, indent=2).encode()
    sys.stdout.buffer.write(output)
    sys.stdout.flush()
    return result.returncode


def kill(call: RuntimeCall, config: Config) -> int:
    """A created container has run nothing that could handle a signal: one that asks it to end, ends it."""
    asked = call.rest[0] if call.rest else "TERM"
    state = find(config.run, call.root, call.id)
    if asked.upper() not in _FATAL or state is None:
        exec_real(call, config)
    options = [f"--{name}" for name, _ in call.options]
    words = [*call.global_args, "kill", *options, call.id, "KILL"]
    # A start that is under way holds the lock: after it the container handles its signals itself.
    with state.locked():
        if not state.waits_for_start() or not state.task_alive():
            exec_real(call, config)
        return subprocess.run([real_runtime(config), *words], check=False).returncode


def delete(call: RuntimeCall, config: Config) -> int:
    """Delete, and drop what SMR keeps; a create that was killed is undone first."""
    from smr.shim.sweep import is_gone
    from smr.shim.undo import undo

    state = find(config.run, call.root, call.id)
    if state is None:
        exec_real(call, config)
    with state.locked():
        problems = undo(state) if state.record.status in _UNFINISHED else []
        for problem in problems:
            print(f"smr: warning: {problem}", file=sys.stderr)  # noqa: T201
        status = subprocess.run([real_runtime(config), *call.argv], check=False).returncode
        if not problems and (status == 0 or is_gone(state)):
            state.remove()
    return status


def run_container(call: RuntimeCall, config: Config) -> int:
    """`run` of a restored container: create, start, and, unless detached, wait for its end and delete it."""
    spec = load_spec(call.bundle)
    detached = call.option("detach", "d") is not None
    if wanted(spec.annotations) and spec.terminal and not call.option("console-socket"):
        raise SmrError(
            "run with a terminal needs --console-socket for a restored container",
            hint="use create with --console-socket, then start",
            code=Code.UNSUPPORTED,
        )
    if not wanted(spec.annotations):
        exec_real(call, config)
    if not detached:
        _become_subreaper()
    annotations = _asked(call, config, spec)
    error = try_restore(call, spec, annotations, config) if annotations else None
    if annotations and error is not None:
        if annotations.fallback is Fallback.FAIL:
            emit_failure(config, "restore_failed", call.id, spec.annotations, error, annotations.restore)
            raise error
        start_cold(call, config, annotations, error)
        exec_real(call, config)
    state = find(config.run, call.root, call.id)
    assert state is not None
    pid = state.record.pid
    start(call, config)
    return 0 if detached else _wait(call, config, pid)


def _wait(call: RuntimeCall, config: Config, pid: int) -> int:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda received, _: _forward(pid, received))
    _, status = os.waitpid(pid, 0)
    real = [real_runtime(config), *call.global_args, "delete", "--force", call.id]
    subprocess.run(real, check=False)
    if (state := find(config.run, call.root, call.id)) is not None:
        state.remove()
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _forward(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _become_subreaper() -> None:
    import ctypes

    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def engine_checkpoint(call: RuntimeCall, config: Config) -> int:
    """The engine's own checkpoint verb: the real runtime with SMR's CRIU and the options a dump needs."""
    if call.option("help", "h") is not None:
        exec_real(call, config)
    from smr.shim import criu
    from smr.shim.dump import engine_options

    tool = criu.find(config)
    options = engine_options()
    name = "engine-checkpoint-locked.conf" if "network-lock" in options else "engine-checkpoint.conf"
    exec_real(call, config, tool.environment(_engine_options(config, name, options)))


def engine_restore(call: RuntimeCall, config: Config) -> int:
    """The engine's own restore verb: the real runtime with SMR's CRIU, and the option that CRIU wants if the dump had it."""
    if call.option("help", "h") is not None:
        exec_real(call, config)
    from smr.images.criu_files import dumped_with_tcp_close
    from smr.shim import criu

    tool = criu.find(config)
    inventory = Path(call.option("image-path") or "checkpoint") / "inventory.img"
    if inventory.exists() and dumped_with_tcp_close(inventory.read_bytes()):
        exec_real(call, config, tool.environment(_engine_options(config, "engine-restore.conf", {"tcp-close": ""})))
    exec_real(call, config, {"PATH": tool.environment(Path("/"))["PATH"]})


def _engine_options(config: Config, name: str, options: Mapping[str, str]) -> Path:
    """A CRIU configuration file that stays: this process becomes the runtime, so nobody could remove it afterwards."""
    config.run.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = config.run / name
    lines = "".join(f"{option} {value}".rstrip() + "\n" for option, value in options.items())
    write_atomic(file, lines.encode(), durable=False)
    return file


if __name__ == "__main__":
    sys.exit(main())
