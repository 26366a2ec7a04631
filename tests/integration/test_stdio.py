"""stdin, stdout and stderr of restored containers: files, FIFOs, sockets, /dev/null, terminals, and no line twice."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path

from tests.integration import testimage
from tests.integration.command import eventually
from tests.integration.containerd import RUNTIME, Containerd
from tests.integration.podman import Podman
from tests.integration.terminal import on_terminal

FAIL = {"smr.fallback": "fail"}
TO_FILE = os.O_CREAT | os.O_WRONLY | os.O_APPEND
SIZE = "import os; print(*os.get_terminal_size(os.open('/dev/pts/0', os.O_RDONLY | os.O_NOCTTY)))"


def passing_through(podman: Podman, name: str, output: int, image: str = "") -> None:
    """A container whose output is `output` itself, with no monitor in between."""
    asked = [f"--annotation={key}={value}" for key, value in {"smr.restore": image, **FAIL}.items()] if image else []
    words = ["podman", "run", "-d", f"--name={name}", f"--cgroup-parent={podman.parent}", "--log-driver=passthrough"]
    words += [*podman.network, *asked, testimage.NAME, "python3", "/app/workload.py", "--log"]
    done = subprocess.run(words, env=podman.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False, timeout=60)
    assert done.returncode == 0, podman.node.log_text().splitlines()[-1]


def lines(text: str) -> list[int]:
    """The numbers of the workload's lines."""
    return [int(line.split()[1]) for line in text.splitlines() if line.startswith("line ") and line[5:].isdigit()]


def last_line(read: object) -> int:
    """The last number that `read` gives, once there is one."""
    assert callable(read)
    found: list[int] = []
    eventually(lambda: bool(found.extend(lines(read())) or found), what="lines are written")
    return found[-1]


def test_output_that_passes_through(podman: Podman, tmp_path: Path) -> None:
    """A container that writes to a file is restored onto another file, a socket, a FIFO and podman's log; then back to a file."""
    first, second = tmp_path / "first", tmp_path / "second"
    with contextlib.ExitStack() as stack:

        def opened(path: Path, flags: int) -> int:
            fd = os.open(path, flags, 0o600)
            stack.callback(os.close, fd)
            return fd

        passing_through(podman, "source", opened(first, TO_FILE))
        podman.ready("source")
        last_line(first.read_text)
        podman.checkpoint("source", "through:1")
        podman.remove("source")
        before = last_line(first.read_text)
        second.write_text("what was there\n")
        passing_through(podman, "again", opened(second, TO_FILE), "through:1")
        eventually(lambda: len(lines(second.read_text())) > 1, what="lines go on in the other file")
        podman.remove("again")
        assert second.read_text().startswith("what was there\n")
        assert lines(second.read_text())[0] <= before + 1
        ours, theirs = socket.socketpair()
        stack.callback(ours.close)
        with theirs:
            passing_through(podman, "again", theirs.fileno(), "through:1")
        ours.settimeout(20)
        assert lines(ours.recv(64).decode())[0] <= before + 1
        podman.remove("again")
        os.mkfifo(tmp_path / "fifo")
        fifo = opened(tmp_path / "fifo", os.O_RDWR)
        passing_through(podman, "again", fifo, "through:1")
        while not (heard := lines(os.read(fifo, 4096).decode())):
            pass  # podman has written the container's id there
        assert heard[0] <= before + 1
        podman.remove("again")
        podman.start("again", "--log", annotations={"smr.restore": "through:1", **FAIL})
        last_line(lambda: podman.logs("again"))
        podman.checkpoint("again", "through:2")
        podman.remove("again")
        third = tmp_path / "third"
        passing_through(podman, "again", opened(third, TO_FILE), "through:2")
        assert last_line(third.read_text) > 0


