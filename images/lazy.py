"""The server of pages for `criu restore --lazy-pages`, in place of `criu lazy-pages`: the tree runs while its pages stream in.

    python -I -m smr.images.lazy --table BLOB --segments LIST --socket SOCKET --status STATUS
                                 [--threads N] [--rest SECONDS] [--connect-timeout SECONDS] [--verify]

BLOB is a page table (smr.images.pagetable), LIST a file with one path of a segment a line in the table's order, SOCKET the path
`lazy-pages.socket` in the directory that `criu restore` is given as its work directory. The program exits with status 0 once
the socket listens and STATUS is there, and goes on in the background; with 1 and an error on stderr when it cannot serve. STATUS
is JSON, replaced atomically: {"version": 1, "state": "serving"|"done"|"failed", "reason", "pid", "copied_pages", "faults",
"deaths", "seconds"}.
`pid` is the keeper's. With --rest each thread of the filling rests after each chunk, which leaves the disk to others.
The pages that the folder still has are to be loaded by CRIU itself: smr.images.lazy_folder.

A descriptor that closes while pages are missing would let the process read zeros. So two processes share one table of
descriptors and the journal (smr.images.lazy_journal): the worker (smr.images.lazy_worker), and its parent, the keeper, which
only waits. When the worker is killed the keeper forks another, which finds in the journal what is missing. When the keeper is
killed the worker ends its threads and becomes keeper itself, of a new worker. When the restore cannot be completed (a segment
that cannot be read or is wrong, a table that does not fit, a server killed before CRIU was ready) all processes of the restore
are killed before the descriptors close, and STATUS says why. Only both killed within some 50 ms are more than can be survived;
both ask to be spared by the OOM killer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket as net
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from smr.images import uffd
from smr.images.charge import leave_cgroup
from smr.images.files import write_atomic
from smr.images.lazy_journal import Ending, Journal
from smr.images.lazy_source import Source
from smr.images.lazy_state import State
from smr.images.lazy_tasks import end_processes
from smr.images.lazy_worker import Leave, Worker
from smr.images.pagetable import PAGE_BYTES, PageTable, parse_table
from smr.proto.errors import Code, SmrError

STATUS_VERSION = 1
CONNECT_TIMEOUT_S = 60.0
# A worker that dies so often without having delivered anything would die for ever.
_DEATHS = 16
_WAIT_S = 0.01
_SWITCH_S = 0.0002


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What to serve, and where. `listen` first, then `run` in a process of its own."""

    table: PageTable
    segments: Sequence[Path]
    socket: Path
    status: Path
    threads: int = 0
    rest_s: float = 0.0
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    verify: bool = False

    def listen(self) -> net.socket:
        """The socket, listening. A stale one is replaced."""
        self.socket.unlink(missing_ok=True)
        listener = net.socket(net.AF_UNIX, net.SOCK_STREAM)
        # Accepted connections inherit it, and their messages carry pids.
        listener.setsockopt(net.SOL_SOCKET, net.SO_PASSCRED, 1)
        with _short(self.socket) as name:
            listener.bind(name)
        listener.listen(1)
        return listener

    def run(self, listener: net.socket, ready: int) -> NoReturn:
        """Serve until all is delivered or has failed, then exit. The process has one thread.

        A byte is written to the descriptor `ready` once there is a status.
        """
        sys.setswitchinterval(_SWITCH_S)
        _spare()
        keeper = _Keeper(self, listener)
        keeper.say("serving")
        os.write(ready, b"1")
        os.close(ready)
        keeper.keep()


