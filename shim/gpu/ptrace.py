"""ptrace(2) on single threads of other processes: attach, stop, continue, let go, registers, signal mask.

Threads are attached with PTRACE_SEIZE, which sends nothing to them and leaves a stopped process in its group stop. The kernel
knows the *thread* that attached: every call about a thread has to come from the thread of ours that seized it, or it fails as
if the thread were gone. When that thread of ours ends, by kill -9 too, the kernel lets go of all that it held.

A thread that was seized must be stopped for all calls but `interrupt` and `wait`. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from pathlib import Path

from smr.proto.errors import Code, SmrError

NT_PRSTATUS = 1
NT_PRFPREG = 2
_WALL = 0x40000000
_WAIT_STEP_S = 0.0005
_SPINS = 50
_MASK_BYTES = 8
_REGISTERS_BYTES = 4096
# siginfo_t of 64-bit machines.
_SIGINFO_BYTES = 128
_SI_ADDR = 16


class _Request(IntEnum):
    """<linux/ptrace.h>, of x86-64 and arm64 alike."""

    CONT = 7
    DETACH = 17
    SYSCALL = 24
    SETOPTIONS = 0x4200
    GETEVENTMSG = 0x4201
    GETSIGINFO = 0x4202
    GETREGSET = 0x4204
    SETREGSET = 0x4205
    SEIZE = 0x4206
    INTERRUPT = 0x4207
    GETSIGMASK = 0x420A
    SETSIGMASK = 0x420B


class Option(IntFlag):
    """PTRACE_O_*: what a seized thread stops for besides signals. Threads that it clones are then seized too."""

    NONE = 0
    SYSGOOD = 1
    CLONE = 8
    EXEC = 16


class Event(IntEnum):
    """PTRACE_EVENT_*: why a thread stopped. STOP is `interrupt`, a group stop, and the first stop of a new thread."""

    NONE = 0
    CLONE = 3
    EXEC = 4
    STOP = 128


class ThreadGoneError(SmrError):
    """The thread has ended, or is not one that this thread of ours holds stopped."""


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What `wait` saw of thread `tid`: the status of waitpid(2)."""

    tid: int
    raw: int

    @property
    def ended(self) -> bool:
        """The thread is no more; it is not held any longer."""
        return not os.WIFSTOPPED(self.raw)

    @property
    def signal(self) -> int:
        """Of a stopped thread the signal: that of a group stop, SIGTRAP for the stops of ptrace's own, or one to be delivered."""
        return os.WSTOPSIG(self.raw) if os.WIFSTOPPED(self.raw) else 0

    @property
    def event(self) -> int:
        """An `Event`, or another of the kernel's numbers; 0 for a signal that is about to be delivered."""
        return self.raw >> 16

    @property
    def group_stop(self) -> bool:
        """The thread stands in the group stop of its process, as SIGSTOP makes it."""
        stops = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
        return self.event == Event.STOP and self.signal in stops

    def __str__(self) -> str:
        """For messages and tests."""
        if os.WIFEXITED(self.raw):
            return f"thread {self.tid} exited with {os.WEXITSTATUS(self.raw)}"
        if os.WIFSIGNALED(self.raw):
            return f"thread {self.tid} was killed by signal {os.WTERMSIG(self.raw)}"
        return f"thread {self.tid} stopped: signal {self.signal}, event {self.event}"


def seize(tid: int, options: Option = Option.NONE) -> None:
    """Attach to a thread; it goes on as before. A thread in a group stop reports it (`wait`), without `interrupt`.

    Raises ThreadGoneError, or SmrError GPU_UNSUPPORTED when another process traces it, PERMISSION when it is forbidden.
    """
    _ptrace(_Request.SEIZE, tid, 0, int(options))


def interrupt(tid: int) -> None:
    """Ask a seized thread to stop; `wait` says when it has. Inside an uninterruptible call of a driver it stops after that."""
    _ptrace(_Request.INTERRUPT, tid, 0, 0)


def cont(tid: int, number: int = 0) -> None:
    """Let a stopped thread run, also one whose process is in a group stop; `number`: the signal that is delivered to it."""
    _ptrace(_Request.CONT, tid, 0, number)


def cont_to_syscall(tid: int, number: int = 0) -> None:
    """The same, up to the next entry into, or return from, a system call."""
    _ptrace(_Request.SYSCALL, tid, 0, number)


def detach(tid: int, number: int = 0) -> None:
    """Let go of a stopped thread. It goes back into its process's group stop where there is one, a moment later."""
    _ptrace(_Request.DETACH, tid, 0, number)


def set_options(tid: int, options: Option) -> None:
    """Change what a seized thread stops for."""
    _ptrace(_Request.SETOPTIONS, tid, 0, int(options))


def event_message(tid: int) -> int:
    """Of a thread that stopped for Event.CLONE: the new thread's id."""
    value = ctypes.c_ulong()
    _ptrace(_Request.GETEVENTMSG, tid, 0, ctypes.addressof(value))
    return value.value


