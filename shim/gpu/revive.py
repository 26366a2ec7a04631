"""The GPU's side of a restore: what is there is compared while the rest goes on, and GPU memory is brought back before `start`.

The tree that CRIU made is stopped, its GPU memory is in its own. Only one thread of each CUDA process runs, at the driver's
call, and nothing of the container's own does (smr.shim.gpu.onethread). So whatever fails here can be taken back, and the
container started cold. Devices are the new container's: nodes in its /dev come from its spec, never from the image.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from smr.images.spans import Span
from smr.proto.annotations import Annotations
from smr.proto.checkpoint import CheckpointConfig, GpuState
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec, parse_spec
from smr.shim import procs
from smr.shim.config import Config
from smr.shim.gpu import remap
from smr.shim.gpu.capture import call_timeout_s, lock_timeout_s
from smr.shim.gpu.driver import GpuPair
from smr.shim.gpu.session import Session, open_session

if TYPE_CHECKING:
    from smr.shim.gpu.gate import Gate

Stage = Callable[[str], contextlib.AbstractContextManager[None]]


class Revival:
    """One restore's: `check` before a process is made, `prepare` before its pages are, `finish` in the end.

    Between the two `run` may be called by who fills the pages (smr.shim.pages.Beside). `warnings` are for the record.
    """

    def __init__(
        self,
        image: CheckpointConfig,
        state: GpuState,
        spec: Spec,
        annotations: Annotations,
        config: Config,
        session: Session,
        stage: Stage,
    ) -> None:
        self._image, self._state, self._spec = image, state, spec
        self._config, self._session, self._stage = config, session, stage
        self._pids: dict[int, int] = {}
        self._kept: Mapping[int, Sequence[Span]] = {}
        self._done = False
        self.warnings: list[str] = []
        self._pairs: remap.Pairs = ()
        self._error: SmrError | None = None
        self._comparing = threading.Thread(target=self._compare, args=(annotations.gpu_map,), name="smr-gpu", daemon=True)
        self._comparing.start()

    def _compare(self, gpu_map: str) -> None:
        from smr.shim.gpu import compare, inventory

        try:
            self._pairs = compare.compare(self._state, self._spec, gpu_map, inventory.read())
        except SmrError as error:
            self._error = error

    def check(self) -> None:
        """Raise what speaks against the restore: GPU_MISSING, GPU_DRIVER, GPU_MISMATCH, GPU_MEMORY, GPU_BUSY."""
        self._comparing.join()
        if self._error is not None:
            raise self._error

    def prepare(self, root_pid: int) -> None:
        """The stopped tree's devices are made the new container's, and its memory is looked at. Before any page is filled."""
        from smr.shim.gpu import device_mounts, device_nodes, gate

        device_mounts.check_restored(root_pid, self._image, self._spec)
        device_nodes.fix_devices(root_pid, parse_spec(self._image.spec), self._spec)
        self._pids = self._find(root_pid)
        self._kept = {
            task.pid: areas
            for task in self._state.tasks
            if (areas := [area for area in task.areas if gate.empty(self._pids[task.pid], area)])
        }

    def keeps(self, pid: int, address: int) -> bool:
        """Whether a page is the driver's to bring back to a GPU: these are filled last, while it works."""
        return any(start <= address < end for start, end in self._kept.get(pid, ()))

    def run(self, rest: Callable[[Mapping[int, Gate]], None], spans: Callable[[int], Sequence[Span]]) -> None:
        """All other pages are there: have the driver begin, and the rest filled meanwhile, in the order in which it reads them.

        `spans` are those that are filled in a process of the image. Raises as `finish`.
        """
        from smr.shim.gpu.gate import Gate

        with self._stage("gpu"), contextlib.ExitStack() as stack:
            gates = {pid: stack.enter_context(Gate(self._pids[pid], areas, spans(pid))) for pid, areas in self._kept.items()}
            with _Call(lambda: self._restore({self._pids[pid]: areas for pid, areas in self._kept.items()})) as call:
                try:
                    rest(gates)
                    stack.close()  # the last of it is in place only now
                except BaseException:
                    self._session.abort()  # what it waits for does not come any more
                    raise
                error = call.wait()
            if error is not None:
                self._once_more(error)
            self._unlock()

    def finish(self) -> Mapping[str, str]:
        """Bring the GPUs back, unless that is done; returns which took the place of which.

        Raises GPU_FAILED, GPU_MEMORY or TIMEOUT.
        """
        if not self._done:
            with self._stage("gpu"):
                self._restore({})
                self._unlock()
        return dict(self._pairs)

    def _restore(self, gates: Mapping[int, Sequence[Span]]) -> None:
        pairs = [GpuPair(old=old, new=new) for old, new in remap.needed(self._pairs)]
        timeout_s = call_timeout_s(self._state, self._config)
        self._session.restore(self._pids.values(), timeout_s, pairs, stopped=True, gates=gates)

    def _unlock(self) -> None:
        self._session.unlock(self._pids.values(), lock_timeout_s(self._config), stopped=True)
        self._done = True

    def _once_more(self, error: SmrError) -> None:
        """A driver that had the kernel read its memory found some of it closed; now all is there. Raises `error` otherwise."""
        from smr.shim.gpu.driver import CudaState

        states = self._session.states(self._pids.values())
        if error.code is not Code.GPU_FAILED or set(states.values()) != {CudaState.CHECKPOINTED}:
            raise error
        self.warnings.append(f"the driver did not begin while pages were on their way, and then did: {error.message}")
        self._restore({})

    def _find(self, root_pid: int) -> dict[int, int]:
        host = {process.ns_pid: process.pid for process in procs.tree(root_pid)}
        missing = [task.pid for task in self._state.tasks if task.pid not in host]
        if missing:
            raise SmrError(f"the restored tree has no process {missing[0]}, which had CUDA", code=Code.RESTORE_FAILED)
        return {task.pid: host[task.pid] for task in self._state.tasks}


class _Call(threading.Thread):
    """A call that goes on beside the block; it is waited for at the block's end."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(name="smr-gpu-restore", daemon=True)
        self._work = work
        self._error: SmrError | None = None

    def run(self) -> None:
        """Never raises: `wait` says what failed."""
        try:
            self._work()
        except SmrError as error:
            self._error = error
        except Exception as error:  # noqa: BLE001  # carried to the caller's thread
            self._error = SmrError(f"internal error while the driver restored: {error!r}")

    def wait(self) -> SmrError | None:
        """Until it has ended; its error."""
        self.join()
        return self._error

    def __enter__(self) -> _Call:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.join()


@contextlib.contextmanager
def begin(
    image: CheckpointConfig, spec: Spec, annotations: Annotations, config: Config, stage: Stage
) -> Iterator[Revival | None]:
    """Begin as early as the image is known: CUDA and NVML take their time. None for an image without CUDA."""
    if image.gpu is None or not image.gpu.tasks:
        yield None
        return
    with open_session(config) as session:
        yield Revival(image, image.gpu, spec, annotations, config, session, stage)
