"""The process of `smr agent`: `python -I -m smr.shim.agent.main [--socket PATH] [--listen ADDRESS] [--events auto|off]`.

One a node: it holds a flock of RUN/agent/lock. It listens when all is ready, tells systemd so, and ends with status 0 on SIGTERM
and SIGINT; calls that are under way end then, the work behind them goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import gc
import os
import platform
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path

from grpclib.server import Server

from smr.proto.errors import Code, SmrError, exit_status
from smr.shim import config as settings
from smr.shim.agent import kubernetes, web
from smr.shim.agent.address import socket_path
from smr.shim.agent.health import Health
from smr.shim.agent.journal import Event, Follower
from smr.shim.agent.metrics import Metrics
from smr.shim.agent.node import join_node
from smr.shim.agent.service import Service, remove_socket
from smr.shim.agent.workers import Workers
from smr.shim.config import Config

_END_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Where the agent listens (`listen` empty: no HTTP), and whether it posts events of pods where it can."""

    socket: Path
    listen: str
    events: bool


def options_of(argv: Sequence[str], config: Config) -> Options:
    """Flags, then what is configured."""
    parser = argparse.ArgumentParser(prog="smr agent")
    parser.add_argument("--socket", default=config.agent_socket)
    parser.add_argument("--listen", default=config.agent_listen)
    parser.add_argument("--events", default=config.agent_events)
    found = parser.parse_args(argv)
    if found.events not in {"auto", "off"}:
        raise SmrError(f"agent_events = {found.events!r}: needed auto or off", code=Code.CONFIG_INVALID)
    return Options(socket=socket_path(config, found.socket), listen=found.listen, events=found.events == "auto")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    try:
        config = settings.load()
        join_node()
        asyncio.run(serve(config, options_of(sys.argv[1:] if argv is None else argv, config)))
    except SmrError as error:
        print(f"smr agent: {error}", file=sys.stderr)  # noqa: T201
        return exit_status(error.code)
    return 0


async def serve(config: Config, options: Options) -> None:
    """Be the agent until a signal ends it."""
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with _agent(config, options):
        _tell_systemd("READY=1")
        gc.collect()
        gc.freeze()  # what was loaded stays: nothing of it need be looked at again
        await ended.wait()
        _tell_systemd("STOPPING=1")


@contextlib.asynccontextmanager
async def _agent(config: Config, options: Options) -> AsyncIterator[None]:
    with contextlib.ExitStack() as held:
        held.enter_context(_alone(config.run / "agent"))
        executor = held.enter_context(_threads())
        workers, health = Workers(), Health(config)
        async with contextlib.AsyncExitStack() as stack:
            reporters: list[kubernetes.Reporter] = []
            follower = Follower(config.run, config.run / "agent/totals.json", lambda event: _report(reporters, event))
            stack.callback(follower.close)
            cluster = kubernetes.find() if options.events else None
            if cluster is not None:
                node = os.environ.get("NODE_NAME") or platform.node()
                reporters.append(
                    kubernetes.Reporter(cluster, node, lambda result: follower.count("kubernetes_events", result), executor)
                )
                stack.push_async_callback(reporters[0].close)
            follower.look()
            metrics = Metrics(config, follower.totals)
            if options.listen:
                stack.push_async_callback(_end_web, await web.serve(options.listen, _pages(metrics, health, executor)), options)
            started = datetime.now(UTC).isoformat(timespec="milliseconds")
            service = Service(config, follower, health, workers, executor, started)
            stack.push_async_callback(_end, await _listen(service, options.socket), workers, follower, options.socket)
            yield


def _report(reporters: Sequence[kubernetes.Reporter], event: Event) -> None:
    for reporter in reporters:
        reporter.tell(event)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The lock of the one agent. Raises CONTAINER_STATE where another has it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SmrError(
                f"another agent runs on this node: process {os.pread(fd, 20, 0).decode(errors='replace').strip()}",
                hint="end that one first, or give this one a state directory of its own (SMR_RUN)",
                code=Code.CONTAINER_STATE,
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Nobody waits for a thread that waits for a disk, or a server, that does not answer."""
    executor = ThreadPoolExecutor(max_workers=3, thread_name_prefix="smr-agent")
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _pages(metrics: Metrics, health: Health, executor: ThreadPoolExecutor) -> dict[str, web.Page]:
    loop = asyncio.get_running_loop()

    async def show_metrics(accept: str) -> web.Answer:
        body, content_type = await loop.run_in_executor(executor, metrics.render, accept)
        return web.Answer(body=body, content_type=content_type)

    async def show_health(accept: str) -> web.Answer:
        problem = await loop.run_in_executor(executor, health.problem)
        status = HTTPStatus.SERVICE_UNAVAILABLE if problem else HTTPStatus.OK
        return web.Answer(body=f"{problem or 'ok'}\n".encode(), status=status)

    return {"/metrics": show_metrics, "/healthz": show_health}


async def _listen(service: Service, path: Path) -> Server:
    """The socket is root's alone from its first moment on: whoever may call may checkpoint any container."""
    server = Server([service])
    before = os.umask(0o177)
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        remove_socket(path)
        await server.start(path=str(path))
    except OSError as error:
        raise SmrError(f"cannot listen on {path}: {error.strerror or error}", code=Code.PERMISSION) from error
    finally:
        os.umask(before)
    return server


async def _end(server: Server, workers: Workers, follower: Follower, path: Path) -> None:
    workers.ending = True
    remove_socket(path)
    server.close()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_END_S):
            await server.wait_closed()


async def _end_web(server: asyncio.Server, options: Options) -> None:
    server.close()
    if options.listen.startswith("unix:"):
        remove_socket(Path(options.listen.removeprefix("unix:")))


def _tell_systemd(state: str) -> None:
    """sd_notify(3), where a unit of Type=notify asks for it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.connect(f"\0{address[1:]}" if address.startswith("@") else address)
            notify.send(state.encode())


if __name__ == "__main__":
    found = main()
    sys.stderr.flush()
    os._exit(found)  # not by way of the interpreter's end, which waits for threads that wait for a server
