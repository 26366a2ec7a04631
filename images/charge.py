"""Whose memory the page cache is: it is charged to the cgroup of who reads, so who reads for the node leaves its starter's.

Where our programs are started: podman's precreate hook in podman's own cgroup (a user's session); the containerd shim in
containerd's; the runtime, so a restore's prefetch, in conmon's or the shim's, which CRI-O puts into the pod's cgroup beside the
container, with the pod's memory limit. A pod must not pay for what all restores of an image share, nor reclaim it when it is
short, nor take it away when it ends; and a service that is stopped must not end a pin.

So such a program moves itself to the root of the hierarchy, which has no limit and needs no cgroup made and removed. In a cgroup
namespace whose root is a limited cgroup in truth (a node in a container) the kernel allows no processes there: then a cgroup
`smr` is made there, once, and kept.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

NAME = "smr"
# Memory is what this is for; blkio because reads are throttled by it; systemd because it ends what is in a unit's cgroup.
_HIERARCHIES = ("memory", "blkio", "name=systemd")


def leave_cgroup(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup"), *, whole: bool = False) -> None:
    """Move this process, all its threads, out of the cgroups it was started in. Where that is not allowed, it stays.

    `whole`: out of v1's others too, one of which tells a runtime whom to kill when a container ends.
    """
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            wanted = whole or not controllers or any(name in controllers.split(",") for name in _HIERARCHIES)
            if wanted and path not in {"/", f"/{NAME}"}:
                with suppress(OSError):
                    _enter(_hierarchy(cgroups, controllers))


def _hierarchy(cgroups: Path, controllers: str) -> Path:
    """Where it is mounted: v1's by its controllers, v2's alone or, in a hybrid, beside them."""
    if controllers:
        return cgroups / controllers.removeprefix("name=")
    return cgroups / "unified" if (cgroups / "unified").is_dir() else cgroups


def _enter(root: Path) -> None:
    try:
        _join(root)
    except OSError as error:
        if error.errno not in {errno.EBUSY, errno.EOPNOTSUPP, errno.EINVAL}:
            raise
        (root / NAME).mkdir(exist_ok=True)
        _join(root / NAME)


def _join(cgroup: Path) -> None:
    """Not by a buffered file, which would report the kernel's refusal at its closing."""
    fd = os.open(cgroup / "cgroup.procs", os.O_WRONLY)
    try:
        os.write(fd, b"0")
    finally:
        os.close(fd)
