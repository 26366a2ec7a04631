"""Containers of a runtime driven by hand: known by the runtime alone, with no image."""

from __future__ import annotations

from pathlib import Path

from smr.proto.oci import load_spec
from smr.shim.engines import runtime_state
from smr.shim.engines.target import Engine, Target
from smr.shim.run import run


def find(name: str, runtime: str, root: str = "") -> Target | None:
    """A container by id; None when no runtime knows it."""
    where = (runtime, root) if root and (Path(root) / name).is_dir() else runtime_state.by_default_root(name, runtime)
    if where is None:
        return None
    state = runtime_state.query(*where, name)
    return Target(
        engine=Engine.RUNC,
        id=name,
        name=name,
        runtime=state.runtime,
        runtime_args=state.args,
        bundle=state.bundle,
        rootfs=state.rootfs,
        pid=state.pid,
        status=state.status,
        spec=load_spec(state.bundle),
    )


def stop(target: Target) -> None:
    """End a container at once."""
    run(target.runtime_command("kill", target.id, "KILL"), timeout_s=60)
