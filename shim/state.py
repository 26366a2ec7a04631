"""The record of one annotated container, from create to delete; also the journal by which a broken create is undone.

    RUN/containers/ROOT/ID/     RUN is SMR_RUN (/run/smr, a tmpfs); ROOT is the runtime's --root, "default" when not given
        state.json              the record below, replaced atomically
        netns                   link to the network namespace that SMR made for it (smr.shim.netns)
        created                 present between create and start: the tree is restored and stopped
        work/                   CRIU's log and configuration
        undo/                   what the root filesystem was before the checkpoint's layer was applied
        undo-tmpfs/             the same of each shared memory that had contents already
        lock                    flock: held by whoever works on this container
    RUN/containers/ROOT/ID~PID  being made or being removed by process PID: the directory above comes and goes by a rename

    STORE/restores/NAME/        CRIU's image directory of this restore, with hard links to blobs; gone after start

Every step is recorded before it is taken, so that `smr.shim.undo` can take back whatever a killed process had
done. The directory belongs to the runtime process that made it, then to `start` and `delete`. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from smr.proto.errors import Code, SmrError
from smr.proto.oci import as_list
from smr.shim import procs
from smr.shim.files import drop_tree, write_atomic

VERSION = 1
_HALF = "~"  # no character of a container's id


class Status(StrEnum):
    """Where a container stands. RESTORING ends in CREATED or COLD; CREATED becomes RESTORED at start.

    FAILED is a restore that failed and could not be taken back whole: it may not start cold, and is to be undone again.
    """

    RESTORING = "restoring"
    CREATED = "created"
    RESTORED = "restored"
    COLD = "cold"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage, in seconds since the record's `started`. `cpu_s`: processor time of this process, not of those it starts."""

    name: str
    start_s: float
    end_s: float
    cpu_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class Record:
    """What is known of one annotated container. `undo_*` members say what must be taken back if create fails.

    A process is its pid and the time it began (`procs.started`): `owner` restores, `pid` is the container's first.
    """

    id: str
    root: str
    bundle: str
    image: str
    version: int = VERSION
    status: Status = Status.RESTORING
    digest: str = ""
    rootfs: str = ""
    runtime: str = ""
    store: str = ""
    cgroups_path: str = ""
    owner_pid: int = 0
    owner_started: float = 0.0
    pid: int = 0
    pid_started: float = 0.0
    reason: str = ""
    reason_code: str = ""
    started: str = ""
    started_monotonic: float = 0.0
    started_boottime: float = 0.0
    stages: list[Stage] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    annotations: Mapping[str, str] = field(default_factory=dict)
    pages: Mapping[str, str | int] = field(default_factory=dict)
    gpus: Mapping[str, str] = field(default_factory=dict)
    tcp: Mapping[str, int] = field(default_factory=dict)
    capture: str = ""
    resume: str = ""
    resume_timeout_s: float = 0.0
    criu_options: tuple[str, ...] = ()
    criu_why: Mapping[str, str] = field(default_factory=dict)
    mounts_before: tuple[str, ...] = ()
    stopped_pids: tuple[int, ...] = ()
    undo_rootfs: bool = False
    undo_tmpfs: tuple[str, ...] = ()
    undo_merged: tuple[str, ...] = ()
    undo_spec: bool = False
    undo_told: bool = False
    undo_hooks: bool = False

    def stages_s(self) -> dict[str, float]:
        """Length of each stage."""
        return {stage.name: round(stage.end_s - stage.start_s, 6) for stage in self.stages}

    def busy_s(self) -> float:
        """The time in which SMR did anything: stages overlap, and `start` comes when the engine is ready."""
        total, end = 0.0, 0.0
        for stage in sorted(self.stages, key=lambda one: one.start_s):
            total += max(stage.end_s - max(stage.start_s, end), 0.0)
            end = max(end, stage.end_s)
        return round(total, 6)


class GoneError(SmrError):
    """Another process has dropped the record meanwhile; whoever wanted the container goes to the real runtime."""


