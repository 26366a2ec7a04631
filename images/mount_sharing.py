"""Mounts of a dump that are slaves of mounts outside of the container: made private ones in the image.

CRIU makes all external mounts of a peer group slaves of one of their new sources, which fails where those are private, or lie on
another file system than that one (restore_one_sharing in criu/mount-v2.c). What the new container's spec says of propagation is
seen to after the restore (smr.shim.extra_mounts).
"""

from __future__ import annotations

from pathlib import Path

from smr.images.criu_files import read_messages, write_messages
from smr.proto.criu import images_pb2


def make_private(folder: Path) -> int:
    """Edit the mounts of the dump in `folder`; how many were slaves. Raises IMAGE_CORRUPT."""
    files = {path: list(read_messages(path, images_pb2.MntEntry)) for path in sorted(folder.glob("mountpoints-*.img"))}
    mounts = [mount for entries in files.values() for mount in entries]
    masters = {mount.master_id for mount in mounts if mount.master_id and (mount.ext_mount or mount.ext_key)}
    masters -= {mount.shared_id for mount in mounts}
    changed = 0
    for path, entries in files.items():
        slaves = [mount for mount in entries if mount.master_id in masters]
        for mount in slaves:
            mount.ClearField("master_id")
        if slaves:
            write_messages(path, path.read_bytes()[:8], entries)
        changed += len(slaves)
    return changed
