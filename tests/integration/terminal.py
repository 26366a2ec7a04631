"""Speak with a program that attaches to a container, over a terminal or a plain socket."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence


@contextlib.contextmanager
def on_terminal(argv: Sequence[str], env: Mapping[str, str], *, ends: bool = False) -> Iterator[int]:
    """Run a program whose stdin and output are a new terminal; yields the other end. It is killed unless it `ends` by itself."""
    ours, theirs = pty.openpty()
    with _running(argv, env, ours, theirs, ends):
        yield ours


@contextlib.contextmanager
def on_socket(argv: Sequence[str], env: Mapping[str, str]) -> Iterator[int]:
    """Run a program whose stdin and output are a socket; yields the other end."""
    left, right = socket.socketpair()
    ours = left.detach()
    with _running(argv, env, ours, right.detach(), False):
        yield ours


@contextlib.contextmanager
def _running(argv: Sequence[str], env: Mapping[str, str], ours: int, theirs: int, ends: bool) -> Iterator[None]:
    process = subprocess.Popen(argv, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    try:
        yield
    finally:
        if ends:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.close(ours)


def converse(fd: int, line: str, answer: str) -> str:
    """Say `line`, again and again, until `answer` is heard."""
    heard = ""
    deadline = time.monotonic() + 15
    while answer not in heard:
        assert time.monotonic() < deadline, f"no {answer!r} in {heard!r}"
        os.write(fd, line.encode())
        while answer not in heard and select.select([fd], [], [], 0.5)[0]:
            heard += os.read(fd, 4096).decode(errors="replace")
    return heard
