"""A container that is captured once it is ready: a process of its own waits beside it, from `create` to the capture or its end.

    begin       in `create`, before the real runtime: starts the process, for containers alone that ask for it
    wait        until the container runs and is ready (smr.capture.ready, .after), at most smr.capture.timeout
    choose      in a pod that names no container: is this one the application? It must be alone, or own the port that is ready
    make        under a lock of the image's name: of several containers one makes the image, the others find it made

    RUN/captures/NAME-TAG   the lock; in it, how often the capture has failed. It goes when the image is made. After MOST_FAILURES
                            nobody tries until the next boot: each attempt pauses a container

Nothing of it stays resident but that process, and it needs no agent. It ends with its container. What comes of it is in the
container's record (`smr inspect`), the log and the journal of events: `checkpointed`, or `checkpoint_failed` with the reason.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smr.proto.annotations import Tcp
from smr.proto.capture import Capture, parse_capture
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec, load_spec
from smr.proto.pod import pod_of
from smr.shim import config as settings
from smr.shim import procs, readiness
from smr.shim.config import Config
from smr.shim.engines import runtime_state
from smr.shim.events import emit_failure
from smr.shim.log import canonical_line
from smr.shim.pods import siblings
from smr.shim.real_runtime import real_runtime
from smr.shim.state import GoneError, Record, Status, find

if TYPE_CHECKING:
    from smr.shim.engines.target import Target
    from smr.shim.oci_args import RuntimeCall

MOST_FAILURES = 3
# An image that cannot be restored for one of these may be replaced by a capture of the container that it failed for.
_UNFIT = frozenset(
    {
        Code.IMAGE_CORRUPT,
        Code.IMAGE_VERSION,
        Code.MOUNT_MISMATCH,
        Code.NAMESPACE_MISMATCH,
        Code.TERMINAL_MISMATCH,
        Code.RESTORE_GAVE_UP,
    }
)
_STARTED_S = 300.0
_POLL_S = (0.1, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the waiting process is told. `replaces` is the digest of an image of that name that did not fit, or empty."""

    id: str
    root: str
    bundle: str
    runtime: str
    pid_file: str = ""
    replaces: str = ""


class _Ended(Exception):  # noqa: N818  # no error: the container is not there any more
    pass


def begin(job: Job) -> None:
    """Start the waiting process. What keeps it from starting does not keep the container."""
    argv = [sys.executable, "-I", "-m", "smr.shim.capture", json.dumps(asdict(job))]
    null = subprocess.DEVNULL
    with contextlib.suppress(OSError):
        subprocess.Popen(argv, stdin=null, stdout=null, stderr=null, start_new_session=True, cwd="/")


def wanted_despite(error: SmrError, annotations: Mapping[str, str]) -> bool:
    """Whether a container that asked to fail rather than to start cold is to start: nobody has captured its image yet."""
    return error.code is Code.IMAGE_NOT_FOUND and parse_capture(annotations) is not None


def prepare(call: RuntimeCall, spec: Spec, config: Config, image: str = "", error: SmrError | None = None) -> Record | None:
    """Start the waiting process of a container that asks for it and starts cold; `image` is what was not restored, for `error`.

    Gives a record to keep for one of which there is none.
    """
    capture = parse_capture(spec.annotations)
    if capture is None:
        return None
    pid_file = call.option("pid-file") or ""
    job = Job(
        id=call.id,
        root=call.root,
        bundle=str(call.bundle),
        runtime=real_runtime(config),
        pid_file=str(Path(pid_file).absolute()) if pid_file else "",
        replaces=_digest(image, config) if error is not None and error.code in _UNFIT else "",
    )
    begin(job)
    if error is not None:
        return None
    return Record(
        id=call.id,
        root=call.root,
        bundle=str(call.bundle),
        image=capture.name,
        runtime=job.runtime,
        status=Status.COLD,
        reason="it asked for no restore",
        annotations=dict(spec.annotations),
    )


def main(argv: list[str]) -> int:
    """The waiting process, from beginning to end."""
    job = Job(**json.loads(argv[0]))
    config = settings.load()
    try:
        spec = load_spec(Path(job.bundle))
        capture = parse_capture(spec.annotations)
        if capture is not None:
            _Watch(job, config, spec, capture).run()
    except _Ended:
        canonical_line(config.log, "capture_ended", container=job.id, reason="the container ended before it was captured")
    except SmrError:
        return 1  # told where it was raised
    return 0


