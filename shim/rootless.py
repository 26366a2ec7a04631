"""Whether we have the node's root: without it CRIU can neither dump nor restore a container, and what it tries may harm it.

Tried with CRIU 4.2 and rootless podman 4.3: in podman's user namespace, and as the user with CAP_CHECKPOINT_RESTORE and
--unprivileged, a dump ends with "suspending seccomp failed: Operation not permitted"; without a seccomp filter, with "Can't setns
net" and "Can't restore ns back: Operation not permitted". So it is refused before CRIU is asked. Standard library only.
"""

from __future__ import annotations

import os
from pathlib import Path

from smr.proto.errors import Code, SmrError

_ALL = ["0", "0", "4294967295"]
_HINT = "use the engine as root; a container of root's may have a user namespace all the same (podman --userns=auto, --uidmap)"


def check(uid_map: Path = Path("/proc/self/uid_map")) -> None:
    """Raise PERMISSION unless this process is root, and that root is the node's."""
    reason = obstacle(uid_map)
    if reason:
        raise SmrError(f"rootless containers are neither checkpointed nor restored: {reason}", hint=_HINT, code=Code.PERMISSION)


def obstacle(uid_map: Path = Path("/proc/self/uid_map")) -> str:
    """Why CRIU would not work for us; "" when it would."""
    if os.geteuid() != 0:
        return f"CRIU needs root, this is uid {os.geteuid()}"
    words = uid_map.read_text().split()
    if words != _ALL:
        node = words[1] if words[:1] == ["0"] else "nobody"
        return f"CRIU needs the node's root, and root of this user namespace is the node's uid {node}"
    return ""
