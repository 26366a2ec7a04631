"""`create` as a restore: from the annotation to a tree of stopped processes that the engine takes for a created container.

    locate      image by name in the store, leased against removal, its configuration verified
    preflight   image against container and host (smr.shim.preflight)
    prefetch    the pages are read ahead by a process of its own while the rest goes on
    network     the network namespace: made where the spec wants one, `lo` up, its hooks run (smr.shim.netns)
    rootfs      the checkpoint's writable layer onto the mounted root, with a journal; then /dev/shm
    rewrite     CRIU's small images into a private directory, pages as links, addresses of sockets (smr.shim.addresses)
    create      `runc restore`, leave-stopped
    mounts      what the new spec mounts and the image has not; flags of all mounts
    fill        the pages that are not CRIU's into the stopped tree (smr.shim.pages)
    gpu         GPU memory back, with the rest of the container still stopped (smr.shim.gpu.revive)
    adopt       hostname and `lo` of the new container

Until `create` returns nothing of the container has run, so every failure can be undone (smr.shim.undo), by this process, or
by its guard when it is killed. The source image's identity is looked up beside all this and judged before the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from smr.images import criu_uts
from smr.images.image import Image
from smr.images.store import Store
from smr.proto.annotations import Annotations, Check
from smr.proto.checkpoint import CheckpointConfig, LayerType
from smr.proto.mount_list import clean
from smr.proto.oci import Mount, Spec, parse_spec
from smr.shim import (
    criu,
    engines,
    extra_mounts,
    identity,
    lsm,
    mount_flags,
    mount_points,
    mountinfo,
    mounts,
    namespaces,
    nested_mounts,
    netns,
    pages,
    pods,
    preflight,
    rights,
    stdio,
    tmpfs,
    userns,
)
from smr.shim.config import Config
from smr.shim.criu import Criu
from smr.shim.files import drop_tree, write_atomic
from smr.shim.netns import Network
from smr.shim.oci_args import RuntimeCall
from smr.shim.pages import Delivery
from smr.shim.resume import write_marker
from smr.shim.runtime_restore import external_options, note_pid, run_restore
from smr.shim.state import ContainerState, Status
from smr.shim.tcp import mode

if TYPE_CHECKING:
    from smr.shim.gpu.revive import Revival

# Below this CRIU has read the pages before another Python has started.
_PREFETCH_FROM_BYTES = 64 << 20


def restore(call: RuntimeCall, spec: Spec, annotations: Annotations, config: Config, state: ContainerState) -> None:
    """Restore into the bundle of `call`, leaving the tree stopped. Raises SmrError with nothing undone: the caller undoes."""
    with contextlib.ExitStack() as stack:
        source = _SourceLookup(call)
        stack.callback(source.join)
        with state.stage("locate"):
            image = locate(call, annotations, config, state, stack)
        with state.stage("preflight"):
            tool = criu.find(config)
            _note_resume(state, image, annotations)
            preflight.compare(image.config, spec, annotations)
            image.check()
            delivery = pages.choose(image, annotations.pages)
            externals = external_options(image, spec, annotations)
        prefetch = start_prefetch(config, image, state)
        stack.callback(stop_prefetch, prefetch)
        with state.stage("network"):
            net = stack.enter_context(netns.ready(spec, state))
            annotations = replace(annotations, tcp=mode.choose(image.config, net.there, annotations.tcp))
            connections = stack.enter_context(mode.held(image, net.there, annotations, state, config.run))
        gpu = stack.enter_context(revival(image.config, spec, annotations, config, state))
        with state.stage("rootfs"):
            apply_rootfs(state, image, spec)
            tmpfs.fill(state, image, spec, annotations)
        with state.stage("rewrite"):
            stack.enter_context(criu_folder(state))
            labels = rewrite(state, image, spec, annotations, delivery, net)
        if gpu is not None:
            with state.stage("gpu_check"):
                gpu.check()
        with state.stage("create"), mounts.explained(image.config, spec, annotations):
            apart = nested_mounts.any_below(spec, annotations)
            create(call, image, annotations, delivery.options | externals | labels, tool, state, net, apart=apart)
        fit_mounts(state, image, spec, annotations)
        state.save()
        if gpu is not None:
            _judge(state, image, source, annotations)  # what is wrong anyway need not reach a GPU
            with state.stage("gpu_devices"):
                gpu.prepare(state.record.pid)
        with state.stage("fill"):
            state.record.pages = pages.fill_tree(delivery, image, state.record.pid, config, gpu)
        if gpu is None:
            _judge(state, image, source, annotations)
        else:
            state.record.gpus = dict(gpu.finish())
            state.record.warnings += gpu.warnings
        with state.stage("adopt"):
            adopt(state, image, spec, connections)
        state.record.status = Status.CREATED
        write_marker(state)
        state.save()


def locate(
    call: RuntimeCall, annotations: Annotations, config: Config, state: ContainerState, stack: contextlib.ExitStack
) -> Image:
    """The image, leased until `stack` is closed, and allowed to this container."""
    pods.check_keys(annotations)
    image = stack.enter_context(Store(config.store).leased(annotations.restore))
    state.record.digest = image.digest
    state.record.stopped_pids = tuple(task.pid for task in image.config.tasks if task.stopped)
    pods.admit(image.config, annotations, call.bundle, config)
    return image


def create(
    call: RuntimeCall,
    image: Image,
    annotations: Annotations,
    options: Mapping[str, str],
    tool: Criu,
    state: ContainerState,
    net: Network,
    *,
    apart: bool,
) -> None:
    """The runtime's restore, into the namespace that is ready; the first process is in the record then."""
    with net.in_spec():
        run_restore(call, image, annotations, options, tool, state, apart=apart)
    note_pid(call, state)
    net.hand_over(state.record.pid)
    state.save()


