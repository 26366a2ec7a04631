"""process_vm_readv(2) and process_vm_writev(2): bytes of another process, copied once and without the interpreter's lock.

    writev(pid, byref(local), 1, remote, len(remote), 0)     remote: (Iovec * n)(Iovec(address, size), ...)

Both return the bytes that were copied, or -1 with the reason in ctypes.get_errno().
"""

from __future__ import annotations

import ctypes


class Iovec(ctypes.Structure):
    """struct iovec: `address` in bytes, `size` in bytes."""

    _fields_ = (("address", ctypes.c_void_p), ("size", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_iovecs = ctypes.POINTER(Iovec)
readv, writev = _libc.process_vm_readv, _libc.process_vm_writev
for _call in (readv, writev):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = (ctypes.c_int, _iovecs, ctypes.c_ulong, _iovecs, ctypes.c_ulong, ctypes.c_ulong)
