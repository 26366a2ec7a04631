"""The calls of proto/agent/agent.proto. What they do is what the commands of the same names do; nothing is decided here.

What reads the disk is done in a thread, what takes long or much memory by a process of its own (smr.shim.agent.workers).
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from grpclib.const import Status as Grpc
from grpclib.exceptions import GRPCError

from smr.images.image import Image
from smr.images.pin import pinned_digest, pins, unpin
from smr.images.prefetch import cached_share
from smr.images.store import Store
from smr.proto.agent import agent_pb2 as pb
from smr.proto.agent.agent_grpc import AgentBase
from smr.proto.errors import Code, SmrError
from smr.shim.agent.health import Health
from smr.shim.agent.journal import Event, Follower
from smr.shim.agent.metrics import version
from smr.shim.agent.workers import Workers
from smr.shim.config import Config
from smr.shim.events import pod_facts
from smr.shim.inspect import summary_of
from smr.shim.state import ContainerState, all_states

if TYPE_CHECKING:
    from grpclib.server import Stream

ERROR_KEY = "smr-error-bin"
_T = TypeVar("_T")
_STATUS = {
    Code.USAGE: Grpc.INVALID_ARGUMENT,
    Code.CONFIG_INVALID: Grpc.FAILED_PRECONDITION,
    Code.ANNOTATION_UNKNOWN: Grpc.INVALID_ARGUMENT,
    Code.ANNOTATION_INVALID: Grpc.INVALID_ARGUMENT,
    Code.SPEC_INVALID: Grpc.INVALID_ARGUMENT,
    Code.IMAGE_NOT_FOUND: Grpc.NOT_FOUND,
    Code.CONTAINER_NOT_FOUND: Grpc.NOT_FOUND,
    Code.IMAGE_EXISTS: Grpc.ALREADY_EXISTS,
    Code.IMAGE_CORRUPT: Grpc.DATA_LOSS,
    Code.PERMISSION: Grpc.PERMISSION_DENIED,
    Code.TIMEOUT: Grpc.DEADLINE_EXCEEDED,
    Code.MEMORY_LIMIT: Grpc.RESOURCE_EXHAUSTED,
    Code.DISK_FULL: Grpc.RESOURCE_EXHAUSTED,
    Code.GPU_MEMORY: Grpc.RESOURCE_EXHAUSTED,
    Code.INTERNAL: Grpc.INTERNAL,
}


def grpc_status(code: Code) -> Grpc:
    """The status of a call that fails with `code`; what does not fit, is missing or is busy is FAILED_PRECONDITION."""
    return _STATUS.get(code, Grpc.FAILED_PRECONDITION)


def _answers(handler: Callable[[Any, Any, Any], Awaitable[None]]) -> Callable[[Any, Any], Coroutine[Any, Any, None]]:
    """Receive the request; an SmrError becomes the call's status, with all of it in the trailing metadata."""

    @functools.wraps(handler)
    async def handle(self: Any, stream: Stream[Any, Any]) -> None:
        request = await stream.recv_message()
        if request is None:
            raise GRPCError(Grpc.INVALID_ARGUMENT, "no request")
        try:
            await handler(self, request, stream)
        except SmrError as error:
            document = pb.Error(code=error.code.value, message=error.message, hint=error.hint)
            metadata = {ERROR_KEY: document.SerializeToString()}
            await stream.send_trailing_metadata(status=grpc_status(error.code), status_message=str(error), metadata=metadata)

    return handle


class Service(AgentBase):
    """One agent's calls. `executor` runs what may wait for a disk."""

    def __init__(
        self, config: Config, follower: Follower, health: Health, workers: Workers, executor: Executor, started: str
    ) -> None:
        self._config, self._follower, self._health = config, follower, health
        self._workers, self._executor, self._started = workers, executor, started

    async def _aside(self, work: Callable[..., _T], *arguments: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, *arguments)

    @_answers
    async def Prefetch(self, request: pb.PrefetchRequest, stream: Stream[pb.PrefetchRequest, pb.PrefetchResponse]) -> None:
        """Read an image ahead."""
        found = await self._workers.run("prefetch", {"image": _named(request.image)})
        found.pop("cancelled", None)
        await stream.send_message(pb.PrefetchResponse(**found))  # type: ignore[arg-type]  # as the work printed it

    @_answers
    async def Pin(self, request: pb.PinRequest, stream: Stream[pb.PinRequest, pb.PinResponse]) -> None:
        """Keep an image in memory."""
        found = await self._workers.run("pin", {"image": _named(request.image)})
        answer = pb.PinResponse(digest=str(found["digest"]), bytes=int(str(found["bytes"])), pid=int(str(found["pid"])))
        await stream.send_message(answer)

    @_answers
    async def Unpin(self, request: pb.UnpinRequest, stream: Stream[pb.UnpinRequest, pb.UnpinResponse]) -> None:
        """End a pin."""
        await stream.send_message(await self._aside(_unpin, self._config, _named(request.image)))

    @_answers
    async def List(self, request: pb.ListRequest, stream: Stream[pb.ListRequest, pb.ListResponse]) -> None:
        """The images."""
        await stream.send_message(await self._aside(list_images, self._config))

    @_answers
    async def Checkpoint(
        self, request: pb.CheckpointRequest, stream: Stream[pb.CheckpointRequest, pb.CheckpointProgress]
    ) -> None:
        """Make an image of a container."""
        _known(request.engine, "engine", "auto", "podman", "containerd", "runc")
        _known(request.tcp, "tcp", "close", "established")
        if not request.container:
            raise SmrError("no container is named", hint="set container to its name or id", code=Code.USAGE)
        wanted = {field.name: value for field, value in request.ListFields()} | {"image": _named(request.image)}

        async def told(stage: str) -> None:
            await stream.send_message(pb.CheckpointProgress(stage=stage))

        found = await self._workers.run("checkpoint", wanted, told)
        result = pb.CheckpointResult(**found)  # type: ignore[arg-type]  # as the work printed it
        await stream.send_message(pb.CheckpointProgress(result=result))

    @_answers
    async def Status(self, request: pb.StatusRequest, stream: Stream[pb.StatusRequest, pb.StatusResponse]) -> None:
        """The agent and the containers."""
        problem, containers = await self._aside(self._look, request.container)
        answer = pb.StatusResponse(
            version=version(),
            pid=os.getpid(),
            started=self._started,
            store=str(self._config.store),
            run=str(self._config.run),
            healthy=not problem,
            health_reason=problem,
            containers=containers,
        )
        await stream.send_message(answer)

    def _look(self, container: str) -> tuple[str, list[pb.Container]]:
        found = [container_of(state) for state in all_states(self._config.run) if state.record.id.startswith(container)]
        if container and not found:
            raise SmrError(
                f"SMR knows no container {container}: it was not started with smr.restore, or is deleted",
                hint="a Status without a container lists those it knows",
                code=Code.CONTAINER_NOT_FOUND,
            )
        return self._health.problem(), found

    @_answers
    async def Watch(self, request: pb.WatchRequest, stream: Stream[pb.WatchRequest, pb.Event]) -> None:
        """Events, until the client ends the call."""
        await stream.send_initial_metadata()  # the client knows from here on that it misses nothing
        with self._follower.subscription(replay=request.replay) as (past, queue):
            for event in past:
                await stream.send_message(event_of(event))
            while (news := await queue.get()) is not None:
                await stream.send_message(event_of(news))
        if self._workers.ending:
            raise GRPCError(Grpc.UNAVAILABLE, "the agent ends")
        raise GRPCError(Grpc.RESOURCE_EXHAUSTED, "this client does not keep up with the events")