class _Watch:
    """One container's wait and capture."""

    def __init__(self, job: Job, config: Config, spec: Spec, capture: Capture) -> None:
        self._job, self._config, self._spec, self._capture = job, config, spec, capture
        self._pod = pod_of(spec.annotations)
        self._pid, self._fd = 0, -1

    def run(self) -> None:
        self._note("waits until the container is ready")
        try:
            self._pid = self._started()
            self._fd = os.pidfd_open(self._pid)
            self._await_ready()
            self._choose()
        except SmrError as error:
            self._tell(error, self._capture.name)
            self._note(f"gave up: {error}")
            raise
        self._make()

    def _tell(self, error: SmrError, image: str) -> None:
        emit_failure(self._config, "checkpoint_failed", self._job.id, self._spec.annotations, error, image)

    def _started(self) -> int:
        """Host pid of the container's init, once the container runs."""
        began, pause_s = time.monotonic(), _POLL_S[0]
        while time.monotonic() - began < _STARTED_S:
            if not (Path(self._job.bundle) / "config.json").exists():
                raise _Ended
            if not self._job.pid_file or Path(self._job.pid_file).exists():
                with contextlib.suppress(SmrError):
                    state = runtime_state.query(self._job.runtime, self._job.root, self._job.id)
                    if state.status == "stopped":
                        raise _Ended
                    if state.status == "running":
                        return state.pid
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _POLL_S[1])
        raise _Ended

    def _await_ready(self) -> None:
        """Raises TIMEOUT with what the last look found. An annotation that cannot be read raises at once."""
        capture, began = self._capture, time.monotonic()
        probe = readiness.parse(capture.ready, self._pid, (self._job.runtime, self._job.root), self._job.id)
        if capture.ready or capture.after_s is None:
            self._until(probe, began + capture.timeout_s)
        elif capture.after_s > capture.timeout_s:
            raise SmrError(
                f"smr.capture.after={capture.after_s:g} is later than smr.capture.timeout={capture.timeout_s:g}",
                hint="give it more time with smr.capture.timeout",
                code=Code.ANNOTATION_INVALID,
            )
        self._sleep(capture.after_s or 0.0)

    def _until(self, probe: Callable[[], str], deadline: float) -> None:
        pause_s = _POLL_S[0]
        while why := probe():
            if time.monotonic() > deadline:
                raise SmrError(
                    f"container {self._name} was not ready within {self._capture.timeout_s:g} s: {why}",
                    hint="see its log; smr.capture.ready and smr.capture.timeout say what is waited for, and how long",
                    code=Code.TIMEOUT,
                    container=self._job.id,
                )
            self._sleep(pause_s)
            pause_s = min(pause_s * 1.5, _POLL_S[1])

    def _sleep(self, seconds: float) -> None:
        """Wait, and end with the container."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if poll.poll(seconds * 1000):
            raise _Ended

    @property
    def _name(self) -> str:
        return self._pod.container if self._pod is not None else self._job.id

    def _choose(self) -> None:
        """Raises CONTAINER_NOT_FOUND where nothing shows that this container of a pod is the one that is meant."""
        if not self._capture.sole or self._pod is None:
            return
        port = readiness.port_of(self._capture.ready)
        others = () if port else siblings(Path(self._job.bundle), self._pod, self._job.runtime, self._job.root)
        if others or not readiness.listens(self._pid, port):
            what = f"it does not listen on port {port}" if port else "it listens on no TCP port, as an application would"
            found = f"{', '.join(others)} run in it too" if others else what
            raise SmrError(
                f"nothing shows that container {self._pod.container} is the one to capture in pod {self._pod.name}: {found}",
                hint=f"name it: smr.container={self._pod.container}, or smr.capture.ready with its port",
                code=Code.CONTAINER_NOT_FOUND,
                container=self._job.id,
            )

    def _make(self) -> None:
        from smr.shim import capture_key
        from smr.shim.checkpoint import checkpoint

        target = _target(self._job, self._config)
        facts, image = capture_key.facts_of(self._spec, self._config), capture_key.image_of(target.bundle, target.id)
        name = f"{self._capture.name}:{capture_key.tag(facts, image)}"
        with self._alone(name) as failures:
            digest = _digest(name, self._config)
            if digest and digest != self._job.replaces:
                self._note(f"found {name}, which another container was captured as")
                canonical_line(self._config.log, "capture_skipped", container=self._job.id, image=name, reason="it is there")
                return
            if failures() >= MOST_FAILURES:
                self._note(f"gave up: captures of {name} have failed {MOST_FAILURES} times")
                reason = f"captures failed {MOST_FAILURES} times: see those"
                canonical_line(self._config.log, "capture_skipped", container=self._job.id, image=name, reason=reason)
                return
            try:
                check_room(self._config, self._pid)
            except SmrError as error:
                self._tell(error, name)
                self._note(f"gave up: {error}")
                raise
            self._note(f"makes {name}")
            try:
                checkpoint(target, name, self._config, tcp=Tcp.CLOSE, stop=False)
            except SmrError as error:
                self._note(f"failed: {error}")
                failures(error.code is not Code.DISK_FULL)
                raise
            self._note(f"made {name}")

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[_Count]:
        """Only one container of this node is captured as `name` at a time. Gives who counts the failures."""
        folder = self._config.run / "captures"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / name.replace("/", "~")
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                self._lock(fd)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), path.stat()):
                        count = _Count(fd)
                        yield count
                        if not count():
                            path.unlink()
                        return
            finally:
                os.close(fd)

    def _lock(self, fd: int) -> None:
        told = False
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    self._note("waits for another container, which is being captured")
                told = True
                self._sleep(_POLL_S[1] / 4)
            else:
                return

    def _note(self, what: str) -> None:
        """In the container's record, where there is one."""
        state = find(self._config.run, self._job.root, self._job.id)
        if state is not None:
            with contextlib.suppress(GoneError, OSError), state.locked():
                state.record.capture = what
                state.save()


