"""What the driver, or CRIU after it, cannot checkpoint: found in /proc, before anything is locked or paused.

Each kind is a line of `SIGNS`: where it shows in /proc, the pattern, whether that is certain, and what a user can do. Certain
means that the sign cannot be there without the obstacle (an open file of the kind). The others are what such programs leave
behind, and may be there without it; they refuse too, since a process that the driver cannot bring back is lost, and say so.

Seen with driver 580 (dev/gpu-signs): managed memory makes the checkpoint fail, and unlocking brings the process back. A process
that has opened another one's CUDA IPC handle, and NCCL ranks over peer-to-peer or shared memory, are checkpointed and cannot be
restored: they are lost. NCCL over sockets, of one rank, within one process, or destroyed before survives; so do exported handles
that nobody has opened, mapped or cudaMallocAsync memory and pinned shared memory.

NCCL shows the same in /proc whatever its transport is. So it is judged by all processes (`_nccl`): communicators among several
are refused unless the environment that each was started with, or its nccl.conf, turns peer-to-peer and shared memory off. What a
program sets in its own environment later does not show. Nor does memory that is shared by cudaIpcOpenMemHandle alone; of
programs that do so, the custom all-reduce of vLLM and SGLang is told by the command line (`_all_reduce`).

A driver of 610 or newer checkpoints CUDA IPC among processes that were started as one job (`cuda-checkpoint --launch-job`, which
leaves CUDA_CHECKPOINT_JOB_FILE in the environment): for those the signs of IPC and NCCL do not count.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from smr.proto.errors import Code, SmrError
from smr.shim.gpu import processes
from smr.shim.gpu.processes import PROC, Found, Region

JOB_DRIVER = 610
_JOB_FILE = "CUDA_CHECKPOINT_JOB_FILE"
# libcuda keeps its own pools of /dev/nvidia-uvm (semaphores, 2 MiB a GPU) in a window that begins at 0x2_0000_0000; what
# programs allocate as managed memory lies where mmap puts it. The offset in the file is the address in both (uvm_mmap).
MANAGED_FROM = 1 << 36
_MPS_FOLDER = "/tmp/nvidia-mps"  # the driver's own default
_EVENTS = re.compile(r"/dev/shm/cuda\.shm\.[0-9a-f]+\.([0-9a-f]+)\.")
_SERVER = re.compile(r"\bvllm[ /.](?:\S*/)?(?:serve|entrypoints)|\bsglang[ .](?:serve|launch_server)")
_NO_ALL_REDUCE = "--disable-custom-all-reduce"
_NCCL_SOCKET = re.compile(r"tmp/nccl-socket-(\d+)-[0-9a-f]+")
_NCCL_THREAD = re.compile(r"NCCL |pt_nccl_")
_NCCL_OFF = ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE")
_SHOWN = 5


class Where(StrEnum):
    """What a pattern is matched with: OPEN of every process of the tree, the others of those with CUDA."""

    OPEN = "open file"
    DEVICE = "device"
    MAPPED = "mapping"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """`what` reads after the process: "process 7 (python) ..."."""

    name: str
    where: Where
    pattern: re.Pattern[str]
    what: str
    remedy: str
    certain: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """One thing in the way. `found` is what /proc shows of it."""

    name: str
    pid: int
    command: str
    what: str
    found: str
    remedy: str
    certain: bool = True

    @property
    def message(self) -> str:
        """The sentence for users."""
        doubt = "" if self.certain else ", which is taken as a sign of it"
        return f"process {self.pid} ({self.command}) {self.what}: found {self.found}{doubt}"


@dataclass(slots=True)
class View:
    """What /proc shows of one process, read when it is asked for."""

    pid: int
    proc: Path
    ns_pid: int = 0
    command: str = ""
    line: str = ""
    files: list[str] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, pid: int, proc: Path) -> View:
        """Read all that the signs need."""
        return cls(
            pid=pid,
            proc=proc,
            ns_pid=_ns_pid(pid, proc),
            command=processes.command(pid, proc),
            line=_text(proc / str(pid) / "cmdline").replace("\0", " "),
            files=[one.path for one in processes.descriptors(pid, proc)],
            regions=list(processes.mappings(pid, proc)),
            environment=environment(pid, proc),
        )

    def sockets(self) -> list[str]:
        """Names of the unix sockets that it has open; abstract ones begin with "@"."""
        inodes = {path[8:-1] for path in self.files if path.startswith("socket:[")}
        rows = [line.split() for line in _text(self.proc / str(self.pid) / "net/unix").splitlines()[1:]]
        return [row[7] for row in rows if len(row) > 7 and row[6] in inodes]

    def threads(self) -> list[str]:
        """The names of its threads."""
        folder = self.proc / str(self.pid) / "task"
        with contextlib.suppress(OSError):
            return [_text(task / "comm").strip() for task in sorted(folder.iterdir())]
        return []


_NCCL_REMEDY = (
    "start it with NCCL_P2P_DISABLE=1 and NCCL_SHM_DISABLE=1 in the container's environment, or give the checkpoint a quiesce"
    " hook that destroys the communicators and a resume hook that makes them again (smr.quiesce, smr.resume)"
)
_IPC_REMEDY = "send tensors between processes through the CPU (tensor.cpu()), or end the processes that share GPU memory first"
_RDMA_REMEDY = "turn RDMA off in the container (NCCL_IB_DISABLE=1, UCX_TLS without rc and ud)"

SIGNS: tuple[Sign, ...] = (
    Sign(
        name="io_uring",
        where=Where.OPEN,
        pattern=re.compile(r"anon_inode:\[?io_uring\]?$"),
        what="uses io_uring, which CRIU cannot dump",
        remedy="start it with UV_USE_IO_URING=0 in the environment (libuv: PyTorch's TCPStore, Node.js), or forbid"
        " io_uring_setup by the container's seccomp profile",
    ),
    Sign(
        name="infiniband",
        where=Where.OPEN,
        pattern=re.compile(r"/dev/infiniband/"),
        what="has an RDMA device open, which neither CRIU nor the driver can checkpoint",
        remedy=_RDMA_REMEDY,
    ),
    Sign(
        name="infiniband-memory",
        where=Where.MAPPED,
        pattern=re.compile(r"/dev/infiniband/"),
        what="has memory of an RDMA device mapped, which neither CRIU nor the driver can checkpoint",
        remedy=_RDMA_REMEDY,
    ),
    Sign(
        name="gdrcopy",
        where=Where.OPEN,
        pattern=re.compile(r"/dev/gdrdrv"),
        what="uses GDRCopy, which maps GPU memory into the process past the driver's checkpoint",
        remedy="start it without GDRCopy (NCCL_GDRCOPY_ENABLE=0, UCX_TLS without gdr_copy)",
    ),
    Sign(
        name="gds",
        where=Where.OPEN,
        pattern=re.compile(r"/dev/nvidia-fs"),
        what="uses GPUDirect Storage (nvidia-fs)",
        remedy="start it with cuFile in compatibility mode (CUFILE_FORCE_COMPAT_MODE=true)",
    ),
    Sign(
        name="imex",
        where=Where.OPEN,
        pattern=re.compile(r"/dev/nvidia-caps-imex-channels/"),
        what="has an IMEX channel open: it shares GPU memory with other nodes",
        remedy="start it without multi-node NVLink (NCCL_MNNVL_ENABLE=0, no IMEX channel in the container)",
    ),
    Sign(
        name="graphics",
        where=Where.DEVICE,
        pattern=re.compile(r"/dev/nvidia-modeset"),
        what="uses the GPU for graphics; the driver checkpoints CUDA only",
        remedy="start it without graphics (NVIDIA_DRIVER_CAPABILITIES=compute,utility)",
    ),
    Sign(
        name="mps",
        where=Where.OPEN,
        pattern=re.compile(r"/nvidia-mps/"),
        what="is a client of NVIDIA MPS",
        remedy="start the container without MPS (no CUDA_MPS_PIPE_DIRECTORY, no /tmp/nvidia-mps in it)",
    ),
)


def check(found: Found, *, driver: str = "", proc: Path = PROC) -> None:
    """Raise SmrError GPU_UNSUPPORTED when anything is in the way; the message names the first, the context counts them.

    `found` is what `processes.find` gave, settled or not; `driver` is the driver's version, such as "580.159.04".
    """
    obstacles = look(found, driver=driver, proc=proc)
    if not obstacles:
        return
    first = obstacles[0]
    more = f"; and {len(obstacles) - 1} more: {', '.join(sorted({one.name for one in obstacles[1:]}))}" if obstacles[1:] else ""
    raise SmrError(
        f"{first.message}{more}",
        hint=first.remedy,
        code=Code.GPU_UNSUPPORTED,
        pid=first.pid,
        obstacle=first.name,
        obstacles=len(obstacles),
    )


def look(found: Found, *, driver: str = "", proc: Path = PROC) -> list[Obstacle]:
    """All that is in the way, certain ones first."""
    views = {pid: View.of(pid, proc) for pid in found.tree}
    cuda = [views[pid] for pid in found.pids]
    jobs = _major(driver) >= JOB_DRIVER
    obstacles = [one for view in views.values() for one in _debugger(view)]
    obstacles += [one for view in views.values() for one in _matches(view, cuda=view in cuda)]
    obstacles += [one for view in cuda for one in (*_managed(view), *_mps(view))]
    alone = [view for view in cuda if not (jobs and _JOB_FILE in view.environment)]
    obstacles += [one for view in alone for one in _opened_handle(view)]
    obstacles += _nccl(alone)
    obstacles += _all_reduce(alone, list(views.values()))
    obstacles += [_other(views[held.pid], held.descriptors[0].path) for held in found.others]
    return sorted(obstacles, key=lambda one: not one.certain)


def released(pids: list[int], proc: Path = PROC) -> None:
    """After the driver's checkpoint: raise GPU_UNSUPPORTED when a process still has a device that CRIU could not dump."""
    for pid in pids:
        if held := processes.holding(pid, proc):
            raise SmrError(
                f"process {pid} ({held.command}) is checkpointed, and still holds {', '.join(held.paths[:_SHOWN])}",
                hint="the driver does not free what this program uses besides CUDA (graphics, video, NVML of another library)",
                code=Code.GPU_UNSUPPORTED,
                pid=pid,
            )


