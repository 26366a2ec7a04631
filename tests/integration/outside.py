"""A folder of the host's for a container's /data, with a holder (holder.py) in it and a socket that hears what it says."""

from __future__ import annotations

import contextlib
import ctypes
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from tests.integration.node import REPOSITORY

# What a container runs that has one.
COMMAND = ("sh", "-c", "python3 /data/holder.py /data/log /tmp & exec python3 /app/workload.py")


class Outside:
    """One folder and its socket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o777)
        shutil.copy2(REPOSITORY / "tests/integration/holder.py", folder / "holder.py")
        self._socket: socket.socket | None = None

    def edit(self, spec: dict[str, object]) -> None:
        """/data in a spec."""
        mounts = spec["mounts"]
        assert isinstance(mounts, list)
        mounts.append({"destination": "/data", "type": "bind", "source": str(self.folder), "options": ["rbind", "rw"]})

    def begin(self, pid: int) -> None:
        """The socket that the holder of a container waits for, in the network namespace of `pid`: where CRIU sees a peer."""
        made: list[socket.socket] = []

        def make() -> None:
            with Path(f"/proc/{pid}/ns/net").open() as namespace:
                assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0
            made.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        self._socket = made[0]
        fd = self._socket.fileno()
        bind = f"import socket, os; socket.socket(fileno={fd}).bind('/data/log'); os.chmod('/data/log', 0o777)"
        subprocess.run(["nsenter", f"--target={pid}", "--mount", "python3", "-c", bind], check=True, pass_fds=[fd])
        self.hear()

    def hear(self, until: Callable[[dict[str, object]], object] = lambda _: True) -> dict[str, object]:
        """What the holder says next, or the first of that which is `until`."""
        assert self._socket is not None
        self._socket.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(1 << 16)  # what was said before
        self._socket.settimeout(20)
        while not until(said := json.loads(self._socket.recv(1 << 16))):
            pass
        return said

    def close(self) -> None:
        """Nothing is left."""
        if self._socket is not None:
            self._socket.close()
        shutil.rmtree(self.folder)
