"""Rights that a new container's spec has less of than the checkpoint's: taken away in CRIU's images, before a process is made.

What the old spec gave and the new one does not leaves all five sets of every thread, and no_new_privs is set where the new spec
asks for it. So a restored container has no right that its own spec does not give. More than the checkpoint had is not given: no
program expects its capabilities to grow, and a warning says so. Where nothing differs, no image is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from smr.proto.oci import Spec, as_list, as_object

# capability.h, by number
_CAPABILITIES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST "
    "NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE "
    "SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM "
    "BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
)
_NAMES = _CAPABILITIES.split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rights:
    """Of a spec: names of the bounding set without CAP_, and whether a process may gain rights by exec."""

    bounding: frozenset[str]
    no_new_privs: bool


def rights_of(spec: Spec) -> Rights:
    """What the spec gives."""
    process = as_object(spec.document.get("process"), "process")
    capabilities = as_object(process.get("capabilities"), "process.capabilities")
    names = (str(name).removeprefix("CAP_") for name in as_list(capabilities.get("bounding"), "process.capabilities.bounding"))
    return Rights(bounding=frozenset(names), no_new_privs=bool(process.get("noNewPrivileges", False)))


def restrict(folder: Path, old: Spec, new: Spec) -> Iterator[str]:
    """Take away in the images in `folder` what `new` does not give; yields what it gives more, in words. Raises IMAGE_CORRUPT."""
    before, now = rights_of(old), rights_of(new)
    taken = before.bounding - now.bounding
    nnp = now.no_new_privs and not before.no_new_privs
    if taken or nnp:
        from smr.images.creds import edit_creds

        edit_creds(folder, without=mask(taken), no_new_privs=nnp)
    if more := now.bounding - before.bounding:
        yield f"capabilities that the checkpoint lacks are not given to restored processes: {', '.join(sorted(more))}"
    if before.no_new_privs and not now.no_new_privs:
        yield "no_new_privs is set in restored processes, as in the checkpoint, and cannot be taken back"


def mask(names: frozenset[str]) -> int:
    """Bits of capabilities; a name that this version does not know has none."""
    numbers: Mapping[str, int] = {name: number for number, name in enumerate(_NAMES)}
    return sum(1 << numbers[name] for name in names if name in numbers)
