"""A helper process that undoes an operation when the process in charge dies, kill -9 included.

The guard is a fork that waits on a pipe. The owner says "done" and closes; an end of file without it means that the owner is
dead, and the guard runs `undo`. With `until_children_end`, programs that the owner starts keep the pipe open too, so the undo
waits for them: killing CRIU in the middle of a dump would leave its parasite in the container.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NoReturn


class Guard:
    """Use as a context manager around the operation; call `done` when nothing is left to undo."""

    def __init__(self, undo: Callable[[], None], *, until_children_end: bool = False) -> None:
        self._undo = undo
        self._inherit = until_children_end
        self._write = -1
        self._pid = 0

    @property
    def pass_fds(self) -> tuple[int, ...]:
        """For subprocess: descriptors that children must inherit."""
        return (self._write,) if self._inherit and self._write >= 0 else ()

    def __enter__(self) -> Guard:
        read, self._write = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._write)
            _guard(read, self._undo)
        os.close(read)
        return self

    def done(self) -> None:
        """Nothing is to be undone any more. The guard ends and is reaped."""
        if self._write < 0:
            return
        self._say_done()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

    def exit(self, status: int) -> NoReturn:
        """Say done and end this process with nothing between: killed before it, the operation is undone; after it, it stands."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self._write >= 0:
            self._say_done()
        os._exit(status)

    def _say_done(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._write, b"done")
        os.close(self._write)
        self._write = -1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """An exception that reaches here was handled by the owner, which undoes in its own process; the guard stands down."""
        self.done()


def _guard(read: int, undo: Callable[[], None]) -> None:
    """Body of the guard process; never returns."""
    status = 1
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        _detach(read)
        if os.read(read, 16) == b"":
            undo()
        status = 0
    finally:
        os._exit(status)


def _detach(keep: int) -> None:
    """Hold nothing of the caller: engines wait for the end of file of their pipes, and flocks live as long as their files."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    for fd in _open_fds():
        if fd > 2 and fd != keep:
            with contextlib.suppress(OSError):
                os.close(fd)


def _open_fds() -> Iterator[int]:
    yield from [int(name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208  # names, not paths
