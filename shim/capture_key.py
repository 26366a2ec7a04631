"""The tag of an image that a node made by itself: what must be the same for the image to fit, as a hash.

One annotation serves a deployment across unlike nodes, because each node computes its own tag.

    NAME:kFACTS-DIGEST    FACTS   12 hex digits: command, GPU models and count, driver, CPU features, and the pod's namespace
                                  where images are kept apart by it
                          DIGEST  12 hex digits of the container image's: of its layers (smr.shim.engines.image_layers), or of the
                                  digest that the engine knows it by; zeros where neither is known

A start knows FACTS by itself. The digest has to be asked of the engine, which takes longer than the rest of the look-up; so that
is left out where one image only has these FACTS: the restore compares digests anyway, beside its other work.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

from smr.images.store import Store
from smr.proto.annotations import Annotations
from smr.proto.capture import AUTO, auto_name, parse_capture
from smr.proto.errors import SmrError
from smr.proto.oci import Spec
from smr.proto.pod import pod_of
from smr.shim import engines, preflight
from smr.shim.config import Config
from smr.shim.engines import image_layers

_VERSION = 1
_DIGITS = 12
_TAG = re.compile(rf"k[0-9a-f]{{{_DIGITS}}}-[0-9a-f]{{{_DIGITS}}}")


def facts_of(spec: Spec, config: Config) -> str:
    """FACTS of a container on this node."""
    pod = pod_of(spec.annotations)
    facts = {
        "version": _VERSION,
        "namespace": pod.namespace if pod is not None and config.image_namespaces == "own" else "",
        "command": spec.args,
        "cpu": preflight.code_features(),
        "gpu": _gpu(spec),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def digest_of(image_digest: str) -> str:
    """DIGEST of a container image."""
    return image_digest.rpartition(":")[2][:_DIGITS].lower().rjust(_DIGITS, "0")


def tag(facts: str, image_digest: str) -> str:
    """The tag of both."""
    return f"k{facts}-{digest_of(image_digest)}"


def image_of(bundle: Path, container_id: str) -> str:
    """The digest of a container's image that goes into its tag; asked of its engine."""
    return image_layers.layers_of_bundle(bundle, container_id) or engines.source_of_bundle(bundle, container_id)[1]


def is_key(text: str) -> bool:
    """Whether a tag is one of ours."""
    return _TAG.fullmatch(text) is not None


def resolved(annotations: Annotations, spec: Spec, bundle: Path, container_id: str, config: Config) -> Annotations:
    """The same with the image of this node. A store that cannot be read is for the restore to report."""
    try:
        return replace(annotations, restore=resolve(annotations, spec, bundle, container_id, config))
    except SmrError:
        return annotations


def resolve(annotations: Annotations, spec: Spec, bundle: Path, container_id: str, config: Config) -> str:
    """The image that `smr.restore` means on this node: a name without a tag may be one that nodes make images for.

    Where none was made, the name as it is.
    """
    name = annotations.restore
    if name == AUTO:
        capture = parse_capture(spec.annotations)
        name = capture.name if capture is not None else auto_name(spec.annotations)
    if ":" in name or "@" in name:
        return name
    keys = [one for one in Store(config.store).tags(name) if is_key(one)]
    if not keys:
        return name
    fitting = [one for one in keys if one.startswith(f"k{facts_of(spec, config)}-")]
    if len(fitting) > 1:
        wanted = digest_of(image_of(bundle, container_id))
        fitting = [one for one in fitting if one.endswith(wanted)]
    return f"{name}:{fitting[0]}" if fitting else name


def _gpu(spec: Spec) -> list[str]:
    """Driver and models of the container's GPUs; a container without one asks nobody."""
    from smr.shim.gpu.devices import gpus_of, has_gpus

    if not has_gpus(spec):
        return []
    from smr.shim.gpu import inventory

    try:
        found = inventory.read()
        return [found.driver, *sorted(one.gpu.name for one in gpus_of(spec, found))]
    except SmrError:
        return ["unknown"]
