"""The options of CRIU that a user may add (`smr.criu.OPTION`) and an image may ask for: which, and what values they take.

None of them runs a program, loads a library, names a path, opens a port or reaches outside of the container. An option becomes a
line of CRIU's configuration file, so no value holds white space or a line's end. Source: criu(8) and criu/config.c, 4.1 to 4.3.
Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from smr.proto.errors import Code, SmrError


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option: what it does, the pattern of its value ("" for a flag) and that in words, and when CRIU asks for it."""

    what: str
    value: str = ""
    form: str = "nothing: it is a flag"
    dump: bool = False
    restore: bool = False


OPTIONS: Mapping[str, Option] = {
    "allow-uprobes": Option(what="memory where the kernel has traced a function", dump=True, restore=True),
    "cpu-cap": Option(
        what="which CPU features must be the same", value="none|cpu|fpu|ins|all", form="none, cpu, fpu, ins or all",
        dump=True, restore=True,
    ),
    "evasive-devices": Option(what="a device file whose path is gone is opened by another path", dump=True),
    "ext-unix-sk": Option(what="datagram sockets whose peer is outside of the container", dump=True, restore=True),
    "file-locks": Option(what="locks of files", dump=True, restore=True),
    "file-validation": Option(
        what="how an open file is compared with that of the checkpoint", value="filesize|buildid", form="filesize or buildid",
        restore=True,
    ),
    "force-irmap": Option(what="paths of inotify watches are searched for, not asked of the file system", dump=True),
    "ghost-fiemap": Option(what="holes of deleted files are found by fiemap", dump=True),
    "ghost-limit": Option(
        what="the largest deleted file that is saved", value=r"[0-9]{1,12}[KMG]?", form="a size such as 4G", dump=True
    ),
    "link-remap": Option(what="open files whose name is gone, but not their last link, get a link for a while", dump=True),
    "manage-cgroups": Option(
        what="soft: cgroups that the container made inside its own come back, with their limits",
        value="soft|ignore", form="soft or ignore", dump=True, restore=True,
    ),
    "mntns-compat-mode": Option(what="mounts are made in the older of CRIU's two ways", restore=True),
    "shell-job": Option(what="a first process that leads no session", dump=True, restore=True),
    "skip-file-rwx-check": Option(what="rights of an open file may differ from the checkpoint's", restore=True),
    "skip-in-flight": Option(what="connections that are not accepted yet are dropped", dump=True),
    "tcp-close": Option(what="established TCP connections are closed", dump=True, restore=True),
    "tcp-established": Option(what="established TCP connections survive", dump=True, restore=True),
    "timeout": Option(
        what="seconds in which a container must have stopped for its dump", value=r"[0-9]{1,5}", form="a number of seconds",
        dump=True,
    ),
    "weak-sysctls": Option(what="sysctls that this kernel does not have are left out", restore=True),
}  # fmt: skip


def check_option(name: str, value: str, where: str) -> None:
    """Raise ANNOTATION_INVALID unless `value` is one that the option `name` takes; `where` is what asks for it."""
    option = OPTIONS.get(name)
    if option is None:
        raise SmrError(
            f"{where}: CRIU option '{name}' is not allowed",
            hint="allowed: " + ", ".join(sorted(OPTIONS)),
            code=Code.ANNOTATION_INVALID,
            annotation=where,
        )
    if not re.fullmatch(option.value, value):
        raise SmrError(
            f"{where}={value!r}: not a value of CRIU option '{name}'",
            hint=f"needed {option.form}",
            code=Code.ANNOTATION_INVALID,
            annotation=where,
        )