def _note_resume(state: ContainerState, image: Image, annotations: Annotations) -> None:
    if annotations.resume or image.config.hooks.quiesce or image.config.hooks.resume:
        state.record.resume, state.record.resume_timeout_s = resume_hook(image, annotations)


@contextlib.contextmanager
def revival(
    image: CheckpointConfig, spec: Spec, annotations: Annotations, config: Config, state: ContainerState
) -> Iterator[Revival | None]:
    """What brings the GPU back; None, and nothing imported, for an image without one."""
    if image.gpu is None:
        yield None
        return
    from smr.shim.gpu import revive

    with revive.begin(image, spec, annotations, config, state.stage) as found:
        yield found


def fit_mounts(state: ContainerState, image: Image, spec: Spec, annotations: Annotations) -> None:
    """The stopped tree gets the mounts that its new spec has and the image has not, then all mounts their flags."""
    pid, rootfs = state.record.pid, state.record.rootfs
    with state.stage("mounts"):
        state.record.warnings += extra_mounts.give(pid, spec, rootfs, annotations, left_out=mounts.of_node(image.config))
        mount_flags.keep_to_spec(pid, spec, rootfs, annotations)


def adopt(state: ContainerState, image: Image, spec: Spec, connections: Callable[[int], None]) -> None:
    """What the stopped tree has of its new container rather than of the checkpoint; what it cannot have is a warning."""
    namespaces.adopt(state.record.pid, spec)
    state.record.warnings += identity.adopt(state.record.pid, parse_spec(image.config.spec), spec)
    connections(state.record.pid)
    tell(state, image, spec)


def tell(state: ContainerState, image: Image, spec: Spec) -> None:
    """/run/smr/restored.json in the container; a root that cannot be written is a warning."""
    from smr.shim import network, restored

    own = "network" in spec.namespaces
    facts = restored.Restored(
        image=image.name,
        digest=image.digest,
        created=image.config.created,
        container=state.record.id,
        hostname=spec.hostname,
        addresses=network.addresses(state.record.pid) if own else (),
        old_addresses=image.config.addresses,
        gpus=state.record.gpus,
        environment=restored.environment_of(spec.document),
    )
    state.record.undo_told = True
    state.save()
    warning = restored.write_restored(state.record.pid, facts, Path(state.record.rootfs))
    if warning:
        state.record.warnings.append(warning)


def resume_hook(image: Image, annotations: Annotations) -> tuple[str, float]:
    """The hook that runs after `start`, and its timeout: the annotation's, else the checkpoint's own."""
    from smr.shim.quiesce import parse_hooks

    hooks = image.config.hooks
    _, resume = parse_hooks(hooks.quiesce, annotations.resume or hooks.resume)
    return resume.text if resume.steps else "", annotations.hook_timeout_s or hooks.timeout_s


def start_prefetch(config: Config, image: Image, state: ContainerState) -> subprocess.Popen[bytes] | None:
    """Read the image's pages ahead in a process of its own: charged to us, gone when it is done.

    The file that would cancel it is never made: its name tells undo whose process that is, when this one was killed.
    """
    if (
        sum(layer.size_bytes for kind in (LayerType.PAGES, LayerType.SEGMENT) for layer in image.layers_of(kind))
        < _PREFETCH_FROM_BYTES
    ):
        return None
    argv = [sys.executable, "-I", "-m", "smr.images.prefetch", str(config.store), image.digest, str(state.path / "cancel")]
    argv += ["--share", str(config.cache_share)]
    null = subprocess.DEVNULL
    try:
        return subprocess.Popen(argv, stdin=null, stdout=null, stderr=null, start_new_session=True)
    except OSError:
        return None  # a restore without read-ahead is slower, not wrong


def stop_prefetch(process: subprocess.Popen[bytes] | None) -> None:
    """After CRIU has read the pages, or when nobody will, there is nothing left to read ahead."""
    if process is not None:
        process.kill()
        process.wait()


def apply_rootfs(state: ContainerState, image: Image, spec: Spec) -> None:
    """Apply the checkpoint's writable layer; the journal's place is recorded before the first change."""
    from smr.images.layer import apply_layer
    from smr.shim.device_rules import usable
    from smr.shim.rootfs import layers_of

    layers = image.layers_of(LayerType.ROOTFS)
    if not layers:
        return
    state.undo_dir.mkdir(mode=0o700)
    state.record.undo_rootfs = True
    state.save()
    root, owners = Path(state.record.rootfs), userns.shifts(parse_spec(image.config.spec), spec)
    for layer in layers:
        apply_layer(layer.path, root, state.undo_dir, owners=owners, devices=usable(spec), layers=layers_of(root))