def check_room(config: Config, pid: int) -> None:
    """Raise DISK_FULL where the memory of the container would take what has to stay free of the store's disk.

    A kubelet evicts pods when little is left, so a capture must not be what fills the disk.
    """
    if not config.capture_free_share:
        return
    needed = sum(_resident_bytes(process.pid) for process in procs.tree(pid))
    place = next(path for path in (config.store, *config.store.parents) if path.exists())
    disk = os.statvfs(place)
    free, kept = disk.f_bavail * disk.f_frsize, int(disk.f_blocks * disk.f_frsize * config.capture_free_share)
    if free < needed + kept:
        raise SmrError(
            f"a capture of {needed >> 20} MiB would leave less than {kept >> 20} MiB free of the disk of {config.store}, "
            f"which has {free >> 20} MiB",
            hint="remove images ('smr images ls'), or see capture_free_share in /etc/smr/smr.toml",
            code=Code.DISK_FULL,
        )


def _resident_bytes(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


class _Count:
    """Failures, as a number in a file that is locked: call it for their number, with a number to add."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __call__(self, more: int = 0) -> int:
        text = os.pread(self._fd, 16, 0)
        count = (int(text) if text.isdigit() else 0) + more
        if more:
            os.pwrite(self._fd, b"%d" % count, 0)
        return count


def _target(job: Job, config: Config) -> Target:
    """The container, as the engine that runs it knows it."""
    from smr.shim.engines import containerd, locate, source_of_bundle
    from smr.shim.engines.target import Engine, Target

    bundle = Path(job.bundle)
    if containerd.is_bundle(bundle):
        return containerd.target_of(bundle, job.runtime)
    with contextlib.suppress(SmrError):
        return locate.find(job.id, engine=Engine.PODMAN, runtime=job.runtime)
    state = runtime_state.query(job.runtime, job.root, job.id)
    image, digest = source_of_bundle(bundle, job.id)
    return Target(
        engine=Engine.RUNC,
        id=job.id,
        name=job.id,
        runtime=state.runtime,
        runtime_args=state.args,
        bundle=bundle,
        rootfs=state.rootfs,
        pid=state.pid,
        status=state.status,
        spec=load_spec(bundle),
        image=image,
        image_digest=digest,
    )


def _digest(name: str, config: Config) -> str:
    from smr.images.store import Store

    try:
        return Store(config.store).resolve(name).digest
    except SmrError:
        return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