def fault_address(tid: int) -> int:
    """Of a thread that stopped before SIGSEGV or SIGBUS is delivered: the address that it touched."""
    info = ctypes.create_string_buffer(_SIGINFO_BYTES)
    _ptrace(_Request.GETSIGINFO, tid, 0, ctypes.addressof(info))
    return int.from_bytes(info.raw[_SI_ADDR : _SI_ADDR + 8], "little")


def signal_mask(tid: int) -> int:
    """The signals that a stopped thread blocks: bit N-1 for signal N."""
    value = ctypes.c_uint64()
    _ptrace(_Request.GETSIGMASK, tid, _MASK_BYTES, ctypes.addressof(value))
    return value.value


def set_signal_mask(tid: int, mask: int) -> None:
    """Set them. It outlives `detach` and our own end."""
    value = ctypes.c_uint64(mask)
    _ptrace(_Request.SETSIGMASK, tid, _MASK_BYTES, ctypes.addressof(value))


def registers(tid: int, kind: int = NT_PRSTATUS) -> bytes:
    """A stopped thread's registers as the kernel lays them out (user_regs_struct); `kind`: NT_* of <elf.h>."""
    buffer = ctypes.create_string_buffer(_REGISTERS_BYTES)
    vector = _Iovec(ctypes.addressof(buffer), len(buffer))
    _ptrace(_Request.GETREGSET, tid, kind, ctypes.addressof(vector))
    return buffer.raw[: vector.length]


def set_registers(tid: int, data: bytes, kind: int = NT_PRSTATUS) -> None:
    """Set them: what `registers` gave, changed."""
    buffer = ctypes.create_string_buffer(data, len(data))
    vector = _Iovec(ctypes.addressof(buffer), len(data))
    _ptrace(_Request.SETREGSET, tid, kind, ctypes.addressof(vector))


def poll(tid: int) -> Status | None:
    """What a seized thread has to report now; None for nothing. Any thread of ours may ask. Raises ThreadGoneError."""
    try:
        pid, raw = os.waitpid(tid, os.WNOHANG | _WALL)
    except ChildProcessError as error:
        raise ThreadGoneError(f"thread {tid} has ended, or was never seized", code=Code.GPU_FAILED, tid=tid) from error
    return Status(tid=pid, raw=raw) if pid else None


def wait(tid: int, timeout_s: float) -> Status:
    """The next thing that a seized thread reports: it stopped or ended. Raises ThreadGoneError, or SmrError TIMEOUT."""
    deadline = time.monotonic() + timeout_s
    spins = 0
    while (status := poll(tid)) is None:
        if time.monotonic() > deadline:
            message = f"thread {tid} did not stop within {timeout_s:g} s: it is {state_words(tid)}"
            raise SmrError(message, code=Code.TIMEOUT, tid=tid)
        spins += 1
        # A stop takes microseconds, unless the thread is in the kernel for longer.
        time.sleep(0 if spins < _SPINS else _WAIT_STEP_S)
    return status


def state_words(tid: int) -> str:
    """A thread's state as /proc/TID/status writes it, such as "D (disk sleep)"; "gone"."""
    return _status_field(tid, "State") or "gone"


def tracer(tid: int) -> int:
    """The process that traces a thread; 0 for none."""
    # The kernel names the thread that does.
    return int(_status_field(int(_status_field(tid, "TracerPid") or 0), "Tgid") or 0)


def _status_field(tid: int, name: str) -> str:
    """One line of /proc/TID/status, which threads have as well as processes."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{tid}/status").read_text(errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return line.partition(":")[2].strip()
    return ""


@functools.cache
def _libc() -> Callable[[int, int, int, int], int]:
    call = ctypes.CDLL(None, use_errno=True).ptrace
    call.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    call.restype = ctypes.c_long
    return call


def _ptrace(request: _Request, tid: int, address: int, data: int) -> None:
    if _libc()(request, tid, address, data) == -1:
        raise _error(request, tid, ctypes.get_errno())


def _error(request: _Request, tid: int, number: int) -> SmrError:
    failed = f"ptrace {request.name} of thread {tid} failed: {os.strerror(number)}"
    if number == errno.ESRCH:
        found = state_words(tid)
        why = "it is gone" if found == "gone" else f"it is {found}, and not held stopped by this thread"
        return ThreadGoneError(f"{failed}: {why}", code=Code.GPU_FAILED, tid=tid)
    if number == errno.EPERM and (other := tracer(tid)):
        hint = f"end the debugger: process {other}"
        return SmrError(f"{failed}: process {other} traces it", hint=hint, code=Code.GPU_UNSUPPORTED, tid=tid)
    if number in (errno.EPERM, errno.EACCES):
        hint = "needed root with CAP_SYS_PTRACE; see kernel.yama.ptrace_scope (3 forbids it to all)"
        return SmrError(failed, hint=hint, code=Code.PERMISSION, tid=tid)
    return SmrError(failed, code=Code.GPU_FAILED, tid=tid, errno=number)
