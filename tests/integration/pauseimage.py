"""The image of pod sandboxes: busybox, asleep. Made from the packages of the test image; nothing is pulled."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

NAME = "localhost/pause:1"


def archive(engines: Path, target: Path) -> Path:
    """Write an OCI archive with the image to `target`. LookupError when the package is missing."""
    packages = sorted((engines / "debs").glob("busybox-static_*.deb"))
    if not packages:
        raise LookupError(f"no busybox-static in {engines}/debs: run dev/provision")
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["dpkg-deb", "-x", packages[-1], scratch], check=True)
        busybox = next(path for name in ("bin/busybox", "usr/bin/busybox") if (path := Path(scratch, name)).exists())
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as tar:
            tar.addfile(_info("busybox", busybox.stat().st_size, 0o755), io.BytesIO(busybox.read_bytes()))
    _write(target, layer.getvalue())
    return target


def _info(name: str, size: int, mode: int = 0o644) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, mode
    return info


def _write(target: Path, layer: bytes) -> None:
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    config = {
        "architecture": machine,
        "os": "linux",
        "config": {"Entrypoint": ["/busybox", "sleep", "1000000"], "Env": ["PATH=/"], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
    }
    with tarfile.open(target, "w") as outer:

        def add(data: bytes, media_type: str) -> dict[str, object]:
            outer.addfile(_info(f"blobs/{_digest(data).replace(':', '/')}", len(data)), io.BytesIO(data))
            return {"mediaType": media_type, "digest": _digest(data), "size": len(data)}

        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": add(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
            "layers": [add(gzip.compress(layer, 1), "application/vnd.oci.image.layer.v1.tar+gzip")],
        }
        entry = add(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
        entry["annotations"] = {"org.opencontainers.image.ref.name": NAME, "io.containerd.image.name": NAME}
        for name, document in (
            ("index.json", {"schemaVersion": 2, "manifests": [entry]}),
            ("oci-layout", {"imageLayoutVersion": "1.0.0"}),
        ):
            data = json.dumps(document).encode()
            outer.addfile(_info(name, len(data)), io.BytesIO(data))


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