class _Keeper:
    """The parent of a worker; and in the forked child, until it has become a worker."""

    def __init__(self, server: Server, listener: net.socket) -> None:
        self._server = server
        self._listener = listener
        self._source = Source(server.table, server.segments, verify=server.verify)
        self._state = State(server.table)
        self._journal = Journal(len(server.table.runs))
        self._began = time.monotonic()
        self._threads = server.threads or max(2, min(8, os.cpu_count() or 2))

    def keep(self) -> NoReturn:
        """Have a worker until the work has ended, and exit."""
        predecessor: Journal | None = None
        deaths, copied = 0, -1
        while self._journal.ending is Ending.RUNNING:
            keeper = os.getpid()
            worker = uffd.fork_sharing_files()
            if not worker:
                self._work(keeper)
                predecessor, deaths, copied = self._inherit(), 0, -1
                continue
            if predecessor is not None:
                predecessor.hand_on()
                self.say("serving")
                predecessor = None
            self._wait(worker)
            if self._journal.handed_on:
                os._exit(0)
            if self._journal.ending is Ending.RUNNING:
                self._journal.count(deaths=1)
                deaths = 1 if self._journal.copied_bytes > copied else deaths + 1
                copied = self._journal.copied_bytes
                self._judge(deaths)
        self._finish()

    def _work(self, keeper: int) -> None:
        """Be the worker; returns when the keeper's part is to be taken."""
        try:
            worker = Worker(
                self._state, self._journal, self._source, self._listener, threads=self._threads, rest_s=self._server.rest_s
            )
            if worker.run(keeper, self._began + self._server.connect_timeout_s) is not Leave.DONE:
                return
            self._journal.end(Ending.DONE)
        except SmrError as error:
            self._journal.end(Ending.FAILED, str(error))
        except BaseException as error:  # noqa: BLE001  the outermost edge: a container must not hang for it
            self._journal.end(Ending.FAILED, f"{error!r} in {traceback.extract_tb(error.__traceback__)[-1]}")
        self._finish()

    def _wait(self, worker: int) -> None:
        while os.waitpid(worker, os.WNOHANG) == (0, 0) and not self._journal.handed_on:
            time.sleep(_WAIT_S)

    def _judge(self, deaths: int) -> None:
        if not self._journal.finished:
            self._state.replay(self._journal)
            self._journal.end(Ending.FAILED, "the server of pages was killed while CRIU restored")
        elif deaths > _DEATHS:
            self._state.replay(self._journal)
            self._journal.end(Ending.FAILED, f"the server of pages was killed {deaths} times and delivered nothing")

    def _inherit(self) -> Journal:
        """Become keeper of what this worker knows, with a journal that begins anew; the old one is the predecessor's."""
        old = self._journal
        self._state.settle()
        self._journal = Journal(len(self._server.table.runs))
        self._journal.inherit(old)
        return old

    def _finish(self) -> NoReturn:
        """What remains once it is said how it ended. Descriptors close when the last process that has them exits."""
        if self._journal.ending is Ending.FAILED:
            end_processes(self._state.spaces)
        if self._journal.ending is Ending.DONE:
            for space in self._state.spaces:
                with contextlib.suppress(OSError):
                    os.close(space.fd)
        self.say("done" if self._journal.ending is Ending.DONE else "failed")
        self._server.socket.unlink(missing_ok=True)
        os._exit(0)

    def say(self, state: str) -> None:
        """Write the status file; a disk that is full does not stop a server."""
        fields = {
            "version": STATUS_VERSION,
            "state": state,
            "reason": self._journal.reason,
            "pid": os.getpid(),
            "copied_pages": self._journal.copied_bytes // PAGE_BYTES,
            "faults": self._journal.faults,
            "deaths": self._journal.deaths,
            "seconds": round(time.monotonic() - self._began, 3),
        }
        with contextlib.suppress(OSError, SmrError):
            write_atomic(self._server.status, json.dumps(fields).encode())


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name for `bind` however long the path: the kernel takes 107 bytes."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _spare() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-1000")


def _detach() -> None:
    """On its own: who started it may end, and its cgroup with it, while the container runs on."""
    os.setsid()
    leave_cgroup()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.chdir("/")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="smr.images.lazy", allow_abbrev=False)
    for name in ("--table", "--segments", "--socket", "--status"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rest", type=float, default=0.0)
    parser.add_argument("--connect-timeout", type=float, default=CONNECT_TIMEOUT_S)
    parser.add_argument("--verify", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program."""
    given = _arguments(arguments)
    try:
        segments = [Path(line) for line in given.segments.read_text().splitlines()]
        server = Server(
            table=parse_table(given.table.read_bytes(), str(given.table)),
            segments=[path.absolute() for path in segments],
            socket=given.socket.absolute(),
            status=given.status.absolute(),
            threads=given.threads,
            rest_s=given.rest,
            connect_timeout_s=given.connect_timeout,
            verify=given.verify,
        )
        Source(server.table, server.segments)
        listener = server.listen()
    except OSError as error:
        sys.stderr.write(f"{SmrError(str(error), code=Code.RESTORE_FAILED)}\n")
        return 1
    except SmrError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    wait, ready = os.pipe()
    if not os.fork():
        os.close(wait)
        _detach()
        server.run(listener, ready)
    os.close(ready)
    listener.detach()
    if os.read(wait, 1):
        return 0
    sys.stderr.write("the server of pages ended at its start: a segment changed meanwhile, or memory is short\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
