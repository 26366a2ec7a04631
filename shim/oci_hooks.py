"""The OCI hooks of a container's spec that SMR runs itself, because the network must be there before CRIU restores a socket.

runc runs `prestart` and `createRuntime` in the middle of CRIU's restore, when addresses can no longer be edited, and crun runs
no hook on restore. So those hooks are run before, with a process that holds the container's network namespace as the `pid` of
the state: engines without a network of their own connect containers in these hooks (nerdctl and older dockers by
/proc/PID/ns/net). What the holder lacks is the container's mounts, so hooks that are there for these are the runtime's as ever:

    by name         NVIDIA's, and other well-known ones (`_OF_CONTAINER`)
    by what it did  a hook after which the mounts of the holder's mount namespace differ, is run again by the runtime: what it has
                    mounted was in a copy, and goes with the holder

A create that is undone runs the `poststop` hooks, which take back what the others did; where the runtime's own delete came that
far, they run a second time (CNI's DEL may be repeated by its specification).

    state.path/hook     the state that a hook gets, its standard input: by that file a hook that outlives us is found
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from smr.proto.errors import Code, SmrError
from smr.proto.oci import as_list, as_object
from smr.shim import procs
from smr.shim.run import tail
from smr.shim.state import ContainerState

BEFORE = ("prestart", "createRuntime")
_AFTER = "poststop"
_OURS = "smr-hook"
# Of the container's mounts or of its first process, never of its network.
_OF_CONTAINER = ("nvidia-", "oci-nvidia", "oci-seccomp-bpf-hook", "oci-systemd-hook", "oci-umount", "oci-ftrace", _OURS)
# How long a hook whose caller was killed may still take before what it did is taken back.
_LAST_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """One hook of a spec. `timeout_s` 0: none. `environment` is all it gets."""

    stage: str
    path: str
    args: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 0.0
    raw: Mapping[str, object] = field(default_factory=dict)

    @property
    def of_container(self) -> bool:
        """Whether the hook is known to be about the container's mounts or processes."""
        return any(PurePath(word).name.startswith(_OF_CONTAINER) for word in (self.path, *self.args))


def hooks(document: Mapping[str, object], *stages: str) -> list[Hook]:
    """The hooks of some stages of a spec, in the order in which a runtime runs them. Raises SPEC_INVALID."""
    table = as_object(document.get("hooks"), "hooks")
    return [
        _parse(stage, as_object(entry, f"hooks.{stage}[]"))
        for stage in stages
        for entry in as_list(table.get(stage), f"hooks.{stage}")
    ]


def _parse(stage: str, entry: Mapping[str, object]) -> Hook:
    pairs = (str(word).partition("=") for word in as_list(entry.get("env"), "hooks[].env"))
    timeout = entry.get("timeout")
    return Hook(
        stage=stage,
        path=str(entry.get("path", "")),
        args=tuple(str(word) for word in as_list(entry.get("args"), "hooks[].args")),
        environment={name: value for name, _, value in pairs},
        timeout_s=float(timeout) if isinstance(timeout, int | float) else 0.0,
        raw=entry,
    )


def run_before(state: ContainerState, wanted: Sequence[Hook], document: Mapping[str, object], pid: int) -> list[Hook]:
    """Run hooks with `pid`, the holder of the namespace; returns those of them that the runtime must run all the same.

    Raises HOOK_FAILED for the first that fails, as a runtime does.
    """
    state.record.undo_hooks = True
    state.save()
    told = _state_of(state, document, "creating", pid)
    again = []
    mounts = _mounts(pid)
    for hook in wanted:
        run_hook(state, hook, told)
        now = _mounts(pid)
        if now != mounts:
            again.append(hook)
        mounts = now
    return again


def run_after(state: ContainerState, document: Mapping[str, object]) -> list[str]:
    """Take back what `run_before` did: the hooks of `poststop`. A failure does not keep the next from running; in words."""
    deadline = time.monotonic() + _LAST_S
    while procs.holding(_stdin(state)) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = procs.kill_all(lambda: procs.holding(_stdin(state)))
    problems = [f"hooks {left} do not end after SIGKILL"] if left else []
    told = _state_of(state, document, "stopped", 0)
    for hook in hooks(document, _AFTER):
        if not hook.of_container:
            try:
                run_hook(state, hook, told)
            except SmrError as error:
                problems.append(error.message)
    return problems


def run_hook(state: ContainerState, hook: Hook, told: bytes) -> None:
    """Run one hook as a runtime does: the spec's environment and nothing else, the container's state on stdin."""
    _stdin(state).write_bytes(told)
    output = os.memfd_create("smr-hook-output", os.MFD_CLOEXEC)  # not a pipe: what a hook leaves running would keep it open
    try:
        with _stdin(state).open("rb") as stdin:
            process = subprocess.Popen(
                list(hook.args) or [hook.path],
                executable=hook.path,
                env=dict(hook.environment),
                cwd=state.record.bundle,
                stdin=stdin,
                stdout=output,
                stderr=output,
            )
        status = process.wait(timeout=hook.timeout_s or None)
    except OSError as error:
        raise _failed(hook, f"cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.wait()
        raise _failed(hook, f"did not end within {hook.timeout_s:g} s") from error
    else:
        if status != 0:
            said = tail(os.pread(output, 1 << 16, 0).decode(errors="replace"))
            raise _failed(hook, f"failed with exit status {status}: {said}")
    finally:
        os.close(output)


def _failed(hook: Hook, what: str) -> SmrError:
    return SmrError(f"{hook.stage} hook {hook.path} {what}", code=Code.HOOK_FAILED, hook=hook.path)


def _state_of(state: ContainerState, document: Mapping[str, object], status: str, pid: int) -> bytes:
    """The state of the OCI runtime specification, as hooks get it."""
    told: dict[str, object] = {"ociVersion": str(document.get("ociVersion", "1.0.2")), "id": state.record.id, "status": status}
    if pid:
        told["pid"] = pid
    told |= {"bundle": state.record.bundle, "annotations": as_object(document.get("annotations"), "annotations")}
    return json.dumps(told).encode()


def _stdin(state: ContainerState) -> Path:
    return state.path / "hook"


def _mounts(pid: int) -> bytes:
    return Path(f"/proc/{pid}/mountinfo").read_bytes()
