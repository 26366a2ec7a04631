"""Which engine a container belongs to."""

from __future__ import annotations

from smr.proto.errors import Code, SmrError
from smr.shim.engines import containerd, podman, runc
from smr.shim.engines.target import Engine, Target


def find(name: str, *, engine: str, runtime: str, root: str = "") -> Target:
    """A running container by what its user calls it; `engine` is auto, podman, containerd or runc.

    Raises CONTAINER_NOT_FOUND when no engine asked knows it, ENGINE_MISSING when the one named is not there.
    """
    if engine == Engine.PODMAN and not podman.available():
        raise SmrError("podman is not installed", hint="name another --engine", code=Code.ENGINE_MISSING)
    if engine == Engine.CONTAINERD and not containerd.available():
        raise SmrError(
            f"containerd is not there: no ctr on PATH, or no socket {containerd.address()}",
            hint="set CONTAINERD_ADDRESS, or name another --engine",
            code=Code.ENGINE_MISSING,
        )
    asked = [Engine(engine)] if engine != "auto" else list(Engine)
    for kind in asked:
        target = _find(kind, name, runtime, root)
        if target is not None:
            return target
    raise SmrError(
        f"no running container {name} in {', '.join(asked)}",
        hint="list them with the engine's own ps",
        code=Code.CONTAINER_NOT_FOUND,
        container=name,
    )


def stop(target: Target) -> None:
    """End a container at once through its engine."""
    {Engine.PODMAN: podman.stop, Engine.CONTAINERD: containerd.stop, Engine.RUNC: runc.stop}[target.engine](target)


def _find(kind: Engine, name: str, runtime: str, root: str) -> Target | None:
    if kind is Engine.PODMAN:
        return podman.find(name, runtime)
    if kind is Engine.CONTAINERD:
        return containerd.find(name, runtime) if containerd.available() else None
    return runc.find(name, runtime, root)
