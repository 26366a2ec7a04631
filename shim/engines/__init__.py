"""What each engine knows of a container: its id, bundle, runtime root, image and root filesystem."""

from __future__ import annotations

from pathlib import Path


def source_of_bundle(bundle: Path, container_id: str) -> tuple[str, str]:
    """Name and digest of the image of the container in a bundle, ("", "") where the engine keeps none.

    Read from the engine's own files or its client, whichever the bundle's path shows; never raises: an identity that cannot
    be had is no reason to fail a restore, since CRIU checks build ids and sizes of the files that are open or mapped.
    """
    from smr.proto.errors import SmrError
    from smr.shim.engines import containerd, podman

    try:
        return podman.source_of_bundle(bundle, container_id) or containerd.source_of_bundle(bundle, container_id) or ("", "")
    except (SmrError, OSError, ValueError, KeyError):
        return "", ""
