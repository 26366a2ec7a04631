"""`smr restore`: the engine's own command for a container that is restored from an image, built from what the image knows.

Users could type it themselves; what is built here is the same container as the checkpoint's: image or root, command, terminal,
network and mounts of the user. Words after `--` go to the engine as they are, before the image.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from smr.proto.annotations import RESTORE
from smr.proto.checkpoint import CheckpointConfig
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Mount, Spec, parse_spec
from smr.shim import procs
from smr.shim.engines import containerd, podman
from smr.shim.preflight import ENGINE_FILES

# Where engines keep what they bind into containers by themselves.
_ENGINE_SOURCES = ("/var/lib/containers/", "/run/containers/", "/run/containerd/", "/var/lib/containerd/", "/run/netns/")


def command(image: str, facts: CheckpointConfig, engine: str, name: str, extra: Sequence[str]) -> list[str]:
    """The command line for `engine` (podman or containerd). Raises UNSUPPORTED for a container no engine can start again."""
    spec = parse_spec(facts.spec)
    chosen = facts.source.engine if engine == "auto" else engine
    if chosen == "podman":
        return _podman(image, facts, spec, name, extra)
    if chosen == "containerd":
        return _containerd(image, facts, spec, name, extra)
    raise SmrError(
        f"the source container of {image} was not started by an engine but by {chosen}",
        hint="run smr-runtime create on a bundle whose config.json has the annotation, or name --engine",
        code=Code.UNSUPPORTED,
    )


def _podman(image: str, facts: CheckpointConfig, spec: Spec, name: str, extra: Sequence[str]) -> list[str]:
    words = [*podman.command(), "run", "--detach", "--runtime", "smr", "--annotation", f"{RESTORE}={image}"]
    words += ["--name", name] if name else []
    words += ["--tty"] if spec.terminal else []
    words += ["--network", "host"] if "network" not in spec.namespaces else []
    words += ["--read-only"] if spec.rootfs_readonly else []
    if not procs.has_capability(procs.CAP_SYS_RESOURCE):
        words += ["--ulimit", "nofile=20000:20000", "--ulimit", "nproc=20000:20000"]
    for mount in user_mounts(spec, facts.source.container_id):
        words += ["--volume", f"{mount.source}:{mount.destination}" + (":ro" if "ro" in mount.options else "")]
    return [*words, *extra, *_source(facts, ["--rootfs"]), *spec.args]


def _containerd(image: str, facts: CheckpointConfig, spec: Spec, name: str, extra: Sequence[str]) -> list[str]:
    container = name or f"smr-{os.getpid()}"
    words = containerd.ctr("default", "run", "--detach", "--runtime", "io.containerd.smr.v1")
    words += ["--annotation", f"{RESTORE}={image}"]
    words += ["--tty"] if spec.terminal else []
    words += ["--net-host"] if "network" not in spec.namespaces else []
    words += ["--read-only"] if spec.rootfs_readonly else []
    for mount in user_mounts(spec, facts.source.container_id):
        options = ":".join(mount.options) or "rbind"
        words += ["--mount", f"type=bind,src={mount.source},dst={mount.destination},options={options}"]
    return [*words, *extra, *_source(facts, ["--rootfs"]), container, *spec.args]


def user_mounts(spec: Spec, container_id: str) -> list[Mount]:
    """Bind mounts that the user asked for: not those that engines make for each container, in folders that bear its id."""
    return [
        mount
        for mount in spec.mounts
        if mount.is_bind
        and mount.destination not in ENGINE_FILES
        and not mount.source.startswith(_ENGINE_SOURCES)
        and container_id not in Path(mount.source).parts
    ]


def _source(facts: CheckpointConfig, rootfs_flag: list[str]) -> list[str]:
    """The image the container was started from, or its root directory."""
    if facts.source.image:
        return [facts.source.image]
    root = facts.source.rootfs
    if not root or not Path(root).is_dir():
        raise SmrError(
            f"the source container had no image, and its root {root or '(unknown)'} is not on this node",
            hint="start a container with the same root by hand, with the annotation",
            code=Code.SOURCE_MISMATCH,
        )
    return [*rootfs_flag, root]
