"""HTTP for Prometheus and probes: GET /metrics and /healthz, one request a connection, on a TCP address or a unix socket.

The standard library's server wakes up twice a second to see whether it should end, and has no unix sockets; this one sleeps.
Nothing that a client sends is used but the path and Accept.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from smr.proto.errors import Code, SmrError

_HEAD_BYTES = 8192
_PATIENCE_S = 10.0
_TEXT = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a page says."""

    body: bytes
    content_type: str = _TEXT
    status: HTTPStatus = HTTPStatus.OK


Page = Callable[[str], Awaitable[Answer]]


async def serve(address: str, pages: Mapping[str, Page]) -> asyncio.Server:
    """Listen on HOST:PORT, [HOST]:PORT, :PORT or unix:PATH; a page gets the request's Accept.

    Raises CONFIG_INVALID for another form, PERMISSION where it cannot be had.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            await _answer(reader, writer, pages)
        writer.close()

    try:
        if address.startswith("unix:"):
            return await asyncio.start_unix_server(answer, _free(Path(address.removeprefix("unix:"))), limit=_HEAD_BYTES)
        host, port = parse_address(address)
        return await asyncio.start_server(answer, host, port, limit=_HEAD_BYTES)
    except OSError as error:
        raise SmrError(
            f"cannot listen on {address}: {error.strerror or error}",
            hint="agent_listen in /etc/smr/smr.toml, or --listen, names another address",
            code=Code.PERMISSION,
        ) from error


def parse_address(address: str) -> tuple[str | None, int]:
    """Host, None for all, and port. Raises CONFIG_INVALID."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and 0 <= int(port) < 65536 and (":" not in host or (host[0], host[-1]) == ("[", "]")):
        return host.strip("[]") or None, int(port)
    raise SmrError(
        f"'{address}' is not an address: needed HOST:PORT, :PORT or unix:PATH",
        hint="agent_listen in /etc/smr/smr.toml, or --listen; empty for no HTTP",
        code=Code.CONFIG_INVALID,
    )


def _free(path: Path) -> Path:
    """The socket of an agent that was killed is in the way."""
    if path.is_socket():
        path.unlink()
    return path


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pages: Mapping[str, Page]) -> None:
    async with asyncio.timeout(_PATIENCE_S):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.split("\r\n")
    method, _, rest = first.partition(" ")
    path = rest.partition(" ")[0].partition("?")[0]
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if method not in {"GET", "HEAD"}:
        answer = Answer(body=b"GET only\n", status=HTTPStatus.METHOD_NOT_ALLOWED)
    elif path not in pages:
        answer = Answer(body=" ".join(pages).encode() + b"\n", status=HTTPStatus.NOT_FOUND)
    else:
        answer = await pages[path](headers.get("accept", ""))
    status = f"HTTP/1.1 {answer.status.value} {answer.status.phrase}"
    facts = f"Content-Type: {answer.content_type}\r\nContent-Length: {len(answer.body)}\r\nConnection: close"
    writer.write(f"{status}\r\n{facts}\r\n\r\n".encode() + (b"" if method == "HEAD" else answer.body))
    async with asyncio.timeout(_PATIENCE_S):
        await writer.drain()
