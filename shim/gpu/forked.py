"""Forked children that hold NVIDIA's devices without CUDA of their own: PyTorch's compile workers, workers of a DataLoader.

CRIU can dump neither the descriptors nor the mappings, and the driver, for which these processes have no CUDA, does not take
them away. So the children are made to give them up, just before the dump: harmless, because nothing can be done with them there.
CUDA refuses every call after a fork; the mappings of /dev/nvidia-uvm fault since the fork (its driver disables them), and memory
of the others belongs to objects of the parent, which has given the GPU up when this runs.

- A mapping becomes anonymous memory that nothing may touch (PROT_NONE, MAP_NORESERVE) at the same place: costs nothing in the
  image, and nothing else is mapped where libcuda believes its own memory to be, and would unmap it at its end.
- A descriptor becomes one of /dev/null under the same number: libcuda may close it later, and a free number would be given to
  another file by then. An ioctl on it fails with ENOTTY.

It is not taken back when the dump fails. A worker that waits in a system call goes on waiting (`smr.shim.gpu.inject`). The
process must not be frozen by its cgroup; stopped by a signal it may be. Standard library only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from smr.proto.errors import Code, SmrError
from smr.shim.gpu import processes
from smr.shim.gpu.inject import Remote
from smr.shim.gpu.processes import PROC, Held
from smr.shim.gpu.ptrace import ThreadGoneError

REMEDY = (
    "let the server do without forked workers: TORCHINDUCTOR_COMPILE_THREADS=1, or call"
    " torch._inductor.async_compile.shutdown_compile_workers() after the warm-up; num_workers=0 for a DataLoader"
)
_THREADS = 8
_PAGE = 4096
_PROT_NONE, _PROT_READ_WRITE = 0, 3
_MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x2, 0x10, 0x20, 0x4000
_AT_FDCWD = -100


def release(children: Sequence[Held]) -> None:
    """Make them give up NVIDIA's devices. Children that ended meanwhile are left out.

    `children` are `Found.forked` of `processes.find`, and the driver has said that they have no CUDA. Raises SmrError
    GPU_UNSUPPORTED, naming the first that could not be made to; others have given them up then.
    """
    if not children:
        return
    # The kernel lets go of a process that hangs when the thread of ours ends that attached to it: so threads, which end here.
    with ThreadPoolExecutor(min(_THREADS, len(children)), thread_name_prefix="forked") as pool:
        for failure in list(pool.map(_failure, children)):
            if failure is not None:
                raise failure


def release_one(child: Held, proc: Path = PROC) -> None:
    """The same for one child. Raises SmrError, OSError."""
    _check_is_fork(child)
    with Remote(child.pid) as remote:
        # What it holds now, not what was seen before it was stopped; the same kinds of device only.
        held = processes.holding(child.pid, proc, _same_devices(child))
        if held is None:
            return
        if held.descriptors:
            _replace_descriptors(remote, held, proc)
        for region in held.mappings:
            flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
            remote.call("mmap", region.start, region.end - region.start, _PROT_NONE, flags, -1, 0)
    if left := processes.holding(child.pid, proc, _same_devices(child)):
        raise SmrError(f"it still holds {', '.join(left.paths)}", code=Code.GPU_UNSUPPORTED, pid=child.pid)


def _failure(child: Held) -> SmrError | None:
    try:
        release_one(child)
    except ThreadGoneError:
        return None
    except (SmrError, OSError) as error:
        if not processes.descriptors(child.pid):
            return None
        held = f"process {child.pid} ({child.command}) was forked from a CUDA process and holds {', '.join(child.paths)}"
        message = f"{held}, and cannot be made to give it up: {getattr(error, 'message', error)}"
        failure = SmrError(message, hint=REMEDY, code=Code.GPU_UNSUPPORTED, pid=child.pid)
        failure.__cause__ = error
        return failure
    return None


def _check_is_fork(child: Held) -> None:
    """A child that still shares its parent's memory or descriptors (vfork, CLONE_VM) would take them from the parent."""
    parent = child.inherited_from
    if parent and processes.shares_memory(child.pid, parent):
        raise SmrError(f"it shares memory or descriptors with process {parent}", code=Code.GPU_UNSUPPORTED, pid=child.pid)


def _same_devices(child: Held) -> processes.Devices:
    """NVIDIA's, and whatever else the caller found the child to hold."""
    own = child.paths
    return lambda path: path in own or processes.is_device(path)


def _replace_descriptors(remote: Remote, held: Held, proc: Path) -> None:
    """Each by one of /dev/null with the same number and close-on-exec flag."""
    page = remote.call("mmap", 0, _PAGE, _PROT_READ_WRITE, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
    try:
        remote.write(page, b"/dev/null\0")
        null = remote.call("openat", _AT_FDCWD, page, os.O_RDWR | os.O_CLOEXEC, 0)
        for one in held.descriptors:
            remote.call("dup3", null, one.number, _close_on_exec(held.pid, one.number, proc))
        remote.call("close", null)
    finally:
        remote.call("munmap", page, _PAGE)


def _close_on_exec(pid: int, number: int, proc: Path) -> int:
    lines = (proc / str(pid) / "fdinfo" / str(number)).read_text().splitlines()
    flags = next(line.split()[1] for line in lines if line.startswith("flags:"))
    return int(flags, 8) & os.O_CLOEXEC
