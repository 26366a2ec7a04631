"""The kernel's newer calls on mounts, by number (the same on every architecture), and a thread in another mount namespace.

open_tree, move_mount and fsopen are of Linux 5.2, mount_setattr is of 5.12, MOVE_MOUNT_SET_GROUP of 5.15. Every failure is an
OSError. Descriptors that are returned are the caller's to close.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Mapping

_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000
_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _MOUNT_SETATTR = 428, 429, 430, 431, 432, 442
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_OPEN_TREE_CLONE = 1
_MOVE_BY_DESCRIPTORS, _MOVE_SET_GROUP = 0x04 | 0x40, 0x100
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CREATE = 0, 1, 6
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
PRIVATE, SLAVE, SHARED, UNBINDABLE = 1 << 18, 1 << 19, 1 << 20, 1 << 17


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def set_attributes(mount: int, *, on: int = 0, off: int = 0, propagation: int = 0, deep: bool = False) -> None:
    """mount_setattr of the mount that `mount` is an open path of; `on` and `off` are MOUNT_ATTR_*. `deep`: of those below too."""
    attributes = _MountAttr(attr_set=on, attr_clr=off, propagation=propagation)
    flags = _AT_EMPTY_PATH | (_AT_RECURSIVE if deep else 0)
    _call(_MOUNT_SETATTR, mount, b"", flags, ctypes.byref(attributes), ctypes.c_size_t(ctypes.sizeof(attributes)))


def clone(path: str, *, deep: bool, folder: int = _AT_FDCWD) -> int:
    """A mount of `path`, attached nowhere; with `deep` what is mounted below comes along. "" means `folder` itself."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (_AT_RECURSIVE if deep else 0) | (0 if path else _AT_EMPTY_PATH)
    return _call(_OPEN_TREE, folder, os.fsencode(path), flags)


def make_tmpfs(options: Mapping[str, str | None]) -> int:
    """A new tmpfs that is attached nowhere. An option without a value is a flag."""
    context = _call(_FSOPEN, b"tmpfs", _FSOPEN_CLOEXEC)
    try:
        for key, value in options.items():
            if value is None:
                _call(_FSCONFIG, context, _FSCONFIG_SET_FLAG, os.fsencode(key), None, 0)
            else:
                _call(_FSCONFIG, context, _FSCONFIG_SET_STRING, os.fsencode(key), os.fsencode(value), 0)
        _call(_FSCONFIG, context, _FSCONFIG_CREATE, None, None, 0)
        return _call(_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)


def attach(mount: int, point: int) -> None:
    """Mount an unattached mount, or move one, to the place of which `point` is an open path."""
    _call(_MOVE_MOUNT, mount, b"", point, b"", _MOVE_BY_DESCRIPTORS)


def join_group(origin: int, mount: int) -> None:
    """Make a private mount a peer, or a slave, as `origin`, a mount of the same folder, is."""
    _call(_MOVE_MOUNT, origin, b"", mount, b"", _MOVE_BY_DESCRIPTORS | _MOVE_SET_GROUP)


def in_mount_namespace(namespace: str, work: Callable[[int], None]) -> None:
    """Run `work` in a thread in another mount namespace, with its root and an open path of our /proc/thread-self.

    Raises what `work` raises.
    """
    failure: list[BaseException] = []

    def body() -> None:
        try:
            # /proc is the host's, and is not to be found by a path later.
            with opened("/proc/thread-self", os.O_PATH) as proc, opened(namespace, os.O_RDONLY) as target:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.unshare(_CLONE_FS) != 0 or libc.setns(target, _CLONE_NEWNS) != 0:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
                work(proc)
        except BaseException as error:  # noqa: BLE001  # raised again in the caller's thread
            failure.append(error)

    thread = threading.Thread(target=body, name="smr-mounts")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


@contextlib.contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    """An open file, closed at the end."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result = libc.syscall(ctypes.c_long(number), *words)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)
