"""CRIU: which one, its version, the configuration file that carries options past runc and crun, and its log.

Options travel in a file named by CRIU_CONFIG_FILE, which CRIU reads before the RPC options of the runtime (CRIU 3.11 and
newer; criu/config.c, next_config). So the bundle's spec need not be edited. Options that runtimes always send in their RPC
request (file-locks, shell-job, ext-unix-sk, tcp-established) would be overruled there: those go by runtime flag.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from smr.proto.errors import Code, SmrError
from smr.shim.config import Config
from smr.shim.run import run

MINIMUM = (4, 1)
# Linux 6.16 and newer refuse SO_PASSCRED on inet sockets, for which CRIU before 4.2 asks: nothing with a socket can be dumped.
MINIMUM_FOR_SOCKETS = (4, 2)
# Sent by runc and crun in every request, so only their own flags have an effect.
RUNTIME_FLAGS = frozenset({"file-locks", "shell-job", "ext-unix-sk", "tcp-established"})
# A configuration file of CRIU's has no way to write these.
_UNWRITABLE = re.compile(r"[\s#\]\"]")
_HINT = "run install.sh, which provides one, or set criu in /etc/smr/smr.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Criu:
    """A CRIU that can be used: its path and version."""

    path: Path
    version: tuple[int, int, int]

    @property
    def version_text(self) -> str:
        """As CRIU prints it."""
        major, minor, patch = self.version
        return f"{major}.{minor}.{patch}" if patch else f"{major}.{minor}"

    def environment(self, config_file: Path) -> dict[str, str]:
        """What a runtime needs to find this CRIU and the options: PATH is prepended, never replaced."""
        path = os.environ.get("PATH", os.defpath)
        return {"PATH": f"{self.path.parent}:{path}", "CRIU_CONFIG_FILE": str(config_file)}


def find(config: Config) -> Criu:
    """The configured CRIU. Raises CRIU_MISSING, or CRIU_TOO_OLD below 4.1."""
    found = shutil.which(config.criu)
    if found is None:
        raise SmrError(f"CRIU not found: {config.criu}", hint=_HINT, code=Code.CRIU_MISSING, criu=config.criu)
    path = Path(found).absolute()
    if path.name != "criu":
        raise SmrError(f"the CRIU program must be named criu, found {path}", hint=_HINT, code=Code.CRIU_MISSING, criu=path)
    version = _version(path, config.run)
    if version < (*MINIMUM, 0):
        raise SmrError(
            f"CRIU {'.'.join(map(str, version))} at {path} is too old: needed 4.1 or newer",
            hint=_HINT,
            code=Code.CRIU_TOO_OLD,
            criu=path,
        )
    return Criu(path=path, version=version)


def _version(path: Path, run_dir: Path) -> tuple[int, int, int]:
    """`criu --version`, remembered in the state directory by the program's size and times: it is asked at every restore."""
    status = path.stat()
    key = f"{path}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
    cache = run_dir / "criu-version"
    try:
        known, _, text = cache.read_text().partition("\n")
    except OSError:
        known, text = "", ""
    if known != key:
        text = run([path, "--version"], timeout_s=20, code=Code.CRIU_FAILED).stdout
        _remember(cache, f"{key}\n{text}")
    match = re.search(r"Version:\s*v?(\d+)\.(\d+)(?:\.(\d+))?", text)
    if match is None:
        raise SmrError(f"{path} does not print a CRIU version: {text.strip()!r}", hint=_HINT, code=Code.CRIU_MISSING)
    major, minor, patch = match.groups(default="0")
    return int(major), int(minor), int(patch)


def _remember(cache: Path, text: str) -> None:
    import contextlib

    from smr.shim.files import write_atomic

    with contextlib.suppress(OSError):
        cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(cache, text.encode(), durable=False)


def check_sockets(tool: Criu) -> None:
    """Raise CRIU_TOO_OLD when this kernel does not let this CRIU dump a process that has an inet socket."""
    if tool.version >= (*MINIMUM_FOR_SOCKETS, 0) or kernel_answers_passcred():
        return
    raise SmrError(
        f"CRIU {tool.version_text} cannot dump inet sockets on Linux {os.uname().release}: needed 4.2 or newer",
        hint=_HINT,
        code=Code.CRIU_TOO_OLD,
        criu=tool.path,
    )


def kernel_answers_passcred() -> bool:
    """Whether an inet socket can be asked for SO_PASSCRED, as on Linux up to 6.15."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
        except OSError:
            return False
    return True


def write_options(path: Path, options: Mapping[str, str]) -> None:
    """Write a CRIU configuration file: an option a line, "" for a flag; a value of several lines gives the option for each."""
    lines = [f"{name} {line}".rstrip() + "\n" for name, value in options.items() for line in value.split("\n")]
    path.write_text("".join(lines))


def external_mounts(mapping: Mapping[str, str]) -> dict[str, str]:
    """The option that names mounts as external: mount point to name at a dump, name to source at a restore."""
    for path in (*mapping, *mapping.values()):
        if _UNWRITABLE.search(path):
            raise SmrError(
                f"the mount {path!r} cannot be named to CRIU: it has white space, '#', ']' or '\"'",
                hint="mount it elsewhere",
                code=Code.UNSUPPORTED,
            )
    lines = [f"mnt[{key}]:{value}" for key, value in mapping.items()]
    return {"external": "\n".join(lines)} if lines else {}


def quote_log(log: Path, *, before: int = 2, most: int = 12) -> str:
    """The lines around `Error` in a CRIU log, at most `most`, with the log's path; what runc prints, made short."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return f"no log at {log}"
    wanted: list[int] = []
    for number, line in enumerate(lines):
        if "Error" in line and "rlimit: Can't setup" not in line:
            wanted += [index for index in range(max(0, number - before), number + 1) if index not in wanted]
    quoted = [re.sub(r"^\(\d+\.\d+\)\s*", "", lines[index].strip()) for index in wanted[:most]]
    return f"{log}: " + (" | ".join(quoted) if quoted else "no line with 'Error'")


def keep_log(log: Path, kept: Path) -> Path:
    """Copy a CRIU log to where it outlives its folder; returns the copy, or `log` where that was not possible."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(log, kept)
    except OSError:
        return log
    return kept
