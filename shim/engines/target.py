"""A container that an engine runs, as a checkpoint needs it: nothing but facts, no client object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from smr.proto.oci import Spec


class Engine(StrEnum):
    """Engines a container can belong to; RUNC is the runtime driven by hand."""

    PODMAN = "podman"
    CONTAINERD = "containerd"
    RUNC = "runc"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One running container. `runtime` is the real OCI runtime with `runtime_args` (--root ...) before the verb.

    `rootfs` is the mounted root on the host. `engine_files` are JSON documents the engine keeps, by file name.
    """

    engine: Engine
    id: str
    name: str
    runtime: str
    runtime_args: tuple[str, ...]
    bundle: Path
    rootfs: Path
    pid: int
    status: str
    spec: Spec
    image: str = ""
    image_digest: str = ""
    namespace: str = ""
    engine_files: Mapping[str, bytes] = field(default_factory=dict)

    def runtime_command(self, *words: str) -> list[str]:
        """A command line of the real runtime."""
        return [self.runtime, *self.runtime_args, *words]
