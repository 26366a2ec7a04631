"""Pods as an OCI runtime sees them: one container at a time, known by the annotations that containerd's CRI and CRI-O write.

A pod's own annotations reach the spec of each of its containers, so every container of a pod comes with the same `smr.` keys:

    smr.restore.CONTAINER=IMAGE    that container
    smr.restore=IMAGE              the application container: that which smr.container or kubectl.kubernetes.io/default-container
                                   names; where neither does, the image decides (`bare`; smr.shim.pods.meant)

Standard library only: this runs before every annotated start.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from smr.proto.errors import Code, SmrError

DEFAULT_CONTAINER = "kubectl.kubernetes.io/default-container"
CONTAINER = "smr.container"
NAMED_PREFIX = "smr.restore."
_RESTORE = "smr.restore"
# A container's name is a DNS label (RFC 1123).
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """The pod of a container, and the container's name in it. `sandbox` is the id of the pod's sandbox."""

    name: str
    namespace: str
    uid: str
    sandbox: str
    container: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Addressed:
    """What a pod's keys say to one of its containers.

    `restore` is None when they address others. `bare`: nothing but the image says whether this container is meant. `conflict`
    is a sentence on two keys for it. `others` are the names of containers that keys name beside this one.
    """

    restore: str | None
    bare: bool = False
    conflict: str = ""
    others: tuple[str, ...] = ()


def is_sandbox(annotations: Mapping[str, str]) -> bool:
    """Whether this is a pod's sandbox, which carries the pod's annotations and is never ours."""
    kinds = (annotations.get("io.kubernetes.cri.container-type"), annotations.get("io.kubernetes.cri-o.ContainerType"))
    return "sandbox" in kinds


def pod_of(annotations: Mapping[str, str]) -> Pod | None:
    """The pod that a container belongs to; None for a sandbox and for containers that are not in a pod."""
    if annotations.get("io.kubernetes.cri.container-type") == "container":
        cri = "io.kubernetes.cri."
        names = {field: annotations.get(f"{cri}sandbox-{field}", "") for field in ("name", "namespace", "uid")}
        return Pod(
            **names, sandbox=annotations.get(f"{cri}sandbox-id", ""), container=annotations.get(f"{cri}container-name", "")
        )
    if annotations.get("io.kubernetes.cri-o.ContainerType") == "container":
        names = {field: annotations.get(f"io.kubernetes.pod.{field}", "") for field in ("name", "namespace", "uid")}
        sandbox = annotations.get("io.kubernetes.cri-o.SandboxID", "")
        return Pod(**names, sandbox=sandbox, container=annotations.get("io.kubernetes.container.name", ""))
    return None


def check_name(key: str) -> None:
    """`smr.restore.NAME` must name what can be a container. Raises ANNOTATION_INVALID."""
    name = key.removeprefix(NAMED_PREFIX)
    if not _NAME.fullmatch(name):
        raise SmrError(
            f"annotation {key}: '{name}' is not the name of a container",
            hint=f"use {NAMED_PREFIX}CONTAINER=IMAGE, with the name that the container has in the pod's spec",
            code=Code.ANNOTATION_INVALID,
            annotation=key,
        )


def named(annotations: Mapping[str, str]) -> str:
    """The container that the pod names as its application container, "" where it names none."""
    return annotations.get(CONTAINER) or annotations.get(DEFAULT_CONTAINER, "")


def addressed(annotations: Mapping[str, str], pod: Pod | None) -> Addressed:
    """What `smr.restore` and `smr.restore.CONTAINER` say to this container. ANNOTATION_INVALID for a name outside of a pod."""
    bare = annotations.get(_RESTORE)
    by_name = {key.removeprefix(NAMED_PREFIX): value for key, value in annotations.items() if key.startswith(NAMED_PREFIX)}
    if pod is None:
        if by_name or CONTAINER in annotations:
            key = CONTAINER if CONTAINER in annotations else f"{NAMED_PREFIX}{next(iter(by_name))}"
            raise SmrError(
                f"annotation {key} names a container of a pod, and this container is in none",
                hint=f"use {_RESTORE}=IMAGE",
                code=Code.ANNOTATION_INVALID,
                annotation=key,
            )
        return Addressed(restore=bare)
    mine = by_name.pop(pod.container, None)
    chosen = named(annotations)
    others = (*by_name, *([chosen] if CONTAINER in annotations and chosen != pod.container else []))
    ours = bare if chosen in {"", pod.container} else None
    if mine is not None and ours is not None:
        conflict = (
            f"two keys name an image for container {pod.container}: {_RESTORE}={bare} and {NAMED_PREFIX}{pod.container}={mine}"
        )
        return Addressed(restore=mine, conflict=conflict, others=others)
    if mine is not None:
        return Addressed(restore=mine, others=others)
    return Addressed(restore=ours, bare=ours is not None and not chosen, others=others)