class ContainerState:
    """The directory of one container. Created by `begin`, found by `find`, gone after `remove`."""

    def __init__(self, path: Path, record: Record) -> None:
        self.path = path
        self.record = record

    @property
    def criu_dir(self) -> Path:
        """CRIU's image directory of this restore, on the store's file system; STORE stands in the record."""
        return Path(self.record.store) / "restores" / str(self.path).strip("/").replace("/", "-")

    @property
    def work_dir(self) -> Path:
        """CRIU's log and configuration."""
        return self.path / "work"

    @property
    def undo_dir(self) -> Path:
        """Journal of the root filesystem's layer."""
        return self.path / "undo"

    def merged_dir(self, number: int) -> Path:
        """Journal of the layer that was put onto the folder `undo_merged[number]` of the record."""
        return self.path / "undo-tmpfs" / str(number)

    @property
    def created_marker(self) -> Path:
        """Present between create and start; the sh part of smr-runtime looks for it."""
        return self.path / "created"

    @property
    def spec_backup(self) -> Path:
        """The bundle's config.json as the engine wrote it, when it was edited."""
        return self.path / "config.json"

    def save(self) -> None:
        """Write the record. Not synced: it lives on a tmpfs and is worth nothing after a crash of the machine."""
        write_atomic(self.path / "state.json", json.dumps(asdict(self.record)).encode(), durable=False)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and record it, also when it fails."""
        start, worked = time.monotonic(), time.process_time()
        try:
            yield
        finally:
            self.add_stage(name, start, time.monotonic(), time.process_time() - worked)

    def add_stage(self, name: str, start: float, end: float, cpu_s: float = 0.0) -> None:
        """Record a stage by two readings of the monotonic clock."""
        zero = self.record.started_monotonic
        stage = Stage(name=name, start_s=round(start - zero, 6), end_s=round(end - zero, 6), cpu_s=round(cpu_s, 6))
        self.record.stages.append(stage)

    @contextlib.contextmanager
    def locked(self, *, wait: bool = True) -> Iterator[None]:
        """Exclude every other process that works on this container, and read the record again.

        Raises GoneError when another has dropped it meanwhile, CONTAINER_STATE when another works on it and not `wait`.
        """
        try:
            fd = os.open(self.path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise self._gone() from None
        try:
            self._flock(fd, wait)
            found = load_path(self.path) if self._has(fd) else None
            if found is None:
                raise self._gone()
            self.record = found.record
            yield
        finally:
            os.close(fd)

    def owner_alive(self) -> bool:
        """Whether the process that began the record exists: the create, also after it became the real runtime."""
        return procs.same(self.record.owner_pid, self.record.owner_started)

    def waits_for_start(self) -> bool:
        """Whether it is restored and stopped. `start` drops the marker at once, and writes the record when there is time."""
        return self.record.status is Status.CREATED and self.created_marker.exists()

    def task_alive(self) -> bool:
        """Whether the restored container's first process exists."""
        return procs.same(self.record.pid, self.record.pid_started)

    def remove(self) -> None:
        """Drop the directory and CRIU's, and the runtime root's when it was the last."""
        if self.record.store:
            drop_tree(self.criu_dir)
        doomed = _half(self.path)
        with contextlib.suppress(OSError):
            self.path.rename(doomed)
        drop_tree(doomed)
        _drop_parents(self.path)

    def _flock(self, fd: int, wait: bool) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SmrError(f"another process works on container {self.record.id}", code=Code.CONTAINER_STATE) from error

    def _has(self, fd: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(fd), (self.path / "lock").stat())
        return False

    def _gone(self) -> GoneError:
        return GoneError(f"container {self.record.id} was deleted meanwhile", code=Code.CONTAINER_NOT_FOUND)


def state_path(run: Path, root: str, container_id: str) -> Path:
    """Directory of a container; the same rule stands in shim/bin/smr-runtime."""
    return run / "containers" / (root or "default").lstrip("/") / container_id


