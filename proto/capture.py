"""`smr.capture`: the image that a node makes of a container by itself, once the container is ready and where there is none yet.

    smr.capture=NAME              the image's name; the node computes its tag (smr.shim.capture_key). `auto`: a name made of the
                                  pod's namespace and the container's name
    smr.capture.ready=HOW         [GET] http://[ADDRESS]:PORT/PATH, unix:///SOCKET:/PATH, tcp::PORT or exec:COMMAND
    smr.capture.after=SECONDS     from then, or from the start where `ready` is not given
    smr.capture.timeout=SECONDS   until it must be ready; 1800 by default

Without `ready` and `after` a container is ready when it listens on a TCP port. Standard library only: this runs before every
annotated start.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from smr.proto.annotations import CAPTURE, CAPTURE_AFTER, CAPTURE_KEYS, CAPTURE_READY, CAPTURE_TIMEOUT, seconds
from smr.proto.errors import Code, SmrError
from smr.proto.pod import NAMED_PREFIX, named, pod_of

AUTO = "auto"
TIMEOUT_S = 1800.0
_NAME = re.compile(r"[a-z0-9]+(?:[._/-]+[a-z0-9]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """What one container asks for. `sole`: nothing names the container, so it must show that it is the pod's application."""

    name: str
    ready: str = ""
    after_s: float | None = None
    timeout_s: float = TIMEOUT_S
    sole: bool = False


def parse_capture(annotations: Mapping[str, str]) -> Capture | None:
    """None where there is none, or where it is for another container of the pod. Raises ANNOTATION_INVALID."""
    given = CAPTURE_KEYS & annotations.keys()
    if not given:
        return None
    if CAPTURE not in given:
        raise SmrError(
            f"annotation {', '.join(sorted(given))} without {CAPTURE}: nothing names the image to make",
            hint=f"add {CAPTURE}=NAME, or remove the other",
            code=Code.ANNOTATION_INVALID,
        )
    pod = pod_of(annotations)
    chosen = _chosen(annotations)
    name = annotations[CAPTURE]
    if not _NAME.fullmatch(name):
        raise SmrError(
            f"annotation {CAPTURE}={name!r}: needed a name in lower case and no tag: the node adds its own",
            hint=f"use {CAPTURE}=llama, or {CAPTURE}={AUTO}",
            code=Code.ANNOTATION_INVALID,
            annotation=CAPTURE,
        )
    after_s = seconds(annotations, CAPTURE_AFTER) if CAPTURE_AFTER in given else None
    timeout_s = seconds(annotations, CAPTURE_TIMEOUT) if CAPTURE_TIMEOUT in given else TIMEOUT_S
    if pod is not None and chosen not in {"", pod.container}:
        return None
    return Capture(
        name=auto_name(annotations) if name == AUTO else name,
        ready=annotations.get(CAPTURE_READY, ""),
        after_s=after_s,
        timeout_s=timeout_s,
        sole=pod is not None and not chosen,
    )


def auto_name(annotations: Mapping[str, str]) -> str:
    """The name that `auto` stands for: a container's of a pod by its namespace and name, else one for all of the node."""
    pod = pod_of(annotations)
    return f"{AUTO}/{pod.namespace}/{pod.container}" if pod is not None and pod.namespace and pod.container else f"{AUTO}/node"


def _chosen(annotations: Mapping[str, str]) -> str:
    """The container that is meant: as named, else the only one that a key `smr.restore.CONTAINER` names."""
    by_key = [key.removeprefix(NAMED_PREFIX) for key in annotations if key.startswith(NAMED_PREFIX)]
    return named(annotations) or (by_key[0] if len(by_key) == 1 else "")
