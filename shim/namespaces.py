"""What a restored tree must have of its new container rather than of the checkpoint, set before it runs: hostname and `lo`."""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec
from smr.shim import network, stdio

T = TypeVar("T")

_CLONE_NEWUTS = 0x04000000


def adopt(pid: int, spec: Spec) -> None:
    """Give the namespaces of `pid` the new container's hostname, and its own network namespace an interface `lo` that is up.

    Also its terminal the size of the spec.
    """
    if spec.hostname and "uts" in spec.namespaces:
        set_hostname(Path(f"/proc/{pid}/ns/uts"), spec.hostname)
    if "network" in spec.namespaces:
        network.loopback_up(Path(f"/proc/{pid}/ns/net"))
    stdio.size_terminal(pid, spec)


def hostname_of(namespace: Path) -> str:
    """The hostname in a UTS namespace."""
    return _inside(namespace, lambda: os.uname().nodename, "read the hostname")


def set_hostname(namespace: Path, hostname: str) -> None:
    """Set the hostname in a UTS namespace."""
    _inside(namespace, lambda: socket.sethostname(hostname), f"set hostname {hostname}")


def _inside(namespace: Path, work: Callable[[], T], what: str) -> T:
    """Do `work` in a UTS namespace, in a thread: setns(CLONE_NEWUTS) is a thread's own. Raises RESTORE_FAILED."""
    done: list[T] = []
    failed: list[OSError] = []

    def body() -> None:
        try:
            fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWUTS) != 0:
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number))
                done.append(work())
            finally:
                os.close(fd)
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=body, name="smr-utsns")
    thread.start()
    thread.join()
    if failed:
        raise SmrError(f"cannot {what}: {failed[0].strerror}", code=Code.RESTORE_FAILED)
    return done[0]
