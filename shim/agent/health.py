"""Whether a restore or a checkpoint could work on this node now: the store can be written, CRIU is there, `criu check` passes.

That check runs once for a CRIU that passes, until its file is another; one that fails is checked again when somebody asks, at
most twice a minute.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from smr.proto.errors import SmrError
from smr.shim import criu
from smr.shim.config import Config
from smr.shim.run import run

_LEAST_FREE_BYTES = 64 << 20
_AGAIN_S = 30.0


class Health:
    """Asked by /healthz and Status. Not for two threads at once."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._known = ""
        self._failure = ""
        self._failed_at = 0.0

    def problem(self) -> str:
        """What is wrong, in one line; empty when all is well."""
        return store_problem(self._config.store) or self._criu_problem()

    def _criu_problem(self) -> str:
        try:
            tool = criu.find(self._config)
            criu.check_sockets(tool)
            status = tool.path.stat()
        except SmrError as error:
            return str(error)
        except OSError as error:
            return f"CRIU: {error}"
        key = f"{tool.path}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
        if key != self._known or (self._failure and time.monotonic() - self._failed_at > _AGAIN_S):
            self._failure, self._known, self._failed_at = _check(tool.path), key, time.monotonic()
        return self._failure


def store_problem(store: Path) -> str:
    """Why nothing could be put into the store; empty when it can. One that is not made yet is judged by the folder above."""
    folder = next(parent for parent in (store, *store.parents) if parent.exists())
    if not folder.is_dir():
        return f"the store {store} cannot be used: {folder} is no directory"
    try:
        facts = os.statvfs(folder)
    except OSError as error:
        return f"the store {store} cannot be used: {error.strerror}"
    if facts.f_flag & os.ST_RDONLY or not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return f"the store {store} cannot be written"
    free_bytes = facts.f_bavail * facts.f_frsize
    if free_bytes < _LEAST_FREE_BYTES:
        return f"the store {store} has {free_bytes >> 20} MiB left: needed {_LEAST_FREE_BYTES >> 20} MiB"
    return ""


def _check(path: Path) -> str:
    try:
        result = run([path, "check"], timeout_s=60, check=False)
    except SmrError as error:
        return str(error)
    said = (result.stderr or result.stdout).strip().splitlines()
    return "" if result.returncode == 0 else f"{path} check failed: {said[-1] if said else result.returncode}"
