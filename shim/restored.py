"""/run/smr/restored.json: what a restored container can know of its restore before any of it runs.

    {"version": 1, "image": NAME, "digest": DIGEST, "created": TIME, "restored": TIME, "container": ID, "hostname": NAME,
     "addresses": [...], "old_addresses": [...], "gpus": {OLD-UUID: NEW-UUID}, "environment": {NAME: VALUE}}

Times are RFC 3339, addresses and environment the new container's. It is written through the stopped tree's own root, into
/run/smr (0755), as a file of mode 0644 that belongs to the container's root; replaced whole by the next restore. No symbolic
link is followed: the container may have put one where the file goes. Where the root is read-only in the container and /run is no
tmpfs, it is written through the node's mount of the same root, which is not.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from smr.shim.inside import open_in_root, root_of

VERSION = 1
FOLDER, FILE = "/run/smr", "restored.json"
_TEMPORARY = ".restored.json.tmp"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY  # links: open_in_root


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What the file says. `gpus` maps the UUID of each GPU at the checkpoint to that of the one in its place."""

    image: str
    digest: str
    created: str
    container: str
    hostname: str = ""
    addresses: tuple[str, ...] = ()
    old_addresses: tuple[str, ...] = ()
    gpus: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    restored: str = field(default_factory=_now)
    version: int = VERSION

    def to_json(self) -> bytes:
        """The file's content."""
        return json.dumps(asdict(self), indent=1).encode() + b"\n"


def environment_of(document: Mapping[str, object]) -> dict[str, str]:
    """`process.env` of an OCI spec, which the restored processes do not have; the last of two with one name, as runc takes it."""
    process = document.get("process")
    entries = process.get("env") if isinstance(process, dict) else None
    pairs = (entry.partition("=") for entry in entries or () if isinstance(entry, str) and "=" in entry)
    return {name: value for name, _, value in pairs}


def write_restored(pid: int, facts: Restored, rootfs: Path | None = None) -> str | None:
    """Write the file for the container of the stopped process `pid`; None, or why it could not be written.

    `rootfs` is where the node has the container's root: a root that is read-only in the container is written there.
    """
    try:
        uid, gid = _container_root(pid, "uid_map"), _container_root(pid, "gid_map")
        with root_of(pid) as root:
            try:
                _as_user(uid, gid, lambda: _write(root, facts.to_json()))
            except OSError as error:
                if error.errno != errno.EROFS or rootfs is None or not _on_root(root):
                    raise
                _write_outside(rootfs, facts.to_json(), uid, gid)
    except OSError as error:
        reason = "a symbolic link is in the way" if error.errno == errno.ELOOP else error.strerror or str(error)
        return f"{FOLDER}/{FILE} was not written in the container: {reason}"
    return None


def _on_root(root: int) -> bool:
    """Whether the folder, or what is there of the way to it, is on the root's own file system."""
    device = os.fstat(root).st_dev
    current = os.dup(root)
    try:
        for name in FOLDER.strip("/").split("/"):
            below = open_in_root(current, name, _DIRECTORY)
            os.close(current)
            current = below
            if os.fstat(current).st_dev != device:
                return False
    except FileNotFoundError:
        pass
    finally:
        os.close(current)
    return True


def _write_outside(rootfs: Path, content: bytes, uid: int, gid: int) -> None:
    top = os.open(rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _as_user(uid, gid, lambda: _write(top, content))
    finally:
        os.close(top)


def remove_restored(root: Path) -> None:
    """Take the file back from a root whose restore is undone; where it cannot be removed, the next restore replaces it."""
    with contextlib.suppress(OSError):
        top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            folder = open_in_root(top, FOLDER, _DIRECTORY)
            try:
                os.unlink(FILE, dir_fd=folder)
            finally:
                os.close(folder)
        finally:
            os.close(top)


def _write(root: int, content: bytes) -> None:
    folder = _folder(root)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_TEMPORARY, dir_fd=folder)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(_TEMPORARY, flags, 0o644, dir_fd=folder)
        try:
            with os.fdopen(fd, "wb") as file:
                os.fchmod(fd, 0o644)
                file.write(content)
            os.rename(_TEMPORARY, FILE, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(_TEMPORARY, dir_fd=folder)
            raise
    finally:
        os.close(folder)


def _folder(root: int) -> int:
    """/run/smr, open; what is not there is made, 0755."""
    current = os.dup(root)
    try:
        for name in FOLDER.strip("/").split("/"):
            below = _step(current, name)
            os.close(current)
            current = below
    except BaseException:
        os.close(current)
        raise
    return current


def _step(folder: int, name: str) -> int:
    with contextlib.suppress(FileNotFoundError):
        return open_in_root(folder, name, _DIRECTORY)
    os.mkdir(name, 0o755, dir_fd=folder)
    made = open_in_root(folder, name, _DIRECTORY)
    os.fchmod(made, 0o755)  # whatever our umask is
    return made


def _container_root(pid: int, name: str) -> int:
    """The host's id of the container's root; ours where the container has none."""
    for line in Path(f"/proc/{pid}/{name}").read_text().splitlines():
        inside, outside, count = (int(word) for word in line.split())
        if inside <= 0 < inside + count:
            return outside - inside
    return 0


def _as_user(uid: int, gid: int, action: Callable[[], None]) -> None:
    """Run `action` with the file system ids of another user: a mount of a user namespace takes no files of ids that it lacks.

    In a thread of its own, since these ids are a thread's.
    """
    failure: list[OSError] = []

    def work() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.setfsgid(ctypes.c_uint(gid))
        libc.setfsuid(ctypes.c_uint(uid))
        try:
            action()
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="smr-restored")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
