"""Whether a container is ready to be captured: what `smr.capture.ready` asks of it, from inside.

    [GET] http://[ADDRESS][:PORT]/PATH, unix:///SOCKET:/PATH    answers with a status below 300
    tcp:[ADDRESS]:PORT                                          somebody accepts
    exec:COMMAND                                                ends with 0
    (nothing)                                                   the container listens on a TCP port

A probe returns why the container is not ready, "" when it is. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from smr.proto.errors import Code, SmrError
from smr.shim import inside, inside_run, procs

if TYPE_CHECKING:
    from smr.shim.quiesce import Http

_TIMEOUT_S = 5.0
_LISTEN = "0A"
_WHICH = "capture.ready"


def parse(text: str, pid: int, runtime: tuple[str, str], container: str) -> Callable[[], str]:
    """A probe of the container whose init is `pid`; `runtime` is the real one and its --root. Raises ANNOTATION_INVALID."""
    from smr.shim.quiesce import Exec, Http, parse_hook

    if not text.strip():
        return lambda: "" if listens(pid) else "it listens on no TCP port"
    tcp = text.startswith("tcp:")
    url = f"http://{text.removeprefix('tcp:')}/" if tcp else text
    steps = parse_hook(f"GET {url}" if url.startswith(("http:", "unix:")) else url, _WHICH).steps
    if len(steps) != 1 or not isinstance(steps[0].action, Http | Exec):
        raise SmrError(
            f"annotation smr.{_WHICH}={text!r}: needed one request, one port or one command",
            hint=f"use smr.{_WHICH}=http://:8000/health, tcp::8000 or exec:COMMAND",
            code=Code.ANNOTATION_INVALID,
        )
    chosen = steps[0].action
    if isinstance(chosen, Http):
        return (lambda: _connects(pid, chosen.endpoint)) if tcp else (lambda: _answers(pid, chosen))
    name, root = runtime
    argv = (name, "--root", root) if root else (name,)
    return lambda: _runs(argv, container, chosen.argv)


def port_of(text: str) -> int:
    """The TCP port that a readiness names; 0 for none."""
    from smr.shim.quiesce import Http, parse_hook

    url = f"http://{text.removeprefix('tcp:')}/" if text.startswith("tcp:") else text
    with contextlib.suppress(SmrError):
        for step in parse_hook(url, _WHICH).steps:
            if isinstance(step.action, Http) and not step.action.endpoint.unix:
                return step.action.endpoint.port
    return 0


def listens(pid: int, port: int = 0) -> bool:
    """Whether a process of the container listens on a TCP port: on this one, or on any. Others may share its network."""
    sockets = {f"socket:[{inode}]" for inode, found in _listening(pid) if port in {0, found}}
    return bool(sockets) and any(_holds(process.pid, sockets) for process in procs.tree(pid))


def _listening(pid: int) -> Iterator[tuple[str, int]]:
    """Inode and port of listening TCP sockets in the network namespace of `pid` (proc_pid_net(5))."""
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == _LISTEN:
                    yield words[9], int(words[1].rpartition(":")[2], 16)


def _holds(pid: int, sockets: set[str]) -> bool:
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if str(Path(entry.path).readlink()) in sockets:
                    return True
    return False


def _connects(pid: int, endpoint: inside.Endpoint) -> str:
    try:
        inside.connect(pid, endpoint, time.monotonic() + _TIMEOUT_S).close()
    except OSError as error:
        return f"port {endpoint.port}: {error.strerror or error}"
    return ""


def _answers(pid: int, http: Http) -> str:
    url = http.endpoint.url(http.path)
    try:
        answer = inside.request(
            pid,
            http.endpoint,
            http.method,
            http.path,
            body=http.body,
            json=http.is_json,
            deadline=time.monotonic() + _TIMEOUT_S,
        )
    except (OSError, inside.SilentError) as error:
        return f"{url}: {error}"
    return "" if answer.status < 300 else f"{url} answers {answer.status}"


def _runs(runtime: tuple[str, ...], container: str, argv: tuple[str, ...]) -> str:
    try:
        inside_run.execute(runtime, container, argv, _TIMEOUT_S)
    except SmrError as error:
        return error.message
    return ""
