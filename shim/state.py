"""The record of one annotated container, from create to delete; also the journal by which a broken create is undone.

    RUN/containers/ROOT/ID/     RUN is SMR_RUN (/run/smr, a tmpfs); ROOT is the runtime's --root, "default" when not given
        state.json              the record below, replaced atomically
        created                 present between create and start: the tree is restored and stopped
        work/                   CRIU's log and configuration
        undo/                   what the root filesystem was before the checkpoint's layer was applied
        lock                    flock: held by whoever works on this container

    STORE/restores/NAME/        CRIU's image directory of this restore, with hard links to blobs; gone after start

Every step is recorded before it is taken, so that `undo` in `smr.shim.restore` can take back whatever a killed process had
done. The directory belongs to the runtime process that made it, then to `start` and `delete`. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from smr.proto.errors import Code, SmrError
from smr.shim.files import write_atomic


class Status(StrEnum):
    """Where a container stands. RESTORING ends in CREATED or COLD; CREATED becomes RESTORED at start."""

    RESTORING = "restoring"
    CREATED = "created"
    RESTORED = "restored"
    COLD = "cold"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage, in seconds since the record's `started`."""

    name: str
    start_s: float
    end_s: float


@dataclass(slots=True, kw_only=True)
class Record:
    """What is known of one annotated container. `undo_*` members say what must be taken back if create fails."""

    id: str
    root: str
    bundle: str
    image: str
    status: Status = Status.RESTORING
    digest: str = ""
    rootfs: str = ""
    runtime: str = ""
    store: str = ""
    cgroups_path: str = ""
    owner_pid: int = 0
    pid: int = 0
    reason: str = ""
    reason_code: str = ""
    started: str = ""
    started_monotonic: float = 0.0
    started_boottime: float = 0.0
    stages: list[Stage] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    annotations: Mapping[str, str] = field(default_factory=dict)
    criu_options: tuple[str, ...] = ()
    mounts_before: tuple[str, ...] = ()
    stopped_pids: tuple[int, ...] = ()
    undo_rootfs: bool = False
    undo_spec: bool = False

    def stages_s(self) -> dict[str, float]:
        """Length of each stage."""
        return {stage.name: round(stage.end_s - stage.start_s, 6) for stage in self.stages}


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
        start = time.monotonic()
        try:
            yield
        finally:
            self.add_stage(name, start, time.monotonic())

    def add_stage(self, name: str, start: float, end: float) -> None:
        """Record a stage by two readings of the monotonic clock."""
        zero = self.record.started_monotonic
        self.record.stages.append(Stage(name=name, start_s=round(start - zero, 6), end_s=round(end - zero, 6)))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude every other process that works on this container."""
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def remove(self) -> None:
        """Drop the directory, and the runtime root's when it was the last."""
        shutil.rmtree(self.path, ignore_errors=True)
        for parent in self.path.parents:
            if parent.name == "containers":
                break
            try:
                parent.rmdir()
            except OSError:
                break


def state_path(run: Path, root: str, container_id: str) -> Path:
    """Directory of a container; the same rule stands in shim/bin/smr-runtime."""
    return run / "containers" / (root or "default").lstrip("/") / container_id


def begin(run: Path, record: Record) -> ContainerState:
    """Make the directory of a container that is about to be restored. CONTAINER_STATE when there is one already."""
    path = state_path(run, record.root, record.id)
    try:
        path.mkdir(parents=True, mode=0o700)
    except FileExistsError as error:
        raise SmrError(
            f"container {record.id} is already known to SMR under {path}",
            hint=f"delete it with the engine, or 'smr gc' if the engine has forgotten it (state {path})",
            code=Code.CONTAINER_STATE,
            container=record.id,
        ) from error
    now = time.monotonic()
    record.started = datetime.now(UTC).isoformat(timespec="milliseconds")
    record.started_monotonic = now
    # One clock tick earlier: /proc counts starts of processes in ticks.
    record.started_boottime = time.clock_gettime(time.CLOCK_BOOTTIME) - 0.01
    record.owner_pid = os.getpid()
    state = ContainerState(path, record)
    state.save()
    return state


def find(run: Path, root: str, container_id: str) -> ContainerState | None:
    """The state of a container, or None when it is not ours."""
    path = state_path(run, root, container_id)
    return load_path(path) if container_id and path.is_dir() else None


def all_states(run: Path) -> list[ContainerState]:
    """Every container SMR knows on this node, oldest first."""
    found = [state for file in (run / "containers").glob("**/state.json") if (state := load_path(file.parent))]
    return sorted(found, key=lambda state: state.record.started)


def load_path(path: Path) -> ContainerState | None:
    try:
        document = json.loads((path / "state.json").read_bytes())
    except FileNotFoundError:
        # Killed between mkdir and the first save: nothing was done yet.
        return ContainerState(path, Record(id=path.name, root="", bundle="", image=""))
    names = {f.name for f in fields(Record)}
    values = {key: value for key, value in document.items() if key in names}
    values["status"] = Status(values["status"])
    values["stages"] = [Stage(**stage) for stage in values["stages"]]
    values["criu_options"] = tuple(values["criu_options"])
    values["mounts_before"] = tuple(values["mounts_before"])
    values["stopped_pids"] = tuple(values["stopped_pids"])
    return ContainerState(path, Record(**values))
