"""The stage `create`: `runc restore` (or crun's) with CRIU's options, the tree left stopped.

Options come from what the dump needed, from the annotations and from how the pages are delivered. An image may come from
anywhere: of its options only those are let through that an annotation may ask for too.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from smr.images.image import Image
from smr.proto.annotations import Annotations, Tcp
from smr.proto.criu_options import OPTIONS
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec
from smr.shim import criu, criu_why, nested_mounts, procs, stdio
from smr.shim.config import load
from smr.shim.criu import Criu
from smr.shim.oci_args import RuntimeCall
from smr.shim.state import ContainerState

_FLAGS = frozenset(name for name, option in OPTIONS.items() if not option.value)
_RESTORE_FLAGS = ("console-socket", "no-pivot", "pid-file")
_BASE_TIMEOUT_S = 60.0
# Slower than any disk worth restoring from; beyond that CRIU hangs.
_BYTES_PER_S = 50e6


def criu_options(image: Image, annotations: Annotations) -> dict[str, str]:
    """CRIU's options of this restore: those the dump needed, the mode of TCP, the user's; then what we always set.

    `annotations.tcp` is what smr.shim.tcp.mode made of the user's wish. CRIU restores connections of images that have its own.
    """
    foreign = sorted(set(image.config.criu_options) - _FLAGS)
    if foreign:
        # An image may come from anywhere, and some options run programs.
        raise SmrError(
            f"{image.reference} asks for the CRIU option {foreign[0]!r}, which is not allowed",
            hint="allowed: " + ", ".join(sorted(_FLAGS)),
            code=Code.UNSUPPORTED,
        )
    options = dict.fromkeys(image.config.criu_options, "")
    if annotations.tcp is Tcp.ESTABLISHED and image.config.connections is None:
        options["tcp-established"] = ""
    else:
        options.pop("tcp-established", None)
        options["tcp-close"] = ""
    options |= annotations.criu
    options["leave-stopped"] = ""
    return options


def external_options(image: Image, spec: Spec, annotations: Annotations) -> dict[str, str]:
    """What CRIU takes from this node in place of what lay below sources of mounts, and of the driver's files of the other node.

    Raises MOUNT_MISMATCH where there is none.
    """
    below = nested_mounts.restore_externals(image.config, spec, annotations)
    if image.config.gpu is None:
        return below
    from smr.shim.gpu.device_mounts import restore_externals

    return stdio.merged(below, restore_externals(image.config, spec))


def run_restore(
    call: RuntimeCall,
    image: Image,
    annotations: Annotations,
    more: Mapping[str, str],
    tool: Criu,
    state: ContainerState,
    *,
    apart: bool = False,
) -> None:
    """Run the real runtime's restore with the caller's stdio, which becomes the container's. `more`: options of CRIU.

    `apart`: in a mount namespace of its own (smr.shim.nested_mounts).
    """
    options = {**criu_options(image, annotations), **more}
    state.record.criu_options = tuple(sorted(options))
    state.record.criu_why = criu_why.of_restore(options, image.config, annotations)
    config_file = state.work_dir / "criu.conf"
    groups = options.pop("manage-cgroups", "ignore")
    by_flag = criu.RUNTIME_FLAGS | ({"lazy-pages"} if "runc" in Path(state.record.runtime).name else set())
    flags = [f"--{name}" for name in options if name in by_flag]
    criu.write_options(config_file, {name: value for name, value in options.items() if name not in by_flag})
    state.save()
    argv = _restore_argv(call, state, [*flags, "--manage-cgroups-mode", groups])
    timeout_s = _BASE_TIMEOUT_S + image.size_bytes / _BYTES_PER_S
    # stdio is the container's, so it is inherited; everything else of our environment that the engine set is kept for hooks.
    leave = nested_mounts.leave_mounts() if apart else None
    process = subprocess.Popen(argv, env={**os.environ, **tool.environment(config_file)}, preexec_fn=leave)  # noqa: PLW1509  # two calls of libc
    try:
        status = process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.wait()
        raise SmrError(
            f"restore of {image.name} did not end within {timeout_s:.0f} s", code=Code.TIMEOUT, log=state.work_dir
        ) from error
    if status != 0:
        log = criu.keep_log(state.work_dir / "restore.log", load().log.parent / f"restore-{state.record.id}.log")
        from smr.shim.addresses import bind_failure

        if (failure := bind_failure(_text(log), state.criu_dir)) is not None:
            raise failure
        raise SmrError(
            f"{Path(state.record.runtime).name} restore of {image.name} failed with exit status {status}: {criu.quote_log(log)}",
            hint=f"the whole log is {log}",
            code=Code.CRIU_FAILED,
            log=log,
        )


def _text(log: Path) -> str:
    try:
        return log.read_text(errors="replace")
    except OSError:
        return ""


def _restore_argv(call: RuntimeCall, state: ContainerState, flags: list[str]) -> list[str]:
    carried: list[str] = []
    for name in _RESTORE_FLAGS:
        value = call.option(name)
        if value is not None:
            carried += [f"--{name}", value] if value else [f"--{name}"]
    if call.option("pid-file") is None:
        carried += ["--pid-file", str(state.path / "pid")]
    paths = ["--bundle", str(call.bundle), "--image-path", str(state.criu_dir), "--work-path", str(state.work_dir)]
    return [state.record.runtime, *call.global_args, "restore", "--detach", *paths, *carried, *flags, call.id]


def note_pid(call: RuntimeCall, state: ContainerState) -> None:
    """Keep the first process's pid in the record. Raises RUNTIME_FAILED when the runtime left none."""
    path = Path(call.option("pid-file") or state.path / "pid")
    try:
        state.record.pid = int(path.read_text())
        state.record.pid_started = procs.started(state.record.pid)
    except (OSError, ValueError) as error:
        raise SmrError(f"the runtime left no pid in {path}", code=Code.RUNTIME_FAILED) from error