def environment(pid: int, proc: Path = PROC) -> dict[str, str]:
    """The environment that a process was started with; what it changed since does not show."""
    entries = _text(proc / str(pid) / "environ").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _matches(view: View, *, cuda: bool) -> Iterator[Obstacle]:
    """The table. Of processes without CUDA only what CRIU cannot dump counts: open files."""
    devices = view.files + [region.path for region in view.regions]
    places: Mapping[Where, list[str]] = {
        Where.OPEN: view.files,
        Where.DEVICE: devices if cuda else [],
        Where.MAPPED: [region.path for region in view.regions] if cuda else [],
    }
    seen: set[str] = set()
    for sign in SIGNS:
        if sign.name not in seen and (match := next((path for path in places[sign.where] if sign.pattern.search(path)), None)):
            seen.add(sign.name)
            yield _obstacle(view, sign.name, sign.what, f"{sign.where.value} {match}", sign.remedy, certain=sign.certain)


def _debugger(view: View) -> Iterator[Obstacle]:
    for task in processes.tasks(view.pid, view.proc):
        lines = _text(view.proc / str(view.pid) / "task" / str(task) / "status").splitlines()
        tracer = next((line.split()[1] for line in lines if line.startswith("TracerPid:")), "0")
        if tracer != "0":
            found = f"TracerPid {tracer} of thread {task}"
            yield _obstacle(
                view, "debugger", "is traced by a debugger", found, f"detach it: process {tracer} (gdb, strace, py-spy)"
            )
            return


