"""inotify on one directory, for an event loop: it sleeps until the kernel says that a file there was written.

The standard library has no inotify; these are its calls (inotify(7)). The directory may be removed and made again by others: then
the watch moves on to the new one.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from collections.abc import Callable
from pathlib import Path

from smr.proto.errors import Code, SmrError

_MODIFY, _MOVED_TO, _DELETE_SELF, _MOVE_SELF, _IGNORED = 0x2, 0x80, 0x400, 0x800, 0x8000
_EVENT = struct.Struct("iIII")


class Watch:
    """Calls `changed` in the event loop after files in `folder` were written. `close` ends it."""

    def __init__(self, folder: Path, changed: Callable[[], object]) -> None:
        self._folder, self._changed = folder, changed
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise self._error("cannot watch files")
        try:
            self._add()
        except BaseException:
            os.close(self._fd)
            raise
        asyncio.get_running_loop().add_reader(self._fd, self._read)

    def close(self) -> None:
        """No more calls."""
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)

    def _add(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mask = _MODIFY | _MOVED_TO | _DELETE_SELF | _MOVE_SELF
        if self._libc.inotify_add_watch(self._fd, os.fsencode(self._folder), ctypes.c_uint32(mask)) < 0:
            raise self._error(f"cannot watch {self._folder}")

    def _read(self) -> None:
        try:
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return
        masks, at = 0, 0
        while at < len(data):
            _, mask, _, length = _EVENT.unpack_from(data, at)
            masks, at = masks | mask, at + _EVENT.size + length
        if masks & (_DELETE_SELF | _MOVE_SELF | _IGNORED):
            self._add()
        self._changed()

    def _error(self, what: str) -> SmrError:
        number = ctypes.get_errno()
        return SmrError(f"{what}: {os.strerror(number)}", hint="see fs.inotify in sysctl(8)", code=Code.INTERNAL)
