"""The GPU's side of a restore: what is there is compared while the rest goes on, and GPU memory is brought back before `start`.

The tree that CRIU made is stopped, its GPU memory is in its own. Only one thread of each CUDA process runs, at the driver's
call, and nothing of the container's own does (smr.shim.gpu.onethread). So whatever fails here can be taken back, and the
container started cold. Devices are the new container's: nodes in its /dev come from its spec, never from the image.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping

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


class Revival:
    """One restore's. `check` before a process is made, `run` when all its pages are there."""

    def __init__(
        self,
        image: CheckpointConfig,
        state: GpuState,
        spec: Spec,
        annotations: Annotations,
        config: Config,
        session: Session,
    ) -> None:
        self._image, self._state, self._spec = image, state, spec
        self._config, self._session = config, session
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

    def run(self, root_pid: int) -> Mapping[str, str]:
        """Give the stopped tree its GPUs; returns which took the place of which. Raises GPU_FAILED, GPU_MEMORY or TIMEOUT."""
        from smr.shim.gpu import device_mounts, device_nodes

        device_mounts.check_restored(root_pid, self._image, self._spec)
        device_nodes.fix_devices(root_pid, parse_spec(self._image.spec), self._spec)
        pids = self._pids(root_pid)
        timeout_s = call_timeout_s(self._state, self._config)
        pairs = [GpuPair(old=old, new=new) for old, new in remap.needed(self._pairs)]
        self._session.restore(pids, timeout_s, pairs, stopped=True)
        self._session.unlock(pids, lock_timeout_s(self._config), stopped=True)
        return dict(self._pairs)

    def _pids(self, root_pid: int) -> list[int]:
        host = {process.ns_pid: process.pid for process in procs.tree(root_pid)}
        missing = [task.pid for task in self._state.tasks if task.pid not in host]
        if missing:
            raise SmrError(f"the restored tree has no process {missing[0]}, which had CUDA", code=Code.RESTORE_FAILED)
        return [host[task.pid] for task in self._state.tasks]


@contextlib.contextmanager
def begin(image: CheckpointConfig, spec: Spec, annotations: Annotations, config: Config) -> Iterator[Revival | None]:
    """Begin as early as the image is known: CUDA and NVML take their time. None for an image without CUDA."""
    if image.gpu is None or not image.gpu.tasks:
        yield None
        return
    with open_session(config) as session:
        yield Revival(image, image.gpu, spec, annotations, config, session)