def begin(run: Path, record: Record) -> ContainerState:
    """Make the directory of a container that is about to be restored. CONTAINER_STATE when there is one already."""
    path = state_path(run, record.root, record.id)
    record.started = datetime.now(UTC).isoformat(timespec="milliseconds")
    record.started_monotonic = time.monotonic()
    # One clock tick earlier: /proc counts starts of processes in ticks.
    record.started_boottime = time.clock_gettime(time.CLOCK_BOOTTIME) - 0.01
    record.owner_pid = os.getpid()
    record.owner_started = procs.started(os.getpid())
    _publish(path, record)
    return ContainerState(path, record)


def _publish(path: Path, record: Record) -> None:
    """Whole or not at all, by a rename. Another container's end may take the parent away in between: then once more."""
    half = _half(path)
    drop_tree(half)
    while True:
        try:
            half.mkdir(parents=True, mode=0o700)
            (half / "lock").touch(mode=0o600)
            ContainerState(half, record).save()
            half.rename(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            drop_tree(half)
            if not path.exists():
                raise SmrError(
                    f"cannot keep the state of container {record.id} in {path}: {error.strerror}",
                    hint="SMR_RUN names the state directory; the default is /run/smr",
                    code=Code.DISK_FULL if error.errno in {errno.ENOSPC, errno.EDQUOT} else Code.PERMISSION,
                    container=record.id,
                ) from error
            raise SmrError(
                f"container {record.id} is already known to SMR under {path}",
                hint=f"delete it with the engine, or 'smr gc' if the engine has forgotten it (state {path})",
                code=Code.CONTAINER_STATE,
                container=record.id,
            ) from error
        return


def _half(path: Path) -> Path:
    return path.with_name(f"{path.name}{_HALF}{os.getpid()}")


def find(run: Path, root: str, container_id: str) -> ContainerState | None:
    """The state of a container, or None when it is not ours."""
    return load_path(state_path(run, root, container_id)) if container_id else None


def all_states(run: Path) -> list[ContainerState]:
    """Every container SMR knows on this node, oldest first."""
    found = [state for path in _directories(run) if _HALF not in path.name and (state := load_path(path))]
    return sorted(found, key=lambda state: state.record.started)


def drop_half_made(run: Path) -> None:
    """Directories of processes that were killed while they made or removed one."""
    for path in _directories(run):
        maker = path.name.rpartition(_HALF)[2] if _HALF in path.name else ""
        if maker.isdigit() and not procs.alive(int(maker)):
            drop_tree(path)
            _drop_parents(path)


def _drop_parents(path: Path) -> None:
    """Remove the runtime root's directory when nothing is left in it."""
    for parent in path.parents:
        if parent.name == "containers":
            break
        try:
            parent.rmdir()
        except OSError:
            break


def _directories(run: Path) -> Iterator[Path]:
    """Directories of containers, half-made ones too. What is in them is left alone: CRIU mounts cgroups there."""
    for folder, names, files in os.walk(run / "containers"):
        if "state.json" in files or _HALF in Path(folder).name:
            names.clear()
            yield Path(folder)


def load_path(path: Path) -> ContainerState | None:
    """The state kept in `path`; None when there is none.

    A record that cannot be read (of a newer version) counts as a cold container: nobody undoes what nobody understands.
    """
    try:
        return ContainerState(path, _parse(json.loads((path / "state.json").read_bytes())))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError) as error:
        reason = f"the record {path / 'state.json'} cannot be read: {error!r}"
        return ContainerState(path, Record(id=path.name, root="", bundle="", image="", status=Status.COLD, reason=reason))


def _parse(document: Mapping[str, object]) -> Record:
    if document["version"] != VERSION:
        raise ValueError(f"version {document['version']}, needed {VERSION}")
    names = {f.name for f in fields(Record)}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in document.items() if key in names}
    values["status"] = Status(str(values["status"]))
    values["stages"] = [Stage(**stage) for stage in as_list(document["stages"], "stages") if isinstance(stage, dict)]
    values["warnings"] = [str(warning) for warning in as_list(document["warnings"], "warnings")]
    return Record(**values)  # type: ignore[arg-type]  # our own JSON; TypeError makes it unreadable
