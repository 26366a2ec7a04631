"""What a container asks of SMR, all of it checked: a wrong annotation never starts cold, whatever `smr.fallback` says."""

from __future__ import annotations

from smr.proto.annotations import CAPTURE, QUIESCE, RESUME, Annotations, parse
from smr.proto.oci import Spec


def asked(spec: Spec) -> Annotations | None:
    """The annotations, or None when they ask for no restore. Raises ANNOTATION_UNKNOWN or ANNOTATION_INVALID."""
    annotations = parse(spec.annotations)
    if any(key.startswith(CAPTURE) for key in spec.annotations):
        from smr.proto.capture import parse_capture
        from smr.shim import readiness

        capture = parse_capture(spec.annotations)
        readiness.parse(capture.ready if capture is not None else "", 0, ("", ""), "")
    hooks = [spec.annotations.get(key, "") for key in (QUIESCE, RESUME)]
    if any(hooks):
        from smr.shim.quiesce import parse_hooks

        parse_hooks(*hooks)
    return annotations
