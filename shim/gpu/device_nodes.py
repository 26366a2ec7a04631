"""A restored container's /dev: the image's GPU nodes replaced by those of the new container's spec, before anything runs.

CRIU restores /dev, a tmpfs, with the nodes that the checkpoint had; the device cgroup is the new container's already. Everything
is done through /proc/PID/root, step by step from a descriptor, never through a symbolic link, and never in the host's own /dev.

In a user namespace nobody may open a node of the container's own tmpfs, so runtimes bind-mount the host's there. CRIU brings
those of the image back (`device_mounts`); what changes is mounted and unmounted here, in the container's mount namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from smr.proto.errors import Code, SmrError
from smr.proto.oci import Json, Spec, as_list, as_object
from smr.shim.mountinfo import entries

_PATH = re.compile(r"/dev/(?:nvidia[\w-]*|(?:nvidia[\w-]*|dri)/[\w-][\w.-]*)")
_FOLDER = re.compile(r"nvidia[\w-]*|dri")
_DEVICES = Path("/proc/devices")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# What CRIU and the runtime take when the spec does not say.
_MODE = 0o666
# The same on x86-64 and arm64.
_OPEN_TREE, _MOVE_MOUNT = 428, 429
_AT_FDCWD, _OPEN_TREE_CLONE, _FROM_EMPTY_PATH = -100, 1, 4
_CLONE_FS, _CLONE_NEWNS, _MS_PRIVATE, _MNT_DETACH, _UMOUNT_NOFOLLOW = 0x200, 0x20000, 1 << 18, 2, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A character device at an absolute path of the container; `device` as os.makedev gives it, owner as seen by the host."""

    path: str
    device: int
    mode: int = _MODE
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Paths of nodes that were removed and made."""

    removed: tuple[str, ...] = ()
    made: tuple[str, ...] = ()


def entries_of(spec: Spec) -> list[Json]:
    """The entries of linux.devices."""
    linux = as_object(spec.document.get("linux"), "linux")
    return [as_object(entry, "linux.devices[]") for entry in as_list(linux.get("devices"), "linux.devices")]


def nodes_of(spec: Spec) -> dict[str, Node]:
    """The GPU nodes of linux.devices, by path: /dev/nvidia*, /dev/nvidia-caps/*, /dev/dri/*. SPEC_INVALID for senseless ones."""
    found = {}
    for entry in entries_of(spec):
        path = str(entry.get("path", ""))
        if _PATH.fullmatch(path) and entry.get("type") in {"c", "u"}:
            numbers = {key: _number(entry.get(key), path) for key in ("major", "minor", "fileMode", "uid", "gid")}
            found[path] = Node(
                path=path,
                device=os.makedev(numbers["major"] or 0, numbers["minor"] or 0),
                mode=_MODE if numbers["fileMode"] is None else numbers["fileMode"] & 0o777,
                uid=numbers["uid"] or 0,
                gid=numbers["gid"] or 0,
            )
    return found


def fix_devices(pid: int, old: Spec, new: Spec) -> Changes:
    """Make the GPU nodes in the root of the stopped process `pid` those of `new`; `old` is the checkpoint's spec.

    A node of the same path and number stays as it is; so does every mount of a container without a user namespace. Raises
    RESTORE_FAILED where the container's /dev is not a place to make one.
    """
    before, wanted = nodes_of(old), nodes_of(new)
    mounted = mounts_of(pid)
    if not (before or wanted) or mounted.get("/dev") == "devtmpfs":
        return Changes()
    ours = before.keys() - {mount.destination for mount in new.mounts} if "user" in new.namespaces else frozenset[str]()
    removed: list[str] = []
    made: list[str] = []
    with _dev_of(pid) as dev:
        for path, device in list(_present(dev, before)):
            if path in wanted and wanted[path].device == device:
                continue
            if path not in mounted:
                _remove(dev, path)
                removed.append(path)
            elif path in ours:
                _bind(pid, dev, path, None)
                removed.append(path)
        there = dict(_present(dev, before))
        for node in wanted.values():
            if there.get(node.path) == node.device or (node.path in mounted and node.path not in removed):
                continue
            if "user" in new.namespaces:
                _bind(pid, dev, node.path, node)
            else:
                _make(dev, node)
            made.append(node.path)
    return Changes(removed=tuple(removed), made=tuple(made))


def mounts_of(pid: int) -> dict[str, str]:
    """Mount points of a process and the type of what is mounted there last."""
    text = Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape")
    return {entry.point: entry.type for entry in entries(text)}


def majors() -> frozenset[int]:
    """Major numbers of NVIDIA's character devices on this node: nvidia, nvidia-uvm, nvidia-caps..."""
    try:
        text = _DEVICES.read_text()
    except OSError:
        return frozenset()
    lines = (line.split() for line in text.partition("Block devices")[0].splitlines())
    return frozenset(int(words[0]) for words in lines if len(words) == 2 and words[1].startswith("nvidia"))


@contextlib.contextmanager
def _dev_of(pid: int) -> Iterator[int]:
    """The container's /dev; RESTORE_FAILED when it is a link, or the host's own."""
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        dev = os.open("dev", _DIRECTORY, dir_fd=root)
    except OSError as error:
        raise _no_place("/dev", error.strerror) from error
    finally:
        os.close(root)
    try:
        ours, theirs = Path("/dev").stat(), os.fstat(dev)
        if (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino):
            raise _no_place("/dev", "it is the host's")
        yield dev
    finally:
        os.close(dev)


def _present(dev: int, before: dict[str, Node]) -> Iterator[tuple[str, int]]:
    """GPU nodes that are there, with their numbers: by name, by major number, or because the old spec has them."""
    ours = majors()
    for name in sorted(os.listdir(dev)):
        found = os.stat(name, dir_fd=dev, follow_symlinks=False)
        if stat.S_ISCHR(found.st_mode) and (name.startswith("nvidia") or os.major(found.st_rdev) in ours):
            yield f"/dev/{name}", found.st_rdev
        elif stat.S_ISDIR(found.st_mode) and _FOLDER.fullmatch(name):
            with _folder(dev, name, make=False) as folder:
                for inner in sorted(os.listdir(folder)):  # noqa: PTH208  # by descriptor
                    path, node = f"/dev/{name}/{inner}", os.stat(inner, dir_fd=folder, follow_symlinks=False)
                    if stat.S_ISCHR(node.st_mode) and (name != "dri" or path in before):
                        yield path, node.st_rdev


def _remove(dev: int, path: str) -> None:
    with _parent(dev, path, make=False) as (folder, name):
        os.unlink(name, dir_fd=folder)


def _make(dev: int, node: Node) -> None:
    try:
        with _parent(dev, node.path, make=True) as (folder, name):
            # What is in the way is the image's: a file, or a link to one. A directory is an error.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
            os.mknod(name, stat.S_IFCHR | 0o600, node.device, dir_fd=folder)
            os.chown(name, node.uid, node.gid, dir_fd=folder, follow_symlinks=False)
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                Path(f"/proc/self/fd/{fd}").chmod(node.mode)
            finally:
                os.close(fd)
    except OSError as error:
        raise _no_place(node.path, error.strerror) from error


def _bind(pid: int, dev: int, path: str, node: Node | None) -> None:
    """Mount the host's `node` at `path`, or unmount what is there and remove it when `node` is None.

    By a thread that enters the container's mount namespace, and makes the file as the owner of the container's /dev: for others
    a file system of a user namespace has no number.
    """
    failure: list[OSError | SmrError] = []

    def work() -> None:
        try:
            _bind_here(pid, dev, path, node)
        except (OSError, SmrError) as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="smr-node")
    thread.start()
    thread.join()
    if failure:
        raise _no_place(path, str(failure[0])) from failure[0]


def _bind_here(pid: int, dev: int, path: str, node: Node | None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def call(result: int) -> int:
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    with contextlib.ExitStack() as stack:
        tree = -1
        if node is not None:
            if Path(path).stat().st_rdev != node.device:
                raise OSError(f"the host's {path} is another device")
            tree = call(libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), _OPEN_TREE_CLONE | os.O_CLOEXEC))
            stack.callback(os.close, tree)
        namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, namespace)
        call(libc.unshare(_CLONE_FS))
        call(libc.setns(namespace, _CLONE_NEWNS))
        owner = os.fstat(dev)
        libc.setfsgid(owner.st_gid)
        libc.setfsuid(owner.st_uid)
        if node is None:
            call(libc.umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW))
            _remove(dev, path)
            return
        with _parent(dev, path, make=True) as (folder, name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder))
            call(libc.syscall(_MOVE_MOUNT, tree, b"", folder, os.fsencode(name), _FROM_EMPTY_PATH))
        # Else a later checkpoint finds a mount that shares with the host's.
        call(libc.mount(None, os.fsencode(path), None, _MS_PRIVATE, None))


@contextlib.contextmanager
def _parent(dev: int, path: str, *, make: bool) -> Iterator[tuple[int, str]]:
    """Descriptor of the folder of a path below /dev (one level at most), and the last name."""
    parts = PurePosixPath(path).parts[2:]
    if len(parts) == 1:
        yield dev, parts[0]
        return
    with _folder(dev, parts[0], make=make) as folder:
        yield folder, parts[1]


@contextlib.contextmanager
def _folder(dev: int, name: str, *, make: bool) -> Iterator[int]:
    if make:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=dev)
    fd = os.open(name, _DIRECTORY, dir_fd=dev)
    try:
        if os.fstat(fd).st_dev != os.fstat(dev).st_dev:
            raise _no_place(f"/dev/{name}", "something is mounted there")
        yield fd
    finally:
        os.close(fd)


def _number(value: object, path: str) -> int | None:
    if value is None or (isinstance(value, int) and 0 <= value < 1 << 32):
        return value
    raise SmrError(f"linux.devices: {path} has the number {value!r}", code=Code.SPEC_INVALID)


def _no_place(path: str, why: str | None) -> SmrError:
    return SmrError(
        f"the restored container's {path} cannot be made a GPU's node: {why}",
        hint="checkpoint a container whose /dev is its own, as engines make it",
        code=Code.RESTORE_FAILED,
    )
