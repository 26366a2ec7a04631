"""userfaultfd without C: its ioctls, its messages, and the two calls that a server needs to outlive kill -9.

The kernel's rules that callers build on (fs/userfaultfd.c and mm/userfaultfd.c, 5.11 to 6.18):

- A copy answers EAGAIN while the process has begun a change of its mappings (fork, mremap, munmap, madvise) whose event nobody
  has read yet; a change waits for the copy that is under way. ENOENT may come before EAGAIN.
- EEXIST: there is a page (or a swap entry, or a guard marker) already. ENOENT: no registered mapping, or the range has two.
  ESRCH: the process has ended, or has become another program by execve.
- A copy that did some pages fails with EAGAIN and says how many bytes; only one that did none gives the true reason.
- `read` gives faults before events, events in the order in which they were queued. An event leaves the queue, and the process
  that waits for it goes on, in the same call that writes the message: what is read straight into memory that outlives the reader
  cannot be lost with it, however the reader ends.

Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
from enum import IntEnum
from typing import NamedTuple

MESSAGE_BYTES = 32
# _IOWR(0xAA, 3, struct uffdio_copy) and so on: linux/userfaultfd.h.
_COPY = 0xC028AA03
_ZEROPAGE = 0xC020AA04
_WAKE = 0x8010AA02
_UNREGISTER = 0x8010AA01
_COPY_ARGUMENT = struct.Struct("<QQQQq")
_ZEROPAGE_ARGUMENT = struct.Struct("<QQQq")
_RANGE = struct.Struct("<QQ")
_MESSAGE = struct.Struct("<B7xQQQ")
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE_FILES = 0x400
_MADV_WILLNEED, _MADV_DONTNEED, _MADV_POPULATE_READ = 3, 4, 22
# All addresses of a process on x86-64 and arm64 with four levels of page tables.
_LOWEST, _HIGHEST = 1 << 16, (1 << 47) - 4096

_libc = ctypes.CDLL(None, use_errno=True)
_libc.read.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_libc.read.restype = ctypes.c_ssize_t
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
# Holds the interpreter's lock, as the calls around a fork need it.
_locked_libc = ctypes.PyDLL(None, use_errno=True)


class Event(IntEnum):
    """Kinds of messages."""

    NONE = 0
    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


class Message(NamedTuple):
    """PAGEFAULT: flags, address. FORK: descriptor. REMAP: from, to, length. REMOVE and UNMAP: start, end."""

    event: Event
    first: int
    second: int
    third: int


def parse_message(data: bytes | memoryview) -> Message:
    """One message of 32 bytes. Raises ValueError for a kind that is not known."""
    event, first, second, third = _MESSAGE.unpack(data)
    return Message(Event(event), first & 0xFFFFFFFF if event == Event.FORK else first, second, third)


def build_message(message: Message) -> bytes:
    """What `parse_message` reads."""
    return _MESSAGE.pack(*message)


def read_message(fd: int, address: int) -> bool:
    """Read one message to `address` in our memory; False when there is none. The descriptor does not block."""
    while True:
        got: int = _libc.read(fd, address, MESSAGE_BYTES)
        if got == MESSAGE_BYTES:
            return True
        code = ctypes.get_errno() if got < 0 else 0
        if code != errno.EINTR:
            break
    if code in (0, errno.EAGAIN):
        return False
    raise OSError(code, os.strerror(code))


def copy(fd: int, target: int, source: int, size_bytes: int) -> tuple[int, int]:
    """Put pages at `source` of ours to `target` of the process; returns bytes that were put, and an errno or 0."""
    argument = bytearray(_COPY_ARGUMENT.pack(target, source, size_bytes, 0, 0))
    try:
        fcntl.ioctl(fd, _COPY, argument)
    except OSError as error:
        done: int = _COPY_ARGUMENT.unpack(argument)[4]
        return max(0, done), error.errno or errno.EIO
    return size_bytes, 0


def zero(fd: int, target: int, size_bytes: int) -> tuple[int, int]:
    """The same with zeros."""
    argument = bytearray(_ZEROPAGE_ARGUMENT.pack(target, size_bytes, 0, 0))
    try:
        fcntl.ioctl(fd, _ZEROPAGE, argument)
    except OSError as error:
        done: int = _ZEROPAGE_ARGUMENT.unpack(argument)[3]
        return max(0, done), error.errno or errno.EIO
    return size_bytes, 0


def wake(fd: int, start: int = _LOWEST, size_bytes: int = _HIGHEST - _LOWEST) -> None:
    """Let threads that wait for pages there look again; who finds none asks again."""
    try:
        fcntl.ioctl(fd, _WAKE, _RANGE.pack(start, size_bytes))
    except OSError as error:
        if error.errno not in (errno.ESRCH, errno.ENOMEM):
            raise


def alive(fd: int) -> bool:
    """Whether the memory that a descriptor watches is still there. Nothing is ever registered at the lowest address.

    Unlike a copy, this answers also while the process changes its mappings.
    """
    try:
        fcntl.ioctl(fd, _UNREGISTER, _RANGE.pack(_LOWEST, mmap.PAGESIZE))
    except OSError as error:
        return error.errno != errno.ENOMEM
    return True


def populate(address: int, size_bytes: int) -> int:
    """Have pages of a mapped file at hand; returns an errno or 0: EFAULT when the file or the disk does not give them."""
    _libc.madvise(address, size_bytes, _MADV_WILLNEED)
    while _libc.madvise(address, size_bytes, _MADV_POPULATE_READ) < 0:
        code = ctypes.get_errno()
        # Kernels before 5.14 know no MADV_POPULATE_READ; the copy itself then says EFAULT.
        if code == errno.EINVAL:
            return 0
        if code not in (errno.EINTR, errno.EAGAIN):
            return code
    return 0


def forget(address: int, size_bytes: int) -> None:
    """Undo `populate`: the pages stay in the page cache and are no longer ours."""
    _libc.madvise(address, size_bytes, _MADV_DONTNEED)


def address_of(memory: mmap.mmap) -> int:
    """Where a writable mapping lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def keep_resident(memory: mmap.mmap) -> None:
    """Touch all of a mapping, and lock it where that is allowed, so that writing there never waits."""
    for at in range(0, len(memory), mmap.PAGESIZE):
        memory[at] = memory[at]
    _libc.mlock(address_of(memory), len(memory))


def fork_sharing_files() -> int:
    """os.fork(), but parent and child have one table of descriptors: what either opens or is sent, both have, and keep.

    Only from a process of one thread. Descriptors are closed by number and by whoever is in charge, never by objects going away.
    """
    number = _SYS_CLONE[os.uname().machine]
    ctypes.pythonapi.PyOS_BeforeFork()
    pid: int = _locked_libc.syscall(ctypes.c_long(number), ctypes.c_long(_CLONE_FILES | signal.SIGCHLD), 0, 0, 0, 0)
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    else:
        code = ctypes.get_errno()
        ctypes.pythonapi.PyOS_AfterFork_Parent()
        if pid < 0:
            raise OSError(code, os.strerror(code))
    return pid