@contextlib.contextmanager
def criu_folder(state: ContainerState) -> Iterator[None]:
    """CRIU's directory of this restore, new; kept open, which tells `smr gc` that it is in use."""
    # One may be left from before a reboot, which took the record with it.
    drop_tree(state.criu_dir)
    state.criu_dir.mkdir(mode=0o700, parents=True)
    fd = os.open(state.criu_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield
    finally:
        os.close(fd)


def rewrite(
    state: ContainerState, image: Image, spec: Spec, annotations: Annotations, delivery: Delivery, net: Network
) -> dict[str, str]:
    """CRIU's directory of this restore, edited for the new container; also the spec, where the annotations add mounts.

    Returns options of CRIU that follow from it.
    """
    image.materialize(state.criu_dir)
    state.work_dir.mkdir(mode=0o700)
    delivery.prepare(state.criu_dir, state.work_dir)
    mount_points.prepare(image.config, spec, annotations, state.record.rootfs)
    if annotations.mounts:
        _add_mounts(state, spec, annotations)
    old = parse_spec(image.config.spec)
    state.record.warnings += rights.restrict(state.criu_dir, old, spec)
    if uts := spec.namespaces.get("uts"):
        # CRIU names the namespace that it joins: a pod's, which others are in.
        criu_uts.set_hostname(state.criu_dir, namespaces.hostname_of(Path(uts)))
    net.fit_images(image, annotations)
    mounts.fit_files(image.config, spec, annotations, state.criu_dir)
    options = stdio.fit(image.config, spec, state.criu_dir)
    if "user" in spec.namespaces:
        userns.adapt(state.criu_dir, old, spec)
        _open_to_user_namespace(state.criu_dir)
    labels = lsm.apply(state.criu_dir, old, spec)
    state.record.warnings += labels.warnings
    return options | dict(labels.options)


def _open_to_user_namespace(folder: Path) -> None:
    """In a user namespace CRIU opens images as the container's root, who is somebody else here. The store above stays 0700."""
    folder.chmod(0o711)
    for file in folder.iterdir():
        if file.stat().st_nlink == 1:  # others are links to blobs, which all may read
            file.chmod(0o644)


def _add_mounts(state: ContainerState, spec: Spec, annotations: Annotations) -> None:
    """The runtime matches external mounts by destination in its spec, so smr.mount.* become entries there."""
    import json

    path = Path(state.record.bundle) / "config.json"
    shutil.copyfile(path, state.spec_backup)
    state.record.undo_spec = True
    state.save()
    kept = [entry for entry in _raw_mounts(spec) if clean(str(entry.get("destination", ""))) not in annotations.mounts]
    added = [
        {"destination": destination, "type": "bind", "source": source, "options": ["rbind"]}
        for destination, source in annotations.mounts.items()
    ]
    write_atomic(path, json.dumps({**spec.document, "mounts": kept + added}).encode(), mode=path.stat().st_mode & 0o777)


def _raw_mounts(spec: Spec) -> list[dict[str, object]]:
    mounts = spec.document.get("mounts")
    return [entry for entry in mounts if isinstance(entry, dict)] if isinstance(mounts, list) else []


class _SourceLookup(threading.Thread):
    """Which image the container is of, asked of its engine beside the restore."""

    def __init__(self, call: RuntimeCall) -> None:
        super().__init__(name="smr-source", daemon=True)
        self.found = ("", "")
        self.layers = ""
        self._call = call
        self.start()

    def run(self) -> None:
        """Ask; no answer is no error."""
        layers = threading.Thread(target=self._look_up_layers, daemon=True)
        layers.start()
        self.found = engines.source_of_bundle(self._call.bundle, self._call.id)
        layers.join()

    def _look_up_layers(self) -> None:
        from smr.shim.engines.image_layers import layers_of_bundle

        self.layers = layers_of_bundle(self._call.bundle, self._call.id)


def _judge(state: ContainerState, image: Image, source: _SourceLookup, annotations: Annotations) -> None:
    with state.stage("source"):
        if annotations.rootfs is Check.CHECK:
            source.join()
            preflight.check_source(image.config, *source.found, source.layers)


def mounts_below(rootfs: str) -> tuple[str, ...]:
    """Mount points in the root before a restore; whatever comes later is ours to unmount."""
    return tuple(point for point in mountinfo.points() if point.startswith(f"{rootfs}/"))


def external_mounts(spec: Spec) -> Iterator[Mount]:
    """Bind mounts of a spec: what runc and crun hand to CRIU as external."""
    return (mount for mount in spec.mounts if mount.is_bind)


def external_destinations(document: object) -> tuple[str, ...]:
    """Destinations of the bind mounts of a spec document."""
    return tuple(mount.destination for mount in external_mounts(parse_spec(document if isinstance(document, dict) else {})))
