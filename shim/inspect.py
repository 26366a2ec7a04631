"""What users see of the containers SMR knows: `smr ps`, `smr inspect`, `smr trace`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from smr.proto.errors import Code, SmrError
from smr.shim.config import Config
from smr.shim.pages import lazy_progress
from smr.shim.state import ContainerState, Status, all_states


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One container in one line. `status` is the record's, or `exited`, or `broken` for a create that was killed."""

    id: str
    status: str
    image: str
    digest: str
    started: str
    total_s: float
    pid: int
    reason: str
    reason_code: str

    def as_json(self) -> dict[str, object]:
        """All members."""
        return asdict(self)

    def details(self, state: ContainerState) -> dict[str, object]:
        """What `smr inspect` adds."""
        record = state.record
        return {
            "bundle": record.bundle,
            "runtime": record.runtime,
            "runtime_root": record.root,
            "annotations": {key: value for key, value in record.annotations.items() if key.startswith("smr.")},
            "criu_options": list(record.criu_options),
            "criu_why": dict(record.criu_why),
            "warnings": list(record.warnings),
            "pages": dict(record.pages),
            "gpus": dict(record.gpus),
            "tcp": dict(record.tcp),
            "resume_hook": record.resume,
            "capture": record.capture,
            "lazy": lazy_progress(state.work_dir),
            "stages_s": record.stages_s(),
            "stages": [asdict(stage) for stage in record.stages],
        }


def summaries(config: Config) -> list[Summary]:
    """All containers, oldest first."""
    return [summary_of(state) for state in all_states(config.run)]


def summary_of(state: ContainerState) -> Summary:
    """One container."""
    record = state.record
    status = record.status.value
    if record.status is Status.CREATED and not state.waits_for_start():
        status = Status.RESTORED.value
    if record.status in {Status.CREATED, Status.RESTORED} and not state.task_alive():
        status = "exited"
    if record.status is Status.RESTORING and not state.owner_alive():
        status = "broken"
    return Summary(
        id=record.id,
        status=status,
        image=record.image,
        digest=record.digest,
        started=record.started,
        total_s=record.busy_s(),
        pid=record.pid,
        reason=record.reason,
        reason_code=record.reason_code,
    )


def find(config: Config, name: str) -> ContainerState:
    """A container by id, id prefix, or the name its engine knows it by."""
    states = all_states(config.run)
    matches = [state for state in states if state.record.id == name] or [s for s in states if s.record.id.startswith(name)]
    if not matches:
        matches = [state for state in states if state.record.id == _id_of_name(name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise SmrError(f"{name} names {len(matches)} containers", hint="give the whole id", code=Code.CONTAINER_NOT_FOUND)
    raise SmrError(
        f"SMR knows no container {name}: it was not started with smr.restore, or is deleted",
        hint="'smr ps' lists those it knows",
        code=Code.CONTAINER_NOT_FOUND,
        container=name,
    )


def _id_of_name(name: str) -> str:
    """podman's names are not in the bundle; podman is asked."""
    from smr.shim.engines import podman
    from smr.shim.run import run

    if not podman.available():
        return ""
    words = [*podman.command(), "container", "inspect", "--format", "{{.Id}}", name]
    return run(words, timeout_s=20, check=False).stdout.strip()