def test_what_the_old_monitor_has_not_read(podman: Podman) -> None:
    """Lines that lie in the pipe at the checkpoint are the old container's to log: the new one begins with the line after."""
    podman.start("source", "--log")
    podman.ready("source")
    last_line(lambda: podman.logs("source"))
    monitor = int(podman.field("source", "{{.State.ConmonPid}}"))
    os.kill(monitor, signal.SIGSTOP)
    try:
        read = last_line(lambda: podman.logs("source"))
        eventually(lambda: waiting(podman.pid("source")) > 20, what="lines wait in the pipe")
        podman.checkpoint("source", "unread:1")
    finally:
        os.kill(monitor, signal.SIGCONT)
    eventually(lambda: lines(podman.logs("source"))[-1] > read + 2, what="the old monitor reads them")
    kept = lines(podman.logs("source"))
    podman.remove("source")
    assert kept == list(range(1, kept[-1] + 1))
    podman.start("again", "--log", annotations={"smr.restore": "unread:1", **FAIL})
    last_line(lambda: podman.logs("again"))
    assert lines(podman.logs("again"))[0] > read + 1


def waiting(pid: int) -> int:
    """Bytes in the pipe that is a process's stdout."""
    fd = os.open(f"/proc/{pid}/fd/1", os.O_RDONLY | os.O_NONBLOCK)
    try:
        found = fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0")
    finally:
        os.close(fd)
    return int(struct.unpack("i", found)[0])


def test_log_drivers(podman: Podman) -> None:
    """A checkpoint of a container with one log driver comes up under another."""
    podman.start("source", "--log", options=("--log-driver=none",))
    podman.ready("source")
    podman.checkpoint("source", "driver:1")
    podman.remove("source")
    podman.start("again", "--log", options=("--log-driver=k8s-file",), annotations={"smr.restore": "driver:1", **FAIL})
    assert last_line(lambda: podman.logs("again")) > 0


def test_the_size_of_a_terminal(podman: Podman) -> None:
    """A terminal that is attached has the size of its user's; until then it has that of the checkpoint."""
    podman.start("source", "--stdin", options=("-i", "-t"))
    podman.ready("source")
    with attached(podman, "source", 33, 111):
        eventually(lambda: size(podman, "source") == "111 33", what="the terminal has its size")
        podman.checkpoint("source", "size:1")
    podman.remove("source")
    podman.start("again", "--stdin", options=("-i", "-t"), annotations={"smr.restore": "size:1", **FAIL})
    assert size(podman, "again") == "111 33"
    with attached(podman, "again", 44, 144):
        eventually(lambda: size(podman, "again") == "144 44", what="the terminal has the new size")


@contextlib.contextmanager
def attached(podman: Podman, name: str, rows: int, columns: int) -> Iterator[None]:
    """`podman attach` in a terminal of that size."""
    with on_terminal(["podman", "attach", "--sig-proxy=false", name], podman.env) as fd:
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        yield


def size(podman: Podman, name: str) -> str:
    """Columns and rows of the container's terminal."""
    return podman.exec(name, "python3", "-c", SIZE, check=False).stdout.strip()


def test_a_logger_of_containerd(containerd_2: Containerd, tmp_path: Path) -> None:
    """A container without output is restored with a `binary://` logger, which gets what it writes from then on; and again."""
    engine = containerd_2
    logger, log = tmp_path / "logger", tmp_path / "log"
    logger.write_text(f"#!/bin/sh\ncat <&3 5>&- >>{log} &\ncat <&4 5>&- >>{log} &\nexec 5>&-\nwait\n")
    logger.chmod(0o755)
    command = [testimage.NAME, "again", "python3", "/app/workload.py", "--log"]
    engine("run", "-d", "--null-io", "--runtime", RUNTIME, testimage.NAME, "source", *command[2:])
    engine.ready("source")
    engine.checkpoint("source", "logger:1")
    engine.remove("source")
    for image in ("logger:1", "logger:2"):
        words = [word for key, value in {"smr.restore": image, **FAIL}.items() for word in ("--annotation", f"{key}={value}")]
        engine("run", "-d", "--runtime", RUNTIME, "--log-uri", f"binary://{logger}", *words, *command)
        eventually(lambda: len(lines(log.read_text() if log.exists() else "")) > 2, what="the logger has lines")
        if image == "logger:1":
            engine.checkpoint("again", "logger:2")
        engine.remove("again")
        heard = lines(log.read_text())
        assert heard == list(range(heard[0], heard[0] + len(heard)))
        log.unlink()