def _named(image: str) -> str:
    if not image:
        raise SmrError("no image is named", hint="set image to NAME[:TAG]", code=Code.USAGE)
    return image


def _known(value: str, name: str, *allowed: str) -> None:
    if value and value not in allowed:
        raise SmrError(f"{name} = {value!r}: needed {', '.join(allowed)}", code=Code.USAGE)


def _unpin(config: Config, image: str) -> pb.UnpinResponse:
    digest = pinned_digest(config.run, Store(config.store), image)
    released = unpin(config.run, digest)
    return pb.UnpinResponse(digest=digest, unpinned=released is not None, bytes=released.bytes if released else 0)


def list_images(config: Config) -> pb.ListResponse:
    """One entry for each digest, with all its names."""
    store = Store(config.store)
    pinned = {pin.digest for pin in pins(config.run)}
    found: dict[str, list[Image]] = {}
    for image in store.images():
        found.setdefault(image.digest, []).append(image)
    answer = pb.ListResponse()
    for digest, (image, *others) in found.items():
        answer.images.add(
            reference=image.reference,
            tags=[image.reference, *(other.reference for other in others)],
            digest=digest,
            created=image.created,
            size_bytes=image.size_bytes,
            cached_share=cached_share(image),
            pinned=digest in pinned,
            memory_bytes=image.config.memory_bytes,
            source_image=image.config.source.image,
        )
    for broken in store.broken():
        error = pb.Error(code=broken.error.code.value, message=broken.error.message, hint=broken.error.hint)
        answer.images.add(reference=broken.reference, digest=broken.digest, error=error)
    return answer


def container_of(state: ContainerState) -> pb.Container:
    """A container's record as a message."""
    record, summary = state.record, summary_of(state)
    return pb.Container(
        id=record.id,
        status=summary.status,
        image=record.image,
        digest=record.digest,
        reason=record.reason,
        reason_code=record.reason_code,
        started=record.started,
        total_s=summary.total_s,
        pid=record.pid,
        stages=[pb.Stage(name=stage.name, start_s=stage.start_s, end_s=stage.end_s) for stage in record.stages],
        warnings=record.warnings,
        pages_strategy=str(record.pages.get("strategy", "")),
        pages_source=str(record.pages.get("source", "")),
        memory_bytes=int(record.pages.get("memory_bytes", 0)),
        read_bytes=int(record.pages.get("read_bytes", 0)),
        pod=_pod(pod_facts(record.annotations)),
    )


def event_of(event: Event) -> pb.Event:
    """An entry of the journal as a message."""
    stages, pod = event.get("stages_s"), event.get("pod")
    seconds = event.get("pause_s", event.get("busy_s", 0.0))
    return pb.Event(
        time=_text(event, "time"),
        kind=_text(event, "event"),
        container=_text(event, "container"),
        image=_text(event, "image"),
        digest=_text(event, "digest"),
        reason=_text(event, "reason"),
        reason_code=_text(event, "code"),
        total_s=float(seconds) if isinstance(seconds, int | float) else 0.0,
        stages_s={str(name): float(value) for name, value in stages.items()} if isinstance(stages, dict) else {},
        pod=_pod({str(key): str(value) for key, value in pod.items()} if isinstance(pod, dict) else {}),
    )


def _text(event: Event, key: str) -> str:
    return str(event.get(key, ""))


def _pod(pod: Mapping[str, str]) -> pb.Pod | None:
    return pb.Pod(**{key: pod.get(key, "") for key in ("namespace", "name", "uid", "container")}) if pod else None


def remove_socket(path: Path) -> None:
    """Take a socket away; that of an agent that was killed, too."""
    if path.is_socket():
        path.unlink(missing_ok=True)
