"""`smr checkpoint`: from a running container of any engine to a committed image.

    quiesce     the container's own hook; clients wait from here
    gpu         GPU memory is brought into the memory of its processes
    freeze      the container's cgroup
    dump        CRIU through the real runtime, leave-running; it thaws for the parasite and freezes again. The bulk of the pages
                is read into segments beside it (smr.shim.lazydump)
    pages       the rest of them
    tcp         connections, by SMR (smr.shim.tcp)
    rootfs      what the container changed in its root as a layer, and the contents of /dev/shm
    thaw        the container runs again
    gpu_back    GPU memory goes back
    resume      the container's own hook; clients go on, `pause_s` ends here
    split       the bulk of the pages into segments, where they are in CRIU's files; layers are handed to the store
    commit      manifest, rename: the image exists from the last rename on, or not at all

The container is frozen while its files are read, so they fit its memory. With `stop` it stays frozen until the commit and is
then ended through its engine, so that nothing of it runs after the checkpoint. When this process is killed, its guard waits
for CRIU to end and gives the container back (smr.shim.hold); the half-made image is swept.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from smr.images.criu_layers import add_criu_layers, segments_folder
from smr.images.image import Image
from smr.images.ingest import Ingest
from smr.images.livesplit import Taken
from smr.images.store import Store
from smr.proto.annotations import Tcp, check_reference
from smr.proto.checkpoint import MOUNT_ANNOTATION, CheckpointConfig, Hooks, Host, Interface, LayerType, Source
from smr.proto.errors import Code, SmrError
from smr.proto.oci import parse_spec
from smr.shim import (
    cgroups,
    clocks,
    criu,
    criu_why,
    inotify,
    interfaces,
    nested_mounts,
    preflight,
    procs,
    rootfs,
    rootless,
    stdio,
    tmpfs,
)
from smr.shim.config import Config
from smr.shim.criu import Criu
from smr.shim.dump import asked_options, flags_of, options, session_options
from smr.shim.engines import locate, runtime_state
from smr.shim.engines.image_layers import layers_of_bundle
from smr.shim.engines.target import Target
from smr.shim.events import emit, emit_failure
from smr.shim.gpu.device_mounts import dump_externals, hook_destinations
from smr.shim.hold import Hold, Progress, Stages, held, hooks_of
from smr.shim.lazydump import dump_pages
from smr.shim.link_remap import relinked
from smr.shim.restore import external_destinations
from smr.shim.rootfs import Root
from smr.shim.run import run
from smr.shim.tcp.capture import capture

# An engine that has not sent its SIGKILL by then is not waited for.
_STOP_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished checkpoint. `pause_s` is how long clients waited, `stages_s` where the time went."""

    image: Image
    pause_s: float
    stages_s: dict[str, float]
    warnings: tuple[str, ...] = ()


def checkpoint(
    target: Target,
    name: str,
    config: Config,
    *,
    tcp: Tcp,
    stop: bool,
    compress: bool = False,
    hooks: Hooks | None = None,
    progress: Progress = lambda _: None,
) -> Result:
    """Checkpoint `target` as image `name`, its pages compressed or not; `hooks` are those of its annotations unless given.

    A failure leaves the container as it was and no trace in the store, but for one: when GPU memory did not come back after a
    dump that is good, the image is committed, and GPU_FAILED raised.
    """
    try:
        check_reference(name)
        rootless.check()
        tool = criu.find(config)
        wanted = hooks or hooks_of(target)
        with _alone(target) as found:
            result = _Checkpoint(
                target=found,
                config=config,
                tool=tool,
                tcp=tcp,
                stop=stop,
                compress=compress,
                hooks=wanted,
                stages=Stages(progress),
            ).make(name)
    except SmrError as error:
        emit_failure(config, "checkpoint_failed", target.id, target.spec.annotations, error, name)
        raise
    facts = {
        "container": target.id,
        "image": result.image.reference,
        "digest": result.image.digest,
        "size_bytes": result.image.size_bytes,
        "pause_s": result.pause_s,
        "stages_s": result.stages_s,
        "warnings": list(result.warnings),
    }
    emit(config, "checkpointed", facts, target.spec.annotations)
    return result


