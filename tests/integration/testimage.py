"""The container image of the tests: Python and busybox from Debian packages, and the workload. Nothing is pulled.

`dev/provision` has put the packages in ENGINES/debs. The image is one OCI archive that podman and containerd both read; it
is kept in ENGINES under a name that is a hash of all that went in, and made anew when something changed.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

NAME = "localhost/smr-test:1"
# An image that another version of the tests has made may be in use by it.
_KEPT_S = 86400
_APPLETS = (
    *("sh", "cat", "ls", "ps", "id", "kill", "sleep", "wget", "stat", "mkdir", "touch", "rm", "echo", "head", "tail", "env"),
    *("true", "false", "hostname", "ip", "mount", "test", "dd", "sync", "nc", "grep"),
)
_PROGRAMS = ("workload.py", "netload.py")
_PRUNE = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/lintian", "usr/lib/python3.11/lib2to3")
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/tmp:/bin/sh\n",
    "etc/group": "root:x:0:\napp:x:1000:\n",
    "etc/hosts": "127.0.0.1 localhost\n",
    "etc/resolv.conf": "",
    "etc/marker": "from the image\n",
}


def archive(engines: Path) -> Path:
    """The OCI archive of the test image, made when it is not there yet. LookupError when the packages are missing."""
    return make(engines, "image", NAME, ("debs",), {f"app/{one}": Path(__file__).with_name(one) for one in _PROGRAMS})


def make(engines: Path, kind: str, name: str, folders: tuple[str, ...], copies: Mapping[str, Path]) -> Path:
    """An archive KIND-HASH.tar in ENGINES of the image `name`: packages of these folders of ENGINES, and files by their place."""
    debs = []
    for folder in folders:
        if not (engines / folder / ".done").exists():
            raise LookupError(f"no packages for {name} in {engines / folder}: run dev/provision")
        debs += sorted((engines / folder).glob("*.deb"))
    key = hashlib.sha256(Path(__file__).read_bytes() + "".join(deb.name for deb in debs).encode())
    for place, file in sorted(copies.items()):
        key.update(place.encode() + file.read_bytes())
    target = engines / f"{kind}-{key.hexdigest()[:16]}.tar"
    if not target.exists():
        for old in engines.glob(f"{kind}-*"):
            if old.stat().st_mtime < time.time() - _KEPT_S:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        _build(debs, copies, target, name)
    return target


def rootfs(engines: Path, into: Path) -> Path:
    """Unpack the image's files in an empty directory `into`, for runtimes that are driven by hand."""
    return unpack(archive(engines), into)


def unpack(image: Path, into: Path) -> Path:
    """Unpack the files of an archive that `make` has made."""
    with tarfile.open(image) as outer:
        manifest = json.load(_member(outer, json.load(_member(outer, "index.json"))["manifests"][0]["digest"]))
        layer = _member(outer, manifest["layers"][0]["digest"])
        with tarfile.open(fileobj=layer, mode="r|gz") as inner:
            inner.extractall(into, filter="fully_trusted")
    return into


def _member(outer: tarfile.TarFile, name: str) -> io.BufferedReader:
    file = outer.extractfile("blobs/" + name.replace(":", "/") if name.startswith("sha256:") else name)
    assert file is not None
    return file  # type: ignore[return-value]


def _build(debs: list[Path], copies: Mapping[str, Path], target: Path, name: str) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.stem}-") as scratch:
        tree = Path(scratch, "tree")
        _fill(tree, debs, copies)
        layer = Path(scratch, "layer.tar.gz")
        diff_id = _pack(tree, layer)
        partial = Path(scratch, "image.tar")
        _write_oci(partial, layer, diff_id, name)
        partial.rename(target)


def _fill(tree: Path, debs: list[Path], copies: Mapping[str, Path]) -> None:
    for deb in debs:
        subprocess.run(["dpkg-deb", "-x", deb, tree], check=True)
    for path in _PRUNE:
        shutil.rmtree(tree / path, ignore_errors=True)
    for path in ("proc", "sys", "dev", "run", "root", "app", "bin", "usr/bin", "etc", "data"):
        (tree / path).mkdir(parents=True, exist_ok=True)
    for path in ("tmp", "var/tmp"):
        (tree / path).mkdir(parents=True, exist_ok=True)
        (tree / path).chmod(0o1777)
    for applet in _APPLETS:
        with contextlib.suppress(FileExistsError):
            (tree / "bin" / applet).symlink_to("busybox")
    (tree / "usr/bin/python3").unlink(missing_ok=True)
    (tree / "usr/bin/python3").symlink_to("python3.11")
    for path, text in _FILES.items():
        (tree / path).write_text(text)
    for place, file in copies.items():
        (tree / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tree / place)


def _pack(tree: Path, layer: Path) -> str:
    digest = hashlib.sha256()
    with gzip.open(layer, "wb", compresslevel=1) as packed:
        writer = _Tee(packed, digest)
        with tarfile.open(fileobj=writer, mode="w|", format=tarfile.GNU_FORMAT) as tar:  # type: ignore[call-overload]
            tar.add(tree, arcname=".", filter=_owned_by_root)
    return "sha256:" + digest.hexdigest()


class _Tee:
    def __init__(self, file: io.BufferedIOBase, digest: hashlib._Hash) -> None:
        self.file, self.digest = file, digest

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)


def _owned_by_root(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    return info


def _write_oci(target: Path, layer: Path, diff_id: str, name: str) -> None:
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    config = {
        "architecture": machine,
        "os": "linux",
        "config": {
            "Cmd": ["python3", "/app/workload.py"],
            "Env": ["PATH=/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE=1"],
            "WorkingDir": "/",
            "StopSignal": "SIGTERM",
        },
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [{"created_by": "smr tests"}],
    }
    with tarfile.open(target, "w") as outer:
        layer_blob = _add_file(outer, layer, "application/vnd.oci.image.layer.v1.tar+gzip")
        config_blob = _add_json(outer, config, "application/vnd.oci.image.config.v1+json")
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config_blob,
            "layers": [layer_blob],
        }
        entry = _add_json(outer, manifest, manifest["mediaType"])  # type: ignore[arg-type]
        entry["annotations"] = {"org.opencontainers.image.ref.name": name, "io.containerd.image.name": name}
        _add_bytes(outer, "index.json", json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode())
        _add_bytes(outer, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')


def _add_json(outer: tarfile.TarFile, document: object, media_type: str) -> dict[str, object]:
    data = json.dumps(document).encode()
    digest = hashlib.sha256(data).hexdigest()
    _add_bytes(outer, f"blobs/sha256/{digest}", data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}


def _add_file(outer: tarfile.TarFile, path: Path, media_type: str) -> dict[str, object]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    outer.add(path, arcname=f"blobs/sha256/{digest}")
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": path.stat().st_size}


def _add_bytes(outer: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    outer.addfile(info, io.BytesIO(data))
