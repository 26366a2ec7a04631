"""Asks a server inside a container's network namespace over HTTP. Standard library only; used by the tests and by bench.gpu.

A thread of ours enters the namespace for one request, or for as long as a Watch lasts: a socket belongs to the namespace in which
it was made, and only a thread's own namespace changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import http.client
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Answer = dict[str, Any]
_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS, _IFF_UP, _IFF_RUNNING = 0x8914, 0x1, 0x40


def enter_network(pid: int) -> None:
    """Move the calling thread into the network namespace of `pid`, for good. OSError when it is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(namespace, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"setns of process {pid}: {os.strerror(number)}")
    finally:
        os.close(namespace)


def _request(path: str, port: int, timeout_s: float, method: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    with contextlib.closing(connection):
        connection.request(method, f"/{path}")
        response = connection.getresponse()
        body = response.read()
    if response.status != 200:
        raise AssertionError(f"{method} /{path}: {response.status} {body.decode(errors='replace')}")
    answer: Answer = json.loads(body)
    return answer


def ask(pid: int, path: str, *, port: int = 8000, timeout_s: float = 60.0, method: str = "GET") -> Answer:
    """One request to 127.0.0.1:PORT in the network namespace of `pid`. OSError when nobody answers, AssertionError for no 200."""

    def work() -> Answer:
        enter_network(pid)
        return _request(path, port, timeout_s, method)

    try:
        with ThreadPoolExecutor(max_workers=1) as pool:
            return pool.submit(work).result()
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"{method} /{path} of process {pid}: {error!r}") from error


def loopback_up(pid: int) -> None:
    """Bring `lo` up in the network namespace of `pid`: a runtime's own restore leaves that to whoever called it."""

    def work() -> None:
        enter_network(pid)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP | _IFF_RUNNING))

    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(work).result()


def ask_until(
    pid: Callable[[], int], path: str, *, port: int = 8000, timeout_s: float = 300.0, alive: Callable[[], None] = lambda: None
) -> Answer:
    """Ask every 2 ms until there is an answer. `alive` raises when there is no use in asking on; TimeoutError in the end."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ask(pid(), path, port=port, timeout_s=timeout_s)
        except OSError as error:
            last = error
            alive()
        if time.monotonic() > deadline:
            raise TimeoutError(f"/{path} was not answered within {timeout_s:.0f} s: {last}")
        time.sleep(0.002)


class Watch:
    """A client that asks `path` every few milliseconds, over a new connection each time, and keeps the longest gap."""

    def __init__(self, pid: int, path: str = "count", *, port: int = 8000) -> None:
        self.answers: list[Answer] = []
        self.errors: list[BaseException] = []
        self.longest_gap_s = 0.0
        self._end = threading.Event()
        self._first = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(pid, path, port))

    @classmethod
    @contextlib.contextmanager
    def over(cls, pid: int, path: str = "count", *, port: int = 8000) -> Iterator[Watch]:
        """Watch while the block runs; the block begins after the first answer, and the last answer comes after its end."""
        watch = cls(pid, path, port=port)
        watch._thread.start()
        watch._first.wait(60)
        try:
            yield watch
        finally:
            watch._end.set()
            watch._thread.join()

    def _work(self, pid: int, path: str, port: int) -> None:
        try:
            enter_network(pid)
            last = None
            # One more after the end: a pause that lasts until then has an end, too.
            for final in iter(self._end.is_set, None):
                self.answers.append(_request(path, port, 120.0, "GET"))
                now = time.monotonic()
                self.longest_gap_s = max(self.longest_gap_s, now - (last or now))
                last = now
                self._first.set()
                if final:
                    return
                time.sleep(0.003)
        except (OSError, http.client.HTTPException, ValueError, AssertionError) as error:
            self.errors.append(error)
        finally:
            self._first.set()
