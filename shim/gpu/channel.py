"""The helper as a process: start it, wait until it is ready, send requests, read replies, end it.

The helper inherits stdin, stdout and stderr and no other descriptor, and an environment without the caller's CUDA_* and LD_*
variables. Its stderr is kept in memory for messages. Every wait has an end; a helper that hangs in the kernel is killed and left
to die by itself. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping

from smr.proto.errors import Code, SmrError
from smr.shim import procs, run

_READ_BYTES = 65536
_END_S = 1.0
_REAP_S = 0.02

# Killed, and not yet dead when they were last looked at.
_dying: list[subprocess.Popen[bytes]] = []


class HelperGoneError(SmrError):
    """The helper has ended by itself, or was killed."""


class Channel:
    """One helper. `driver` and `cuda` are known once it is ready."""

    def __init__(self) -> None:
        self._stderr = os.memfd_create("smr-gpu-helper")
        self._buffer = b""
        self._ready = False
        self.driver = ""
        self.cuda = 0
        _reap()
        argv = [sys.executable, "-I", "-m", "smr.shim.gpu.helper", str(os.getpid())]
        try:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, bufsize=0, env=run.environment()
            )
        except OSError as error:
            os.close(self._stderr)
            message = f"cannot run {sys.executable}: {error.strerror}"
            raise SmrError(message, code=Code.GPU_FAILED, program=sys.executable) from error

    @property
    def pid(self) -> int:
        """The helper's pid."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended; its first thread may have while others of it have not."""
        return self._process.poll() is None and procs.alive(self.pid)

    def ready(self, timeout_s: float) -> None:
        """Wait until CUDA is initialised. Raises the helper's own error, HelperGoneError, or SmrError TIMEOUT."""
        if self._ready:
            return
        reply = self.receive(time.monotonic() + timeout_s)
        if reply is None:
            raise SmrError(
                f"CUDA did not initialise within {timeout_s:g} s (process {self.pid})",
                hint="see 'dmesg', lines with NVRM, and 'nvidia-smi'",
                code=Code.TIMEOUT,
            )
        if isinstance(refused := reply.get("refused"), dict):
            raise SmrError(str(refused["message"]), hint=str(refused["hint"]), code=Code(refused["code"]))
        facts = reply["ready"]
        assert isinstance(facts, dict)
        self.driver = str(facts["driver"])
        self.cuda = int(facts["cuda"])
        self._ready = True

    def send(self, message: Mapping[str, object]) -> None:
        """One request. Raises HelperGoneError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise self._gone() from error

    def receive(self, deadline: float) -> Mapping[str, object] | None:
        """The next reply, or None when there is none by `deadline` (time.monotonic). Raises HelperGoneError."""
        assert self._process.stdout is not None
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if not poll.poll(max(left, 0) * 1000):
                return None
            data = os.read(self._process.stdout.fileno(), _READ_BYTES)
            if not data:
                raise self._gone()
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply = json.loads(line)
        assert isinstance(reply, dict)
        return reply

    def kill(self) -> None:
        """End it at once; who waits for a reply is told that it is gone."""
        self._process.kill()

    def close(self, *, patience_s: float = 0.0) -> None:
        """End it: told to, when it gets `patience_s` to let go of what it has running, and killed then."""
        if patience_s and self._ready:
            with contextlib.suppress(HelperGoneError):
                self.send({"call": "end"})
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience_s)
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        with contextlib.suppress(OSError):
            os.close(self._stderr)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_REAP_S)
        if self._process.returncode is None:
            _dying.append(self._process)

    def _gone(self) -> HelperGoneError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        status = self._process.returncode
        how = (
            "did not end"
            if status is None
            else f"was killed by signal {-status}"
            if status < 0
            else f"ended with status {status}"
        )
        said = run.tail(os.pread(self._stderr, _READ_BYTES, 0).decode(errors="replace"))
        return HelperGoneError(
            f"SMR's GPU helper (process {self.pid}) {how}" + (f": {said}" if said else ""), code=Code.GPU_FAILED
        )


def name(pid: int) -> str:
    """A process as messages name it: "123 (python3)"."""
    with contextlib.suppress(OSError):
        return f"{pid} ({(procs.PROC / str(pid) / 'comm').read_text(errors='replace').strip()})"
    return str(pid)


def _reap() -> None:
    _dying[:] = [process for process in _dying if process.poll() is None]
