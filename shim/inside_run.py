"""Commands and signals inside a running container, for hooks.

A command goes through the real runtime's `exec`, so it has all of the container's namespaces, its cgroup, user, environment
and limits. When its time is up, it and its children are killed: killing the runtime's process alone would leave them.
"""

from __future__ import annotations

import contextlib
import os
import platform
import select
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from smr.proto.errors import Code, SmrError
from smr.shim import procs
from smr.shim.run import environment, tail

_PREFIX = "smr-hook-"
_OUTPUT_BYTES = 64 << 10
# What a program that has ended wrote is in the pipe already.
_OUTPUT_S = 0.2
_SIGTIMEDWAIT = {"x86_64": 128, "aarch64": 137}  # rt_sigtimedwait, which sigwait is made of
# Their default is to do nothing, so a process without a handler is not ended by them.
_HARMLESS = (signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH)


def execute(runtime: Sequence[str], container: str, argv: Sequence[str], timeout_s: float) -> None:
    """Run `argv` in a container through `runtime` (a command line up to the verb). HOOK_FAILED unless it ends with status 0."""
    command = " ".join(argv)
    _sweep()
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-") as folder:
        pid_file = Path(folder, "pid")
        words = [*runtime, "exec", "--pid-file", str(pid_file), container, *argv]
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment()
            )
        except OSError as error:
            raise SmrError(f"cannot run {words[0]}: {error.strerror}", code=Code.HOOK_FAILED) from error
        assert process.stdout is not None
        output = _Output(process.stdout)
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise SmrError(
                f"'{command}' did not end within {timeout_s:g} s and was killed: {output.text()}",
                hint="give it longer, smr.hook.timeout=SECONDS; what it leaves running must not keep its output open",
                code=Code.HOOK_FAILED,
            ) from error
        finally:
            # Also when we are interrupted: nothing of the hook may run on into the checkpoint.
            if process.poll() is None:
                _kill(process, pid_file)
            output.close()
    if status != 0:
        raise SmrError(
            f"'{command}' ended with status {status}: {output.text()}",
            hint=f"try it: {' '.join([*runtime, 'exec', container, *argv])}",
            code=Code.HOOK_FAILED,
        )


def _sweep() -> None:
    """Remove the folders of those that were killed in a hook: their guard runs the next one."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            if owner.isdecimal() and not procs.alive(int(owner)) and folder.lstat().st_uid == os.geteuid():
                shutil.rmtree(folder, ignore_errors=True)


class _Output:
    """The end of what a program writes. Something that it leaves behind may keep the pipe open: nobody waits for that."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe, self._kept = pipe, b""
        self._end, self._ender = os.pipe()
        self._thread = threading.Thread(target=self._read, name="smr-hook-output", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        pipe = self._pipe.fileno()
        while True:
            ready = select.select([pipe, self._end], [], [])[0]
            if pipe not in ready:
                return  # nothing more is here, and close() waits
            data = os.read(pipe, _OUTPUT_BYTES)
            if not data:
                return
            self._kept = (self._kept + data)[-_OUTPUT_BYTES:]

    def text(self) -> str:
        self._thread.join(_OUTPUT_S)
        return tail(self._kept.decode("utf-8", "replace")) or "no output"

    def close(self) -> None:
        os.close(self._ender)
        self._thread.join()
        os.close(self._end)
        self._pipe.close()


def _kill(process: subprocess.Popen[bytes], pid_file: Path) -> None:
    """The command by the pid that the runtime has written, then the runtime, which ends by itself with it."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        procs.kill_all(lambda: [found.pid for found in procs.tree(pid)], timeout_s=5.0)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def send(init: int, number: signal.Signals, target: int | str | None) -> None:
    """Send a signal to init, to a pid as the container sees it, or to all processes of a command name.

    HOOK_FAILED when there is none, or when the signal would end one for want of a handler. What a process makes of it is not
    known: it has not handled it yet when this returns.
    """
    found = [pid for pid in _members(init) if _is(pid, init, target)]
    if not found:
        what = f"no process {target}" if isinstance(target, int) else f"no process is named '{target}'"
        hint = "pids and command names are those that 'ps' shows in the container"
        raise SmrError(f"{what} in the container", hint=hint, code=Code.HOOK_FAILED)
    with contextlib.ExitStack() as stack:
        opened = [(pid, fd) for pid in found if (fd := _open(pid, stack)) >= 0 and _is(pid, init, target)]
        for pid, _ in opened:
            if number not in _HARMLESS and not _expected(pid, number):
                raise SmrError(
                    f"process {_ns_pid(pid)} ({_comm(pid)}) does not handle {number.name}: it would end, or never see it",
                    hint="name the process that handles it: signal:NAME:PID or signal:NAME:COMMAND",
                    code=Code.HOOK_FAILED,
                )
        for _, fd in opened:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, number)


def _members(init: int) -> list[int]:
    """Init and its descendants; with a pid namespace of its own, everything in that: `exec` makes processes of other parents."""
    tree = [process.pid for process in procs.tree(init)]
    try:
        own = Path(f"/proc/{init}/ns/pid").stat()
        if os.path.samestat(own, Path("/proc/self/ns/pid").stat()):
            return tree
    except OSError:
        return tree
    others = []
    for pid in procs.all_pids():
        with contextlib.suppress(OSError):
            if pid not in tree and os.path.samestat(own, Path(f"/proc/{pid}/ns/pid").stat()):
                others.append(pid)
    return tree + others


def _is(pid: int, init: int, target: int | str | None) -> bool:
    process = procs.describe(pid)
    if process is None or process.state in "ZX":
        return False
    if target is None:
        return pid == init
    return process.ns_pid == target if isinstance(target, int) else _comm(pid) == target[:15]


def _open(pid: int, stack: contextlib.ExitStack) -> int:
    """A pidfd, which stays this process's when the number is used again; -1 when it is gone."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return -1
    stack.callback(os.close, fd)
    return fd


def _expected(pid: int, number: int) -> bool:
    """Whether a process catches or ignores a signal, or all its threads hold it back for sigwait or a signalfd."""
    masks = _masks(Path(f"/proc/{pid}"))
    if masks is None or any(masks[name] >> (number - 1) & 1 for name in ("SigCgt", "SigIgn")):
        return True
    return all(_held_back(thread, number) for thread in Path(f"/proc/{pid}/task").iterdir())


def _held_back(thread: Path, number: int) -> bool:
    masks = _masks(thread)
    if masks is None or masks["SigBlk"] >> (number - 1) & 1:
        return True
    try:
        # While a thread is in sigwait, the kernel shows what it waits for as not blocked.
        return (thread / "syscall").read_text().startswith(f"{_SIGTIMEDWAIT.get(platform.machine(), -2)} ")
    except OSError:
        return True


def _masks(folder: Path) -> dict[str, int] | None:
    """The signal masks in a status file; None when that process or thread has ended: there is nothing to harm."""
    try:
        lines = (folder / "status").read_text(errors="replace").splitlines()
    except OSError:
        return None
    pairs = (line.split(":", 1) for line in lines if line.startswith("Sig"))
    return {name: int(value, 16) for name, value in pairs if "/" not in value}


def _comm(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
    return "?"


def _ns_pid(pid: int) -> int:
    process = procs.describe(pid)
    return process.ns_pid if process else pid
