"""Annotations by which podman, CRI-O and checkpointctl (containerd reads its family too) know an OCI image as a checkpoint.

The keys are theirs: podman `libpod/define/annotations.go`, CRI-O `pkg/annotations`, checkpointctl `lib/metadata.go`
(`org.criu.checkpoint.*`, containerd's CRI looks for `container.name`). A fact that is not known is left out; the name is always
there, because it is what the engines look for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from smr.proto.checkpoint import CheckpointConfig

PODMAN = "io.podman.annotations.checkpoint."
CRIO = "io.kubernetes.cri-o.annotations.checkpoint."
CRIU = "org.criu.checkpoint."

_GO_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64le", "s390x": "s390x", "riscv64": "riscv64"}
_POD_KEYS = {
    "pod.name": ("io.kubernetes.cri.sandbox-name", "io.kubernetes.pod.name", "io.kubernetes.cri-o.KubeName"),
    "pod.id": ("io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"),
    "pod.namespace": ("io.kubernetes.cri.sandbox-namespace", "io.kubernetes.pod.namespace", "io.kubernetes.cri-o.Namespace"),
}


def checkpoint_annotations(config: CheckpointConfig) -> dict[str, str]:
    """All three families for one checkpoint."""
    pairs = [*_podman(config), *_crio(config), *_criu(config)]
    return {key: value for key, value in pairs if value}


def criu_number(version: str) -> str:
    """CRIU's version as podman and CRI-O write it: 4.1.1 is 40101; empty when it is no version."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return str(int(found[1]) * 10000 + int(found[2]) * 100 + int(found[3] or 0)) if found else ""


def go_architecture(machine: str) -> str:
    """The name that OCI and the engines have for `uname -m`."""
    return _GO_ARCHITECTURES.get(machine, machine)


def _name(config: CheckpointConfig) -> str:
    return config.source.container_name or config.source.container_id


def _runtime(config: CheckpointConfig) -> tuple[str, str]:
    """The runtime's name and version, of 'runc 1.1.5' or 'runc version 1.1.5'."""
    name, _, version = config.host.runtime.partition(" ")
    return name, version.removeprefix("version ").strip()


def _podman(config: CheckpointConfig) -> Iterator[tuple[str, str]]:
    runtime, version = _runtime(config)
    yield PODMAN + "name", _name(config)
    yield PODMAN + "rawImageName", config.source.image
    yield PODMAN + "rootfsImageID", config.source.image_digest.removeprefix("sha256:")
    yield PODMAN + "rootfsImageName", config.source.image
    yield PODMAN + "criu.version", criu_number(config.host.criu)
    yield PODMAN + "runtime.name", runtime
    yield PODMAN + "runtime.version", version
    yield PODMAN + "host.arch", go_architecture(config.host.architecture)
    yield PODMAN + "host.kernel", config.host.kernel
    yield PODMAN + "cgroups.version", config.host.cgroup


def _crio(config: CheckpointConfig) -> Iterator[tuple[str, str]]:
    yield CRIO + "name", _name(config)
    yield CRIO + "rawImageName", config.source.image
    yield CRIO + "rootfsImageID", config.source.image_digest.removeprefix("sha256:")
    yield CRIO + "rootfsImageName", config.source.image
    yield CRIO + "criu.version", criu_number(config.host.criu)


def _criu(config: CheckpointConfig) -> Iterator[tuple[str, str]]:
    runtime, version = _runtime(config)
    yield CRIU + "container.name", _name(config)
    yield CRIU + "engine.name", config.source.engine
    yield CRIU + "rootfsImageName", config.source.image
    yield CRIU + "rootfsImageUserRequested", config.source.image
    yield CRIU + "rootfsImageSha", config.source.image_digest
    yield CRIU + "rootfsImageID", config.source.image_digest.removeprefix("sha256:")
    yield CRIU + "rawImageName", config.source.image
    yield CRIU + "runtime.name", runtime
    yield CRIU + "runtime.version", version
    yield CRIU + "criu.version", config.host.criu
    yield CRIU + "host.arch", go_architecture(config.host.architecture)
    yield CRIU + "host.kernel", config.host.kernel
    yield CRIU + "cgroup.version", config.host.cgroup
    annotations = config.spec.get("annotations")
    if isinstance(annotations, Mapping):
        for key, sources in _POD_KEYS.items():
            yield CRIU + key, next((str(annotations[source]) for source in sources if source in annotations), "")
