"""containerd: containers by their bundles, images by `ctr`.

A bundle is STATE/io.containerd.runtime.v2.task/NAMESPACE/ID; STATE is the folder of containerd's socket, unless
SMR_CONTAINERD_STATE names it. `ctr` is given CONTAINERD_ADDRESS
(default /run/containerd/containerd.sock); SMR_CTR may name another program.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from smr.proto.errors import Code, SmrError
from smr.proto.oci import Json, Spec, as_object, load_spec
from smr.shim.engines import runtime_state
from smr.shim.engines.target import Engine, Target
from smr.shim.run import run

_TASKS = "io.containerd.runtime.v2.task"
_RUNC_ROOT = "/run/containerd/runc"
_NAMES = ("io.kubernetes.cri.container-name", "nerdctl/name")


def address() -> str:
    """containerd's socket."""
    return os.environ.get("CONTAINERD_ADDRESS", "/run/containerd/containerd.sock")


def ctr(namespace: str, *words: str, socket: str = "") -> list[str]:
    """A `ctr` command line."""
    return [os.environ.get("SMR_CTR", "ctr"), "--address", socket or address(), "--namespace", namespace, *words]


def available() -> bool:
    """Whether containerd's client is installed and its socket is there."""
    return shutil.which(os.environ.get("SMR_CTR", "ctr")) is not None and Path(address()).exists()


def state_dir() -> Path:
    """containerd's state directory."""
    return Path(os.environ.get("SMR_CONTAINERD_STATE") or Path(address()).parent)


def find(name: str, runtime: str) -> Target | None:
    """A container by id, unambiguous id prefix, or the name CRI or nerdctl gave it; None when containerd runs none such."""
    matches = _matches(name)
    if not matches:
        return None
    if len(matches) > 1:
        places = ", ".join(f"{bundle.parent.name}/{bundle.name[:12]}" for bundle in matches)
        raise SmrError(
            f"{name} names several containerd containers: {places}", hint="give the whole id", code=Code.CONTAINER_NOT_FOUND
        )
    return target_of(matches[0], runtime)


def is_bundle(bundle: Path) -> bool:
    """Whether a bundle is one of containerd's."""
    return bundle.parent.parent.name == _TASKS


def _matches(name: str) -> list[Path]:
    bundles = [bundle for bundle in (state_dir() / _TASKS).glob("*/*") if (bundle / "config.json").exists()]
    exact = [bundle for bundle in bundles if bundle.name == name]
    if exact:
        return exact
    named = [bundle for bundle in bundles if name in _names(load_spec(bundle))]
    return named or ([bundle for bundle in bundles if bundle.name.startswith(name)] if len(name) >= 4 else [])


def _names(spec: Spec) -> list[str]:
    return [spec.annotations[key] for key in _NAMES if key in spec.annotations]


def target_of(bundle: Path, runtime: str) -> Target:
    """The container of a bundle."""
    namespace, container_id = bundle.parent.name, bundle.name
    state = runtime_state.query(runtime, f"{_root(bundle)}/{namespace}", container_id)
    spec = load_spec(bundle)
    image, digest = source_of_bundle(bundle, container_id) or ("", "")
    return Target(
        engine=Engine.CONTAINERD,
        id=container_id,
        name=next(iter(_names(spec)), container_id),
        runtime=state.runtime,
        runtime_args=state.args,
        bundle=bundle,
        rootfs=state.rootfs,
        pid=state.pid,
        status=state.status,
        spec=spec,
        image=image,
        image_digest=digest,
        namespace=namespace,
    )


def _root(bundle: Path) -> str:
    """The runtime's root, which the shim's options may move."""
    try:
        options = json.loads((bundle / "options.json").read_bytes())
    except (OSError, ValueError):
        return _RUNC_ROOT
    return str(options.get("root") or _RUNC_ROOT) if isinstance(options, dict) else _RUNC_ROOT


def stop(target: Target) -> None:
    """End a container at once, through containerd."""
    run(ctr(target.namespace, "task", "kill", "--signal", "SIGKILL", target.id), timeout_s=60, code=Code.ENGINE_FAILED)


def info(namespace: str, container_id: str, *, socket: str = "") -> Json:
    """What containerd keeps of a container: Image, Snapshotter, SnapshotKey, CreatedAt... ENGINE_FAILED when it knows none."""
    argv = ctr(namespace, "containers", "info", container_id, socket=socket)
    return as_object(json.loads(run(argv, timeout_s=20, code=Code.ENGINE_FAILED).stdout), "ctr containers info")


def socket_of(bundle: Path) -> str:
    """containerd's socket: within the shim CONTAINERD_ADDRESS is not set, but the state directory shows where it is."""
    return os.environ.get("CONTAINERD_ADDRESS") or str(bundle.parent.parent.parent / "containerd.sock")


def snapshots(namespace: str, snapshotter: str, *words: str, socket: str = "", check: bool = True) -> str:
    """What `ctr snapshots` says. ENGINE_FAILED when it fails and `check`."""
    argv = ctr(namespace, "snapshots", "--snapshotter", snapshotter, *words, socket=socket)
    return run(argv, timeout_s=20, check=check, code=Code.ENGINE_FAILED).stdout


def source_of_bundle(bundle: Path, container_id: str) -> tuple[str, str] | None:
    """Name and manifest digest of a container's image; None when the bundle is not containerd's or the root is no image."""
    if not is_bundle(bundle):
        return None
    namespace, socket = bundle.parent.name, socket_of(bundle)
    try:
        image = str(info(namespace, container_id, socket=socket).get("Image") or "")
    except SmrError:
        return None
    if not image:
        return None
    listed = run(ctr(namespace, "images", "ls", f"name=={image}", socket=socket), timeout_s=20, check=False)
    digests = [word for line in listed.stdout.splitlines()[1:] for word in line.split() if word.startswith("sha256:")]
    return image, digests[0] if digests else ""