def _managed(view: View) -> Iterator[Obstacle]:
    for region in view.regions:
        if region.path == "/dev/nvidia-uvm" and region.start >= MANAGED_FROM and region.offset == region.start:
            size = (region.end - region.start) >> 20
            found = f"/dev/nvidia-uvm mapped at {region.start:x}, {size} MiB"
            remedy = "allocate with cudaMalloc instead of cudaMallocManaged (RAPIDS: no managed pool; UVM offload off)"
            yield _obstacle(view, "managed", "has managed (unified) memory", found, remedy)
            return


def _opened_handle(view: View) -> Iterator[Obstacle]:
    """The file of shared events bears the pid, in its container, of its maker; whoever opened a handle has mapped it."""
    for region in view.regions:
        if (match := _EVENTS.match(region.path)) and int(match[1], 16) != view.ns_pid:
            found = f"{region.path} of process {int(match[1], 16)} (pid in the container)"
            yield _obstacle(view, "ipc", "has GPU memory or events of another process open (CUDA IPC)", found, _IPC_REMEDY)
            return


def _mps(view: View) -> Iterator[Obstacle]:
    """libcuda connects to MPS by itself when the control daemon's pipe is there, so a live one is a client's sign."""
    folder = view.environment.get("CUDA_MPS_PIPE_DIRECTORY", _MPS_FOLDER)
    server = view.proc / str(view.pid) / "root" / folder.lstrip("/") / "control"
    if any("nvidia-mps/" in path for path in view.files) or not _exists(server):
        return
    names = _text(view.proc / str(view.pid) / "net/unix")
    if f"{folder}/" in names or "CUDA_MPS_PIPE_DIRECTORY" in view.environment:
        remedy = "start the container without MPS (no CUDA_MPS_PIPE_DIRECTORY, no /tmp/nvidia-mps in it)"
        yield _obstacle(view, "mps", "is a client of NVIDIA MPS", f"{folder}/control", remedy, certain=False)


