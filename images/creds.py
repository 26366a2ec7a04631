"""Who the threads of a dump are, edited: capabilities, no_new_privs, labels of a security module. They stand in core-TID.img.

Sets of capabilities are two words of 32 bits, the lower first (criu/cr-dump.c, dump_thread_core; criu/cr-restore.c).
"""

from __future__ import annotations

from pathlib import Path

from smr.images.criu_files import read_image_file, read_message, write_messages
from smr.proto.criu import identity_pb2

_SETS = ("cap_inh", "cap_prm", "cap_eff", "cap_bnd", "cap_amb")


def edit_creds(folder: Path, *, without: int = 0, no_new_privs: bool = False, unlabelled: bool = False) -> int:
    """Edit every thread's credentials in `folder`; number of threads that changed. Raises IMAGE_CORRUPT.

    `without`: bits of capabilities that no set has any longer. `unlabelled`: no label of AppArmor or SELinux.
    """
    changed = 0
    for path in sorted(folder.glob("core-*.img")):
        core = read_message(path, identity_pb2.CoreEntry)
        if not core.thread_core.HasField("creds"):
            continue
        before = core.SerializeToString()
        _edit(core.thread_core.creds, without, no_new_privs, unlabelled)
        if core.SerializeToString() != before:
            write_messages(path, read_image_file(path)[:8], [core])
            changed += 1
    return changed


def _edit(creds: identity_pb2.CredsEntry, without: int, no_new_privs: bool, unlabelled: bool) -> None:
    for name in _SETS:
        words = getattr(creds, name)
        for index, word in enumerate(words):
            words[index] = word & ~(without >> (32 * index)) & 0xFFFFFFFF
    if no_new_privs:
        creds.no_new_privs = 1
    if unlabelled:
        for name in ("lsm_profile", "lsm_sockcreate", "apparmor_data"):
            creds.ClearField(name)
