"""Which processes of a container have CUDA, which hold NVIDIA's devices without it, and which GPUs each has open.

All of it is read from /proc, from the host, and changes nothing. A process with CUDA has opened /dev/nvidiactl, /dev/nvidia-uvm
and the GPUs' device files itself. A process that was forked from it has the same open files under the same numbers (kcmp(2)
tells), and whatever mappings of them a fork copies, but no CUDA: the driver's state does not survive a fork. CRIU can dump
neither; the first the driver frees of them, the second `smr.shim.gpu.forked` does.

What /proc cannot tell for certain the driver decides (`settle`): a process that has opened devices itself and has no CUDA is
one of `others`, such as a server's front process that asked NVML for the number of GPUs and left it open. Nobody can dump these.
Nothing of NVIDIA's is imported or called here; on a machine with neither driver `uses_gpu` reads one file.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from smr.proto.errors import Code, SmrError

PROC = Path("/proc")
# Character devices of NVIDIA's kernel modules. The folders -caps (MIG) and -caps-imex-channels hold capabilities, not GPUs.
DEVICE = re.compile(r"/dev/nvidia(?:\d+|ctl|-uvm|-uvm-tools|-modeset|-caps/.+|-caps-imex-channels/.+)(?: \(deleted\))?$")
_GPU = re.compile(r"/dev/nvidia(\d+)")
_AMD = "/dev/kfd"
_LIBRARY = re.compile(r"/libcuda\.so(?:\.|$)")
_DRIVERS = re.compile(r"^ *\d+ (?:nvidia\S*|kfd)$", re.MULTILINE)
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) \S+ \d+ *(.*)")
_KCMP = {"x86_64": 312, "aarch64": 272}
_KCMP_FILE, _KCMP_VM, _KCMP_FILES = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """An open file: number, and what /proc/PID/fd says of it."""

    number: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A line of /proc/PID/maps: addresses in bytes, `end` exclusive; `permissions` such as "rw-s"; `offset` in the file."""

    start: int
    end: int
    permissions: str
    offset: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What one process holds of NVIDIA's devices. `inherited_from` is the ancestor that opened them, 0 for itself."""

    pid: int
    command: str
    descriptors: tuple[Descriptor, ...] = ()
    mappings: tuple[Region, ...] = ()
    library: bool = False
    inherited_from: int = 0

    @property
    def paths(self) -> tuple[str, ...]:
        """The devices that it has open or mapped, each once."""
        return tuple(sorted({one.path for one in self.descriptors} | {one.path for one in self.mappings}))

    @property
    def minors(self) -> tuple[int, ...]:
        """The GPUs among them, by minor number. CUDA opens every GPU that the container has, used or not."""
        return tuple(sorted({int(match[1]) for path in self.paths if (match := _GPU.match(path))}))

    @property
    def used(self) -> tuple[int, ...]:
        """The GPUs that it has a context on: of the others CUDA maps pages for writing only (driver 580)."""
        readable = [one.path for one in self.mappings if one.permissions.startswith("r")]
        return tuple(sorted({int(match[1]) for path in readable if (match := _GPU.match(path))}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A container's processes: `tree` are all pids, parents first; `cuda` have CUDA, `forked` hold devices of those.

    `others` hold devices and have no CUDA; `find` cannot tell them from `cuda`, `settle` can.
    """

    tree: tuple[int, ...]
    cuda: tuple[Held, ...] = ()
    forked: tuple[Held, ...] = ()
    others: tuple[Held, ...] = ()

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes with CUDA, parents first."""
        return tuple(one.pid for one in self.cuda)

    @property
    def minors(self) -> tuple[int, ...]:
        """The GPUs that are in use, by minor number."""
        return tuple(sorted({minor for one in self.cuda for minor in one.minors}))


SameFile = Callable[[int, int, int], bool]
Devices = Callable[[str], bool]


def uses_gpu(root_pid: int, proc: Path = PROC) -> bool:
    """Whether anything in the tree has a GPU open: NVIDIA's, or AMD's, which `find` refuses. 0.1 ms on a node with no driver."""
    if not _DRIVERS.search(_text(proc / "devices")):
        return False
    return any(is_device(one.path) or one.path == _AMD for pid in tree(root_pid, proc) for one in _descriptors(pid, proc))


def find(root_pid: int, proc: Path = PROC, same_file: SameFile | None = None) -> Found:
    """The tree's processes with CUDA and the forked ones. Raises SmrError UNSUPPORTED for AMD GPUs, PERMISSION.

    `same_file(pid, other, fd)`: whether both processes have the same open file at that number.
    """
    pids = tuple(tree(root_pid, proc))
    found: dict[int, Held] = {}
    parents = {child: pid for pid in pids for child in children(pid, proc)}
    for pid in pids:
        if held := holding(pid, proc):
            origin = _origin(held, found, parents, same_file or _same_file)
            found[pid] = replace(held, inherited_from=origin)
    return _sorted(pids, found.values())


def settle(
    found: Found, states: Mapping[int, object | None], threads: Mapping[int, int] | None = None, proc: Path = PROC
) -> Found:
    """The same by the driver's word: no CUDA where the state is None, or where its restore thread is in another process.

    `states` and `threads` are by pid, what the driver says of each process in `found.cuda` and `found.forked`.
    """
    cuda: list[Held] = []
    forked: list[Held] = []
    others: list[Held] = []
    for one in sorted((*found.cuda, *found.forked, *found.others), key=lambda held: found.tree.index(held.pid)):
        thread = (threads or {}).get(one.pid, one.pid)
        if states.get(one.pid) is not None and (proc / str(one.pid) / "task" / str(thread)).exists():
            cuda.append(one)
        else:
            (forked if one.inherited_from or not one.descriptors else others).append(one)
    return replace(found, cuda=tuple(cuda), forked=tuple(forked), others=tuple(others))


def is_device(path: str) -> bool:
    """Whether a path is that of one of NVIDIA's devices."""
    return DEVICE.match(path) is not None


def holding(pid: int, proc: Path = PROC, device: Devices = is_device) -> Held | None:
    """What a process holds of NVIDIA's devices; None for nothing, or when it is gone."""
    descriptors = tuple(one for one in _descriptors(pid, proc) if _counts(pid, one.path, device))
    mapped = tuple(mappings(pid, proc))
    devices = tuple(one for one in mapped if device(one.path))
    if not descriptors and not devices:
        return None
    return Held(
        pid=pid,
        command=command(pid, proc),
        descriptors=descriptors,
        mappings=devices,
        library=any(_LIBRARY.search(one.path) for one in mapped),
    )


def tree(root_pid: int, proc: Path = PROC) -> list[int]:
    """`root_pid` and all its descendants, parents first."""
    found = [root_pid]
    for pid in found:
        found += [child for child in children(pid, proc) if child not in found]
    return found


def children(pid: int, proc: Path = PROC) -> list[int]:
    """Children of all threads of a process."""
    folder = proc / str(pid) / "task"
    return [int(word) for task in tasks(pid, proc) for word in _text(folder / str(task) / "children").split()]


def tasks(pid: int, proc: Path = PROC) -> list[int]:
    """The threads of a process, the first one first; none when it is gone."""
    return [int(entry.name) for entry in _listed(proc / str(pid) / "task")]


def mappings(pid: int, proc: Path = PROC) -> Iterator[Region]:
    """All mappings of a process; none when it is gone."""
    for line in _text(proc / str(pid) / "maps").splitlines():
        if match := _MAPPING.match(line):
            start, end, permissions, offset, path = match.groups()
            yield Region(start=int(start, 16), end=int(end, 16), permissions=permissions, offset=int(offset, 16), path=path)


def descriptors(pid: int, proc: Path = PROC) -> list[Descriptor]:
    """All open files of a process; none when it is gone."""
    return list(_descriptors(pid, proc))


def command(pid: int, proc: Path = PROC) -> str:
    """The command line for messages, at most 80 characters; the name where it has none."""
    words = _text(proc / str(pid) / "cmdline").replace("\0", " ").strip()
    return words[:80] or _text(proc / str(pid) / "comm").strip()


def _counts(pid: int, path: str, device: Devices) -> bool:
    if path == _AMD:
        raise SmrError(
            f"process {pid} uses an AMD GPU ({_AMD} is open): SMR checkpoints NVIDIA GPUs only",
            hint="run the program on an NVIDIA GPU, or without the AMD one (--device)",
            code=Code.UNSUPPORTED,
            pid=pid,
        )
    return device(path)


def _origin(held: Held, found: Mapping[int, Held], parents: Mapping[int, int], same_file: SameFile) -> int:
    """Whom all of it was inherited from: the nearest ancestor, else another (the parent may be gone); 0 for nobody."""
    ancestors = list(_ancestors(held.pid, parents))
    for pid in [*ancestors, *(pid for pid in found if pid not in ancestors)]:
        if (other := found.get(pid)) and _inherited(held, other, same_file):
            return other.inherited_from or pid
    return 0


def _ancestors(pid: int, parents: Mapping[int, int]) -> Iterator[int]:
    while pid := parents.get(pid, 0):
        yield pid


def _inherited(child: Held, parent: Held, same_file: SameFile) -> bool:
    """A fork copies numbers and addresses; a child that opened a device by itself has an open file of its own."""
    theirs = {one.number: one.path for one in parent.descriptors}
    if any(theirs.get(one.number) != one.path for one in child.descriptors):
        return False
    if any(not _covers(parent.mappings, one) for one in child.mappings):
        return False
    return all(same_file(child.pid, parent.pid, one.number) for one in child.descriptors)


def _covers(parents: Iterable[Region], one: Region) -> bool:
    return any(other.path == one.path and other.start <= one.start and one.end <= other.end for other in parents)


def shares_memory(pid: int, other: int) -> bool:
    """Whether two processes share one address space or one table of descriptors, as after vfork(2)."""
    return any(_kcmp(pid, other, kind, 0) == 0 for kind in (_KCMP_VM, _KCMP_FILES))


def _same_file(pid: int, other: int, number: int) -> bool:
    """Where the kernel has no kcmp(2), or forbids it, the equal number and path decide: True."""
    return _kcmp(pid, other, _KCMP_FILE, number) in (0, -1)


def _kcmp(pid: int, other: int, kind: int, number: int) -> int:
    """kcmp(2): 0 for the same object, -1 when it cannot be told."""
    if (call := _KCMP.get(platform.machine())) is None:
        return -1
    return _libc_syscall()(call, pid, other, kind, number, number)


@functools.cache
def _libc_syscall() -> Callable[[int, int, int, int, int, int], int]:
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.argtypes = (ctypes.c_long,) * 6
    syscall.restype = ctypes.c_long
    return syscall


def _sorted(pids: tuple[int, ...], found: Iterable[Held]) -> Found:
    """With a device open by itself a process is taken for one with CUDA, until the driver says otherwise."""
    every = tuple(found)
    return Found(
        tree=pids,
        cuda=tuple(one for one in every if not one.inherited_from and one.descriptors),
        forked=tuple(one for one in every if one.inherited_from or not one.descriptors),
    )


def _descriptors(pid: int, proc: Path) -> Iterator[Descriptor]:
    for entry in _listed(proc / str(pid) / "fd"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            yield Descriptor(number=int(entry.name), path=str(entry.readlink()))


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir(), key=lambda entry: (len(entry.name), entry.name))
    except (FileNotFoundError, ProcessLookupError, NotADirectoryError):
        return []
    except PermissionError as error:
        raise SmrError(f"cannot read {folder}: {error.strerror}: needed root", code=Code.PERMISSION) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