def _nccl(views: list[View]) -> Iterator[Obstacle]:
    """Communicators that reach into another process, over a transport that the driver cannot restore."""
    ranks = _communicators(views)
    elsewhere = any(own and 0 not in own for own in ranks.values())
    if not elsewhere and not _have_common(ranks):
        return
    for view in views:
        lacking = [name for name in _NCCL_OFF if not _is_on(_nccl_setting(view, name))]
        if view.pid in ranks and lacking:
            found = f"a communicator (ranks {sorted(ranks[view.pid])}), and {' and '.join(lacking)} not set"
            what = "has NCCL communicators with other processes over peer-to-peer or shared memory, which cannot be restored"
            yield _obstacle(view, "nccl", what, found, _NCCL_REMEDY, certain=False)
            return


def _all_reduce(cuda: list[View], tree: list[View]) -> Iterator[Obstacle]:
    """vLLM's and SGLang's own all-reduce opens the other ranks' memory, whatever NCCL does, and leaves nothing in /proc."""
    ranks = _communicators(cuda)
    servers = [view for view in tree if _SERVER.search(view.line)]
    if servers and _have_common(ranks) and not any(_NO_ALL_REDUCE in view.line for view in tree):
        what = "runs on several GPUs with its custom all-reduce, whose shared GPU memory cannot be restored"
        found = f"{len(ranks)} processes with NCCL, and no {_NO_ALL_REDUCE}"
        yield _obstacle(servers[0], "all-reduce", what, found, f"start it with {_NO_ALL_REDUCE}", certain=False)


def _communicators(views: list[View]) -> dict[int, set[int]]:
    """The ranks of the processes that have NCCL, by pid."""
    return {view.pid: found for view in views if (found := _ranks(view)) is not None}


def _have_common(ranks: Mapping[int, set[int]]) -> bool:
    """Each communicator has one rank 0: processes with no other rank have communicators of their own only."""
    return len(ranks) > 1 and any(own != {0} for own in ranks.values())


def _ranks(view: View) -> set[int] | None:
    """The ranks whose proxy's socket a process has (NCCL 2.18 and newer); empty when only threads tell; None without NCCL."""
    ranks = {int(match[1]) for name in view.sockets() if (match := _NCCL_SOCKET.search(name))}
    return ranks if ranks or any(_NCCL_THREAD.match(name) for name in view.threads()) else None


def _nccl_setting(view: View, name: str) -> str:
    """A setting of NCCL's: environment, else its configuration files, as NCCL reads them."""
    if name in view.environment:
        return view.environment[name]
    home = view.environment.get("HOME", "")
    root = view.proc / str(view.pid) / "root"
    for file in (view.environment.get("NCCL_CONF_FILE") or f"{home}/.nccl.conf", "/etc/nccl.conf"):
        for line in _text(root / file.lstrip("/")).splitlines():
            key, _, value = line.partition("=")
            if key.strip() == name:
                return value.strip()
    return ""


def _is_on(value: str) -> bool:
    return value.strip() not in ("", "0")


def _other(view: View, path: str) -> Obstacle:
    what = "has an NVIDIA device open and no CUDA, so the driver does not free it and CRIU cannot dump it"
    remedy = "close it: nvmlShutdown() after asking NVML; or keep such programs (nvidia-smi, exporters) out of the container"
    return _obstacle(view, "nvml", what, path, remedy)


def _obstacle(view: View, name: str, what: str, found: str, remedy: str, *, certain: bool = True) -> Obstacle:
    return Obstacle(name=name, pid=view.pid, command=view.command, what=what, found=found, remedy=remedy, certain=certain)


def _ns_pid(pid: int, proc: Path) -> int:
    """The pid in the process's own namespace."""
    lines = _text(proc / str(pid) / "status").splitlines()
    return next((int(line.split()[-1]) for line in lines if line.startswith("NSpid:")), pid)


def _major(driver: str) -> int:
    match = re.match(r"\d+", driver)
    return int(match[0]) if match else 0


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
