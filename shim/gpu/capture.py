"""The GPU's side of a checkpoint: what the container has of GPUs, its memory brought into its processes, and back again.

Everything that speaks against it is found before anything is locked. `take` locks all CUDA processes before it checkpoints the
first; after it no process holds a GPU, and a dump needs no plugin. `give_back` undoes that on a running container. A process
that did not come back is named. The calls are made by the session's helper, which is started early: CUDA takes 0.2 s to begin.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from smr.proto.checkpoint import CudaTask, GpuState
from smr.proto.errors import Code, SmrError
from smr.shim import procs
from smr.shim.config import Config
from smr.shim.engines.target import Target
from smr.shim.gpu import processes
from smr.shim.gpu.processes import Found
from smr.shim.gpu.session import Session, open_session

# A lock waits for work that was launched; a kernel that runs longer than this is not an inference server's.
_LOCK_S = 30.0
_CALL_S = 60.0
# What a whole GPU takes at that rate.
_GIVE_BACK_S = 600.0
# A tenth of what the slowest copy seen does, in bytes per second.
_BYTES_PER_S = 300e6


@dataclass(slots=True, kw_only=True)
class Capture:
    """One container's. `state` is for the image."""

    target: Target
    session: Session
    found: Found
    state: GpuState
    config: Config

    def look(self) -> None:
        """Raise GPU_UNSUPPORTED for what the driver cannot checkpoint, as things are now; take note of the processes."""
        from smr.shim.gpu import obstacles

        facts = self.session.ready()
        found = processes.find(self.target.pid)
        self.found = processes.settle(found, self.session.states(found.tree))
        obstacles.check(self.found, driver=facts.driver)
        self.state = _state(self.target, self.found, facts.cuda)

    def take(self) -> None:
        """Lock all, checkpoint all. Raises GPU_FAILED, with every process running again where the driver still answers."""
        from smr.shim.gpu import forked, obstacles, prefault

        self.look()
        before = {pid: prefault.areas(pid) for pid in self.found.pids}
        self.session.lock(self.found.pids, lock_timeout_s(self.config))
        expected = [sum(task.vram_bytes.values()) for task in self.state.tasks]
        self.session.checkpoint(self.found.pids, self.timeout_s, expected_bytes=dict(zip(self.found.pids, expected, strict=True)))
        made = [tuple(prefault.new_areas(pid, before[pid])) for pid in self.found.pids]
        self.state = replace(
            self.state,
            tasks=tuple(replace(task, areas=areas) for task, areas in zip(self.state.tasks, made, strict=True)),
        )
        try:
            obstacles.released(list(self.found.pids))
            forked.release(self.found.forked)
        except SmrError:
            self.give_back()
            raise

    def give_back(self) -> None:
        """Restore and unlock all that are alive. Raises GPU_FAILED."""
        self.session.release([pid for pid in self.found.pids if procs.alive(pid)], self.timeout_s)

    @property
    def timeout_s(self) -> float:
        """How long a checkpoint or a restore may take."""
        return call_timeout_s(self.state, self.config)


def lock_timeout_s(config: Config) -> float:
    """How long a lock or an unlock may take."""
    return config.gpu_timeout_s or _LOCK_S


def call_timeout_s(state: GpuState, config: Config) -> float:
    """How long a checkpoint or a restore of what these processes have may take."""
    return config.gpu_timeout_s or _CALL_S + sum(sum(task.vram_bytes.values()) for task in state.tasks) / _BYTES_PER_S


@contextlib.contextmanager
def find(target: Target, config: Config, *, quiesced: bool) -> Iterator[Capture | None]:
    """What a checkpoint of `target` has to do with GPUs; None for nothing, and then nothing of NVIDIA's is loaded.

    Where it will be quiesced first (`quiesced`), what is in the way now may be gone by then: then only `take` looks for it.
    Raises GPU_UNSUPPORTED for what the driver cannot checkpoint, GPU_DRIVER, GPU_MISSING, UNSUPPORTED for GPUs of others.
    """
    if not processes.uses_gpu(target.pid):
        yield None
        return
    if target.status == "paused":
        raise SmrError(
            f"container {target.name or target.id} is paused and has a GPU: its memory is fetched by its own processes",
            hint="unpause it first; the checkpoint pauses it for as long as is needed",
            code=Code.CONTAINER_STATE,
            container=target.id,
        )
    with open_session(config) as session:
        empty = GpuState(driver="")
        capture = Capture(target=target, session=session, found=processes.find(target.pid), state=empty, config=config)
        if not quiesced:
            capture.look()
        yield capture


def give_back(target: Target, config: Config) -> None:
    """Bring back whatever a checkpoint that was killed has locked. Raises GPU_FAILED."""
    with open_session(config) as session:
        states = session.states(process.pid for process in procs.tree(target.pid))
        session.release([pid for pid, state in states.items() if state is not None], config.gpu_timeout_s or _GIVE_BACK_S)


def _state(target: Target, found: Found, cuda: int) -> GpuState:
    """The GPUs are those that the processes have open, which the driver wants in a map, whether CUDA shows them or not."""
    from smr.shim.gpu import devices, inventory

    node = inventory.read()
    used = node.vram(found.pids)
    there = [one.gpu for one in node.gpus if one.gpu.minor in found.minors]
    seen = [one.gpu for one in devices.gpus_of(target.spec, node)]
    gpus = sorted(there, key=lambda gpu: seen.index(gpu) if gpu in seen else len(seen))
    return GpuState(
        driver=node.driver,
        cuda=cuda,
        gpus=tuple(gpus),
        tasks=tuple(CudaTask(pid=_ns_pid(pid), vram_bytes=dict(used.get(pid, {}))) for pid in found.pids),
    )


def _ns_pid(pid: int) -> int:
    process = procs.describe(pid)
    return process.ns_pid if process is not None else pid
