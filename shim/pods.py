"""Containers of pods: which of them a bare `smr.restore` means, whose images they may have, and how often they are restored.

    RUN/pods/UID.CONTAINER      JSON: how many restores in a row ended early, the time of the last one (seconds since boot), and
                                the bundle of the pod's sandbox. Dropped when that bundle is gone: with the pod

A runtime sees one container at a time, and nothing says which of a pod's containers is "the" application: init containers,
sidecars and it look alike. So where the pod does not name it, the image tells: an image that was made of a pod's container is for
the container of that name, any other image for the container whose command is the image's. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

from smr.proto.annotations import Annotations, Check
from smr.proto.checkpoint import CheckpointConfig
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec, load_spec, parse_spec
from smr.proto.pod import Pod, pod_of
from smr.shim.config import Config
from smr.shim.files import write_atomic

_IMAGE_NAME = "io.kubernetes.cri.image-name"


def meant(image: CheckpointConfig, spec: Spec, annotations: Annotations) -> bool:
    """Whether a bare `smr.restore` of this image means this container."""
    old = parse_spec(image.spec)
    before = pod_of(old.annotations)
    if before is not None and annotations.pod is not None:
        return before.container == annotations.pod.container
    if annotations.command is Check.FORCE:
        return spec.annotations.get(_IMAGE_NAME, image.source.image) == image.source.image
    return old.args == spec.args


def is_meant(annotations: Annotations, spec: Spec, config: Config) -> bool:
    """The same before a restore begins. An image that is not there is for `locate` to report."""
    if not annotations.bare:
        return True
    from smr.images.store import Store

    try:
        return meant(Store(config.store).resolve(annotations.restore).config, spec, annotations)
    except SmrError:
        return True


def check_keys(annotations: Annotations) -> None:
    """Raise ANNOTATION_INVALID when two keys name an image for this container."""
    if annotations.conflict:
        raise SmrError(annotations.conflict, hint="leave one of them out", code=Code.ANNOTATION_INVALID)


def admit(image: CheckpointConfig, annotations: Annotations, bundle: Path, config: Config) -> None:
    """Count a restore in a pod, once it is allowed.

    IMAGE_NAMESPACE: the image is another namespace's. RESTORE_GAVE_UP: restores of this container ended early too often.
    """
    if annotations.pod is not None:
        _check_namespace(image, annotations.pod, config)
        _count(annotations.pod, annotations.restore, bundle, config)


def _check_namespace(image: CheckpointConfig, pod: Pod, config: Config) -> None:
    before = pod_of(parse_spec(image.spec).annotations)
    if before is None or config.image_namespaces == "any" or before.namespace == pod.namespace:
        return
    raise SmrError(
        f"the image was made of a pod of namespace {before.namespace}, this pod is of {pod.namespace}: memory holds secrets",
        hint='capture it in this namespace too, or set image_namespaces = "any" in /etc/smr/smr.toml',
        code=Code.IMAGE_NAMESPACE,
        namespace=before.namespace,
    )


def _count(pod: Pod, image: str, bundle: Path, config: Config) -> None:
    path, now = _path(config, pod), time.clock_gettime(time.CLOCK_BOOTTIME)
    early = _early(path, now, config)
    if early >= config.restore_attempts:
        raise SmrError(
            f"container {pod.container} of pod {pod.name} was restored {early} times, and ended each time "
            f"within {config.restore_settled_s:g} s",
            hint=f"its log says why; check the image with 'smr images verify {image}'",
            code=Code.RESTORE_GAVE_UP,
        )
    _prune(path.parent)
    document = {"version": 1, "early": early, "restored": now, "sandbox": str(sandbox_bundle(bundle, pod))}
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(path, json.dumps(document).encode(), durable=False)


def siblings(bundle: Path, pod: Pod, runtime: str, root: str) -> tuple[str, ...]:
    """Names of the other containers of the pod that run now; their bundles lie beside this one's."""
    from smr.shim.engines import runtime_state

    found = []
    inner = Path(bundle.name) if bundle.name == "userdata" else Path()
    folder = bundle.parent.parent if bundle.name == "userdata" else bundle.parent
    for other in folder.iterdir():
        with contextlib.suppress(SmrError):
            if (other / inner).samefile(bundle) or not (other / inner / "config.json").exists():
                continue
            theirs = pod_of(load_spec(other / inner).annotations)
            if theirs is None or theirs.sandbox != pod.sandbox:
                continue
            if runtime_state.query(runtime, root, other.name).status != "stopped":
                found.append(theirs.container)
    return tuple(sorted(found))


def _path(config: Config, pod: Pod) -> Path:
    return config.run / "pods" / f"{pod.uid.replace('/', '-')}.{pod.container}"


def sandbox_bundle(bundle: Path, pod: Pod) -> Path:
    """The bundle of the pod's sandbox, which lies beside its containers': CRI-O's are folders `userdata`."""
    if bundle.name == "userdata":
        return bundle.parent.with_name(pod.sandbox) / bundle.name
    return bundle.with_name(pod.sandbox)


def _early(path: Path, now: float, config: Config) -> int:
    """Restores in a row that ended early, the last one counted: it has ended, for there is to be another."""
    document = _read(path)
    try:
        last = float(str(document["restored"]))
        return int(str(document["early"])) + 1 if now - last < config.restore_settled_s else 0
    except (KeyError, ValueError):
        return 0


def _read(path: Path) -> dict[str, object]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _prune(folder: Path) -> None:
    """Drop what is kept of pods that are gone."""
    for path in folder.glob("*.*"):
        sandbox = str(_read(path).get("sandbox", ""))
        if not sandbox or not Path(sandbox).exists():
            with contextlib.suppress(OSError):
                path.unlink()
