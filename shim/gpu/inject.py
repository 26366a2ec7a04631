"""System calls made by a stopped thread of another process for us, after which it goes on as if nothing had been.

    with Remote(pid) as remote:
        address = remote.call("mmap", 0, 4096, 3, 0x22, -1, 0)

The thread is seized and interrupted, its registers are kept, its signals blocked. For a call the registers are set to one at a
`syscall` instruction that the process has mapped anyway (the vDSO's), and the thread runs to the end of that call. At the end
it is interrupted once more, gets its own registers and mask back, and is let go.

A thread that was waiting in a system call waits on: the kernel undoes an interrupted call when it leaves the stop that
`interrupt` makes, from the registers that are there then. So ours are put back in such a stop and in no other, and while our
own calls run orig_rax is -1 and the restart block is left alone. read, futex, poll and nanosleep go on, with the time they had
left, and none gives EINTR. (On arm64 the kernel rewinds before the stop: there a call with a relative timeout begins it anew.)

One thread of ours does all of it: who enters must leave. When this program is killed in between, the thread is left with our
registers, and its process is lost; it takes under a millisecond. x86-64 and arm64, 64-bit processes. A cgroup that holds the
process must not be frozen: nothing of it runs then, our calls neither. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from smr.proto.errors import Code, SmrError
from smr.shim.gpu import ptrace
from smr.shim.gpu.processes import mappings, tasks
from smr.shim.gpu.ptrace import Event, Option, Status, ThreadGoneError

_ALL = (1 << 64) - 1
_ERRNO_MOST = 4095
_STOP_S = 5.0
_STOPS_MOST = 64
_SYSCALL_TRAP = 5 | 0x80
_SCAN_BYTES = 4 << 20
_ARM_SYSTEM_CALL = 0x404


@dataclass(frozen=True, slots=True, kw_only=True)
class _Machine:
    """A processor's user_regs_struct as 8-byte words: its length, and where the call's number, arguments and result are."""

    words: int
    ip: int
    number: int
    arguments: tuple[int, ...]
    result: int
    original: int | None
    instruction: bytes
    alignment: int
    calls: dict[str, int]


_MACHINES = {
    "x86_64": _Machine(
        words=27,
        ip=16,
        number=10,
        arguments=(14, 13, 12, 7, 9, 8),
        result=10,
        original=15,
        instruction=b"\x0f\x05",
        alignment=1,
        calls={
            "close": 3,
            "mmap": 9,
            "munmap": 11,
            "getpid": 39,
            "openat": 257,
            "dup3": 292,
            "mremap": 25,
            "madvise": 28,
        },
    ),
    "aarch64": _Machine(
        words=34,
        ip=32,
        number=8,
        arguments=(0, 1, 2, 3, 4, 5),
        result=0,
        original=None,
        instruction=b"\x01\x00\x00\xd4",
        alignment=4,
        calls={
            "close": 57,
            "mmap": 222,
            "munmap": 215,
            "getpid": 172,
            "openat": 56,
            "dup3": 24,
            "mremap": 216,
            "madvise": 233,
        },
    ),
}


class Remote:
    """One thread of a process (`tid`, else any), stopped, to make system calls with; a context manager.

    Entering raises SmrError: GPU_UNSUPPORTED when the process is traced, does not stop, or is no 64-bit one of this machine's;
    PERMISSION; ThreadGoneError. Leaving raises when it could not be put back.
    """

    def __init__(self, pid: int, tid: int = 0) -> None:
        self.pid = pid
        self.tid = tid
        self._machine = _machine()
        self._kept = b""
        self._mask = 0
        self._gadget = 0
        self._runs = False

    def __enter__(self) -> Remote:
        self.tid = self.tid or _living_thread(self.pid)
        ptrace.seize(self.tid, Option.SYSGOOD)
        try:
            ptrace.interrupt(self.tid)
            self._stopped()
            self._kept = ptrace.registers(self.tid)
            if len(self._kept) != self._machine.words * 8:
                raise _unsupported(self.pid, f"it is no 64-bit process of {platform.machine()}")
            self._gadget = self._find_instruction()
            self._mask = ptrace.signal_mask(self.tid)
            ptrace.set_signal_mask(self.tid, _ALL)
        except SmrError:
            with contextlib.suppress(SmrError):
                ptrace.detach(self.tid)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._put_back()
        except SmrError as error:
            if value is None:
                raise
            value.add_note(str(error))

    def call(self, name: str, *arguments: int) -> int:
        """Make a system call and return its result; OSError with its errno when it fails there.

        Raises ThreadGoneError when the process ended meanwhile, SmrError GPU_UNSUPPORTED when the call does not return.
        """
        machine = self._machine
        words = list(struct.unpack(f"<{machine.words}Q", self._kept))
        for place, argument in zip(machine.arguments, (*arguments, *[0] * 6), strict=False):
            words[place] = argument & _ALL
        words[machine.number] = machine.calls[name]
        words[machine.ip] = self._gadget
        if machine.original is not None:
            words[machine.original] = _ALL
        ptrace.set_registers(self.tid, struct.pack(f"<{machine.words}Q", *words))
        if platform.machine() == "aarch64":
            # Not in a system call, so that the kernel takes no old result for one to be restarted.
            ptrace.set_registers(self.tid, struct.pack("<i", -1), _ARM_SYSTEM_CALL)
        self._run_to_syscall_stop()
        self._run_to_syscall_stop()
        result = struct.unpack_from("<q", ptrace.registers(self.tid), machine.result * 8)[0]
        if -_ERRNO_MOST <= result < 0:
            raise OSError(-result, f"{name} in process {self.pid}: {os.strerror(-result)}")
        return int(result)

    def read(self, address: int, count: int) -> bytes:
        """Bytes of its memory."""
        with Path(f"/proc/{self.pid}/mem").open("rb", buffering=0) as memory:
            memory.seek(address)
            return memory.read(count)

    def write(self, address: int, data: bytes) -> None:
        """Put bytes into its memory."""
        with Path(f"/proc/{self.pid}/mem").open("r+b", buffering=0) as memory:
            memory.seek(address)
            memory.write(data)

    def _put_back(self) -> None:
        """Registers, and only then the mask and our hold; the thread ends in a stop of `interrupt` before that."""
        ptrace.interrupt(self.tid)
        if not self._runs:
            ptrace.cont(self.tid)
        self._stopped()
        ptrace.set_registers(self.tid, self._kept)
        ptrace.set_signal_mask(self.tid, self._mask)
        ptrace.detach(self.tid)

    def _stopped(self) -> None:
        """Wait for a stop of `interrupt`, or of a group stop, which is one of the same kind; hand on signals that come first."""
        for _ in range(_STOPS_MOST):
            status = self._wait()
            if status.event == Event.STOP:
                return
            ptrace.cont(self.tid, 0 if status.event or status.signal == _SYSCALL_TRAP else status.signal)
        raise _unsupported(self.pid, "it is sent signals faster than it stops")

    def _run_to_syscall_stop(self) -> None:
        """To the next entry into a system call or return from one, through the stops that a group stop makes."""
        number = 0
        for _ in range(_STOPS_MOST):
            ptrace.cont_to_syscall(self.tid, number)
            self._runs = True
            status = self._wait()
            self._runs = False
            if status.signal == _SYSCALL_TRAP:
                return
            # Only SIGSTOP and SIGKILL come through the mask.
            number = 0 if status.event else status.signal
        raise _unsupported(self.pid, "it is stopped faster than it runs")

    def _wait(self) -> Status:
        try:
            status = ptrace.wait(self.tid, _STOP_S)
        except SmrError as error:
            if error.code is Code.TIMEOUT:
                raise _unsupported(self.pid, f"its cgroup is frozen, or it hangs in the kernel ({error.message})") from error
            raise
        if status.ended:
            raise ThreadGoneError(f"process {self.pid} ended: {status}", code=Code.GPU_FAILED, pid=self.pid)
        return status

    def _find_instruction(self) -> int:
        """Where a system call's instruction is mapped: in the vDSO, else in any code. What stands after it never runs."""
        code = [one for one in mappings(self.pid) if "x" in one.permissions and one.path != "[vsyscall]"]
        for region in sorted(code, key=lambda one: one.path != "[vdso]"):
            with contextlib.suppress(OSError):
                data = self.read(region.start, min(region.end - region.start, _SCAN_BYTES))
                place = data.find(self._machine.instruction)
                while place >= 0:
                    if place % self._machine.alignment == 0:
                        return region.start + place
                    place = data.find(self._machine.instruction, place + 1)
        raise _unsupported(self.pid, "no system call instruction is mapped in it")


def _machine() -> _Machine:
    if (machine := _MACHINES.get(platform.machine())) is None:
        raise SmrError(f"no system calls can be made for others on {platform.machine()}", code=Code.GPU_UNSUPPORTED)
    return machine


def _living_thread(pid: int) -> int:
    """The first thread, or another when that one has ended by itself."""
    for tid in tasks(pid):
        if ptrace.state_words(tid)[:1] not in ("Z", "X", "g"):
            return tid
    raise ThreadGoneError(f"process {pid} has ended", code=Code.GPU_FAILED, pid=pid, errno=errno.ESRCH)


def _unsupported(pid: int, why: str) -> SmrError:
    return SmrError(f"cannot make a system call in process {pid}: {why}", code=Code.GPU_UNSUPPORTED, pid=pid)