@contextlib.contextmanager
def _alone(target: Target) -> Iterator[Target]:
    """The container to ourselves, with the status it has now: another checkpoint pauses it, and two would thaw each other's.

    The lock is a flock of the bundle's directory, so there is no file to leave.
    """
    fd = os.open(target.bundle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _not_now(target, "is being checkpointed by another 'smr checkpoint'", "try again when that has ended") from None
        status = runtime_state.status(target.runtime, target.runtime_args, target.id)
        if status not in {"running", "paused"}:
            raise _not_now(target, f"is {status}: needed running", "start it first")
        yield replace(target, status=status)
    finally:
        os.close(fd)


def _not_now(target: Target, what: str, hint: str) -> SmrError:
    return SmrError(f"container {target.name or target.id} {what}", hint=hint, code=Code.CONTAINER_STATE, container=target.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checkpoint:
    target: Target
    config: Config
    tool: Criu
    tcp: Tcp
    stop: bool
    compress: bool
    hooks: Hooks
    stages: Stages

    def make(self, name: str) -> Result:
        stages = self.stages
        chosen = options() | session_options(self.target.pid) | inotify.dump_options(self.target.pid)
        chosen |= asked_options(self.target.spec.annotations)
        nested = nested_mounts.of_container(self.target.pid, self.target.spec, self.target.rootfs)
        chosen = stdio.merged(chosen, stdio.dump_externals(self.target.pid), nested_mounts.dump_externals(nested))
        flags_of(self.target.runtime)  # asks the runtime, which need not be while all wait
        lost: SmrError | None = None
        root = rootfs.find(self.target, self.config)
        with (
            Store(self.config.store).ingest() as ingest,
            held(self.target, self.config, self.hooks, stages) as hold,
            capture(self.target.pid, self.tcp) as tcp,
        ):
            hold.quiesce()
            hold.take_gpu()
            hooked = nested
            if hold.gpu is not None:
                chosen = stdio.merged(chosen, dump_externals(self.target.pid, self.target.spec))
                hooked += hook_destinations(self.target.pid, self.target.spec)
            hold.freeze()
            pages, warnings = _capture(
                self.target, root, ingest, self.tool, chosen, hold, self.config.log.parent, compress=self.compress
            )
            with stages.stage("tcp"):
                tcp.take()
            # While it holds still: afterwards it may open other sockets than those of the image, or end.
            seen = _interfaces(self.target)
            if not self.stop:
                tcp.release()
                lost = _release(hold)
            with stages.stage("describe"):
                facts = self._describe(ingest.path / "criu", seen, hold, chosen)
                facts = replace(facts, external_mounts=(*facts.external_mounts, *hooked))
                facts = replace(facts, memory_bytes=pages.memory_bytes) if pages is not None else facts
                facts = replace(facts, connections=tcp.write(ingest.path / "criu"))
            with stages.stage("split"):
                _add_layers(self.target, ingest, pages, compress=self.compress)
            with stages.stage("commit"):
                image = ingest.commit(name, facts)
            if self.stop:
                hold.abandon()
                with stages.stage("stop"):
                    tcp.mute(self.config.run)
                    end_frozen(self.target, hold.thaw)
                    tcp.outlive()
        if lost is not None:
            raise _lost(self.target, image, lost)
        return Result(
            image=image, pause_s=hold.pause_s(), stages_s=stages.seconds, warnings=(*warnings, *tcp.warnings, *hold.warnings)
        )

    def _describe(self, folder: Path, seen: tuple[Interface, ...], hold: Hold, chosen: Mapping[str, str]) -> CheckpointConfig:
        facts = _describe(self.target, folder, self.tool, self.tcp, seen)
        facts = _with_options(facts, folder, chosen)
        halted = {process.ns_pid for process in hold.stopped}
        return replace(
            facts,
            tasks=tuple(replace(task, stopped=True) if task.pid in halted else task for task in facts.tasks),
            pause_s=hold.pause_s(),
            stages_s=dict(self.stages.seconds),
            gpu=hold.gpu.state if hold.gpu else None,
            hooks=self.hooks,
        )


def _release(hold: Hold) -> SmrError | None:
    """Give the container back; what went wrong, when the GPU did: the dump is good all the same."""
    try:
        hold.release()
    except SmrError as error:
        if error.code in {Code.GPU_FAILED, Code.TIMEOUT} and hold.gpu is not None:
            return error
        raise
    return None


def _lost(target: Target, image: Image, error: SmrError) -> SmrError:
    return SmrError(
        f"container {target.name or target.id} was checkpointed, and then lost its GPU: {error.message}",
        hint=f"end it, and start it from {image.reference}, which is complete",
        code=Code.GPU_FAILED,
        container=target.id,
        image=image.reference,
    )


def _capture(
    target: Target, root: Root, ingest: Ingest, tool: Criu, chosen: Mapping[str, str], hold: Hold, logs: Path, *, compress: bool
) -> tuple[Taken | None, tuple[str, ...]]:
    """Everything that needs the container to hold still; returns pages that are not CRIU's to dump, and warnings.

    CRIU's log of a failure is kept in `logs`.
    """
    folder = ingest.path / "criu"
    folder.mkdir(mode=0o700)
    out, stage = segments_folder(ingest), hold.stages.stage
    pages = dump_pages(
        target, folder, ingest.path / "work", chosen, tool, hold.guard, logs, out=out, compress=compress, stage=stage
    )
    with hold.stages.stage("rootfs"), relinked(folder, target.pid):
        warnings = _capture_files(target, root, ingest.path)
    return pages.taken, tuple(warning for warning in (*warnings, pages.why) if warning)


def end_frozen(target: Target, thaw: Callable[[], None]) -> None:
    """End a frozen container through its engine before it runs on: its SIGKILL waits until the thaw, runc's or ours."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        stopping = pool.submit(locate.stop, target)
        deadline = time.monotonic() + _STOP_S
        while not stopping.done() and not procs.kill_pending(target.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        if procs.alive(target.pid) and not procs.kill_pending(target.pid):
            run(target.runtime_command("kill", target.id, "KILL"), timeout_s=30, check=False)
        thaw()
        stopping.result()


def _capture_files(target: Target, root: Root, folder: Path) -> tuple[str, ...]:
    """Write the layers; what they lack, in words."""
    warnings: tuple[str, ...] = ()
    if root.overlay is not None or not target.spec.rootfs_readonly:
        warnings = root.capture(folder / "rootfs.tar", target.spec)
    tmpfs.capture(target.spec, folder)
    return warnings


def _add_layers(target: Target, ingest: Ingest, pages: Taken | None, *, compress: bool) -> None:
    """Hand the captured files to the store, the pages as segments."""
    add_criu_layers(ingest.path / "criu", ingest, compress=compress, done=pages.land() if pages and not compress else None)
    if (ingest.path / "rootfs.tar").exists():
        ingest.add(ingest.path / "rootfs.tar", LayerType.ROOTFS)
    for destination, file in tmpfs.captured(ingest.path).items():
        ingest.add(file, LayerType.TMPFS, annotations={MOUNT_ANNOTATION: destination})
    for name, content in target.engine_files.items():
        file = ingest.path / name
        file.write_bytes(content)
        ingest.add(file, LayerType.ENGINE, title=name)


def _interfaces(target: Target) -> tuple[Interface, ...]:
    """Interfaces of the container's network namespace, or of the host's where it has none."""
    return interfaces.of_namespace(Path(f"/proc/{target.pid}/ns/net"))


def _describe(target: Target, folder: Path, tool: Criu, tcp: Tcp, seen: tuple[Interface, ...]) -> CheckpointConfig:
    from smr.images import criu_sockets
    from smr.images.criu_files import tasks
    from smr.images.held_files import held_files
    from smr.images.mount_sharing import make_private
    from smr.images.stdio_files import stdio_of
    from smr.shim.mounts import bound_paths

    sockets = criu_sockets.facts(folder, {one.index: one.name for one in seen})
    make_private(folder)
    return CheckpointConfig(
        created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        host=_host(target, tool),
        source=Source(
            engine=target.engine.value,
            container_id=target.id,
            container_name=target.name,
            image=target.image,
            image_digest=target.image_digest,
            image_layers=layers_of_bundle(target.bundle, target.id),
            rootfs=str(target.rootfs),
        ),
        spec=target.spec.document,
        external_mounts=external_destinations(target.spec.document),
        stdio=stdio_of(folder),
        held_files=held_files(folder, bound_paths(target.spec, target.rootfs, but=tmpfs.external(target.spec).keys())),
        tasks=tasks(folder),
        addresses=interfaces.plain(seen) if "network" in target.spec.namespaces else (),
        interfaces=seen,
        bound_addresses=sockets.addresses,
        bound_devices=sockets.devices,
        peers=sockets.peers,
        ipv6=sockets.ipv6,
        tcp=Tcp.CLOSE.value if tcp is Tcp.CLOSE else Tcp.ESTABLISHED.value,
        memory_bytes=sum(file.stat().st_size for file in folder.glob("pages-*.img")),
    )


def _with_options(facts: CheckpointConfig, folder: Path, chosen: Mapping[str, str]) -> CheckpointConfig:
    """The options that the dump had, those that a restore needs, and why; the clocks. What no copy may have leaves the dump."""
    from smr.images.criu_needs import needs
    from smr.images.wipe import wipe

    wipe(folder)
    found = needs(folder)
    asked = asked_options(parse_spec(facts.spec).annotations)
    why = criu_why.of_dump(chosen, {**found.dump, **found.restore}, asked)
    return replace(
        facts,
        criu_options=tuple(found.restore),
        criu_dump=dict(chosen),
        criu_why={**why, **found.restore},
        clocks_s=clocks.of_dump(folder),
    )


def _host(target: Target, tool: Criu) -> Host:
    version = run([target.runtime, "--version"], timeout_s=20, check=False).stdout
    return Host(
        architecture=platform.machine(),
        kernel=platform.release(),
        criu=tool.version_text,
        runtime=(version.splitlines() or [Path(target.runtime).name])[0].strip(),
        cpu_model=preflight.cpu_model(),
        cpu_flags=preflight.cpu_flags(),
        cgroup=cgroups.version(),
    )
