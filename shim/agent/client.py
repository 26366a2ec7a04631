"""The other end: calls of the agent for `smr agent status`, `list` and `watch`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from grpclib.client import Channel
from grpclib.const import Status as Grpc
from grpclib.events import RecvTrailingMetadata, listen
from grpclib.exceptions import GRPCError, StreamTerminatedError

from smr.proto.agent import agent_pb2 as pb
from smr.proto.agent.agent_grpc import AgentStub
from smr.proto.errors import Code, SmrError
from smr.shim.agent.service import ERROR_KEY
from smr.shim.agent.workers import error_of

_T = TypeVar("_T")
_TIMEOUT_S = 120.0


def status(path: Path, container: str = "") -> pb.StatusResponse:
    """The agent that listens on `path`, and its containers. Raises AGENT_MISSING, or what it failed with, as all here do."""
    return _call(path, lambda agent: agent.Status(pb.StatusRequest(container=container), timeout=_TIMEOUT_S))


def images(path: Path) -> pb.ListResponse:
    """The images."""
    return _call(path, lambda agent: agent.List(pb.ListRequest(), timeout=_TIMEOUT_S))


def watch(path: Path, told: Callable[[pb.Event], object], *, replay: bool = False) -> None:
    """Call `told` with each event, until the agent ends or an exception does."""

    async def follow(agent: AgentStub) -> None:
        async with agent.Watch.open() as stream:
            await stream.send_message(pb.WatchRequest(replay=replay), end=True)
            async for event in stream:
                told(event)

    _call(path, follow)


def _call(path: Path, work: Callable[[AgentStub], Awaitable[_T]]) -> _T:
    told: list[bytes] = []

    async def keep(event: RecvTrailingMetadata) -> None:
        told.extend(value for value in event.metadata.getall(ERROR_KEY, ()) if isinstance(value, bytes))

    async def call() -> _T:
        async with Channel(path=str(path)) as channel:
            listen(channel, RecvTrailingMetadata, keep)
            return await work(AgentStub(channel))

    try:
        return asyncio.run(call())
    except (FileNotFoundError, ConnectionError) as error:
        raise SmrError(
            f"no agent listens on {path}",
            hint="start one: 'smr agent', or 'systemctl start smr-agent'",
            code=Code.AGENT_MISSING,
        ) from error
    except PermissionError as error:
        raise SmrError(f"{path} is root's", hint="run as root (sudo)", code=Code.PERMISSION) from error
    except StreamTerminatedError as error:
        raise SmrError(f"the agent on {path} has gone", hint="try again", code=Code.AGENT_MISSING) from error
    except GRPCError as error:
        raise _error(error, told, path) from error


def _error(error: GRPCError, told: list[bytes], path: Path) -> SmrError:
    """The agent's own, where it has sent one along."""
    if told:
        document = pb.Error.FromString(told[0])
        return error_of({"code": document.code, "message": document.message, "hint": document.hint})
    if error.status is Grpc.UNAVAILABLE:
        return SmrError(f"the agent on {path} ends: {error.message}", hint="try again", code=Code.AGENT_MISSING)
    return SmrError(f"the agent on {path} answers {error.status.name}: {error.message}", code=Code.INTERNAL)
