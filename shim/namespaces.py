"""What a restored tree must have of its new container rather than of the checkpoint, set before it runs: hostname and `lo`."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec
from smr.shim import network

_CLONE_NEWUTS = 0x04000000


def adopt(pid: int, spec: Spec) -> None:
    """Give the namespaces of `pid` the new container's hostname, and its own network namespace an interface `lo` that is up."""
    if spec.hostname and "uts" in spec.namespaces:
        set_hostname(Path(f"/proc/{pid}/ns/uts"), spec.hostname)
    if "network" in spec.namespaces:
        network.loopback_up(Path(f"/proc/{pid}/ns/net"))


def set_hostname(namespace: Path, hostname: str) -> None:
    """Set the hostname in a UTS namespace; in a thread, since setns(CLONE_NEWUTS) is per thread."""
    failure: list[int] = []

    def work() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        name = os.fsencode(hostname)
        try:
            fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            failure.append(error.errno or 0)
            return
        try:
            if libc.setns(fd, _CLONE_NEWUTS) != 0 or libc.sethostname(name, len(name)) != 0:
                failure.append(ctypes.get_errno())
        finally:
            os.close(fd)

    thread = threading.Thread(target=work, name="smr-utsns")
    thread.start()
    thread.join()
    if failure:
        raise SmrError(f"cannot set hostname {hostname}: {os.strerror(failure[0])}", code=Code.RESTORE_FAILED)
