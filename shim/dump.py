"""CRIU's side of a checkpoint: the options of a dump, and the dump itself, through the real runtime, of a frozen container."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from smr.proto.annotations import CRIU_PREFIX
from smr.proto.criu_options import OPTIONS, check_option
from smr.proto.errors import Code, SmrError
from smr.shim import criu
from smr.shim.criu import Criu
from smr.shim.engines.target import Target
from smr.shim.guard import Guard
from smr.shim.run import run

# Unlinked files up to this size travel in the image (CRIU's own limit is 1 MiB).
_GHOST_LIMIT = "1G"
# With less than this free on the store, a dump that failed failed for want of space.
_FULL_BYTES = 1 << 20
_OURS = frozenset({"tcp-close", "tcp-established", "skip-in-flight", "manage-cgroups"})
# Option of CRIU to the flag of a newer runc.
_NEWER_FLAGS = {"link-remap": "link-remap", "skip-in-flight": "tcp-skip-in-flight"}


def options() -> dict[str, str]:
    """CRIU's options of a dump, by name, "" for flags. Most are leave, which costs nothing: see smr.images.criu_needs.

    CRIU neither blocks nor saves a connection, so it need not lock the network: connections are SMR's (smr.shim.tcp).
    """
    chosen = {"ghost-limit": _GHOST_LIMIT, "file-locks": "", "ext-unix-sk": "", "link-remap": "", "evasive-devices": ""}
    return chosen | {"tcp-close": "", "network-lock": "skip", "skip-in-flight": ""}


def asked_options(annotations: Mapping[str, str]) -> dict[str, str]:
    """What the container itself asks for by `smr.criu.OPTION`, as far as it counts at a dump; TCP and cgroups are SMR's."""
    asked = {key.removeprefix(CRIU_PREFIX): value for key, value in annotations.items() if key.startswith(CRIU_PREFIX)}
    for name, value in asked.items():
        check_option(name, value, f"{CRIU_PREFIX}{name}")
    return {name: value for name, value in asked.items() if OPTIONS[name].dump and name not in _OURS}


def session_options(pid: int) -> dict[str, str]:
    """The option for a first process that leads no session, which CRIU does not dump without being told."""
    return {} if os.getsid(pid) == pid else {"shell-job": ""}


@functools.cache
def flags_of(runtime: str) -> Mapping[str, str]:
    """CRIU's options that this runtime has flags for, which then count: it says yes or no to them in every request to CRIU.

    runc 1.3 has two more than runc 1.1 (its libcontainer/criu_linux.go).
    """
    said = run([runtime, "checkpoint", "--help"], timeout_s=20, check=False).stdout
    newer = {name: flag for name, flag in _NEWER_FLAGS.items() if f"--{flag} " in said}
    return {name: name for name in criu.RUNTIME_FLAGS} | newer


def engine_options() -> dict[str, str]:
    """Options for an engine's own checkpoint verb: what it did not ask for and cannot do harm."""
    chosen = {"ghost-limit": _GHOST_LIMIT, "link-remap": ""}
    if shutil.which("iptables-restore") is None:
        chosen["network-lock"] = "nftables"  # CRIU locks by iptables when it is not told otherwise, and fails without it
    return chosen


def dump(
    target: Target,
    folder: Path,
    work: Path,
    chosen: Mapping[str, str],
    tool: Criu,
    guard: Guard,
    logs: Path,
    *,
    server: int | None = None,
) -> None:
    """Dump into `folder`, leaving the container as it was (frozen, when it was). Raises CHECKPOINT_FAILED quoting CRIU's log.

    `server`: a socket; the dump is lazy, and serves its pages there (see `smr.shim.lazydump`).
    """
    work.mkdir(mode=0o700, exist_ok=True)
    config_file = work / "criu.conf"
    by_flag = flags_of(target.runtime)
    lazy = lazy_options(server) if server is not None else {}
    criu.write_options(config_file, {name: value for name, value in {**chosen, **lazy}.items() if name not in by_flag})
    flags = [f"--{by_flag[name]}" for name in chosen if name in by_flag]
    if lazy and not _is_crun(target):
        flags.append("--lazy-pages")  # runc says yes or no in every request; crun has no such flag and says nothing
    argv = target.runtime_command(
        "checkpoint", "--leave-running", "--image-path", str(folder), "--work-path", str(work), *flags, target.id
    )
    env = {**os.environ, **tool.environment(config_file)}
    fds = guard.pass_fds if server is None else (*guard.pass_fds, server)
    status, said = _to_its_end(argv, env, fds)
    if status != 0:
        raise _failure(target, folder, criu.keep_log(work / "dump.log", logs / f"checkpoint-{target.id}.log"), said)


def _to_its_end(argv: Sequence[str], env: Mapping[str, str], fds: Sequence[int]) -> tuple[int, str]:
    """Exit status and stderr of a program that is not ended in the middle, whatever ends us: CRIU has a parasite in the tree.

    A process group of its own spares it a terminal's Ctrl-C.
    """
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    process = subprocess.Popen(
        argv, env=env, stdin=null, stdout=null, stderr=pipe, text=True, errors="replace", pass_fds=fds, process_group=0
    )
    try:
        _, said = process.communicate()
    except BaseException:
        process.communicate()
        raise
    return process.returncode, said


def lazy_options(server: int) -> dict[str, str]:
    """CRIU's options of a lazy dump that serves its pages on a socket."""
    return {"lazy-pages": "", "ps-socket": str(server)}


def _is_crun(target: Target) -> bool:
    return "crun" in Path(target.runtime).name


def _failure(target: Target, folder: Path, log: Path, stderr: str) -> SmrError:
    name = target.name or target.id
    text = f"{_read(log)}\n{stderr}"
    # The log lies on the same file system, so where that is full its last lines may be missing.
    if "No space left on device" in text or shutil.disk_usage(folder).free < _FULL_BYTES:
        return SmrError(
            f"checkpoint of {name} failed: no space left on the store's file system",
            hint="free space there: 'smr images rm', 'smr gc'; the container goes on running as before",
            code=Code.DISK_FULL,
            container=target.id,
        )
    said = criu.quote_log(log) if log.exists() else stderr.strip()[-500:]
    return SmrError(
        f"checkpoint of {name} failed: {said}", hint=hint_for(text), code=Code.CHECKPOINT_FAILED, container=target.id, log=log
    )


_HINTS = (
    ("corked dgram socket", "a process holds datagrams back (UDP_CORK): checkpoint when it has sent them"),
    (
        "Unknown socket collected",
        "a socket of this family (VSOCK, AF_ALG and others) cannot be saved: close it before the checkpoint",
    ),
    ("Dangling connection", "a process is connected to a unix socket outside of the container: have it disconnect (smr.quiesce)"),
    ("disable MPTCP", "multipath TCP cannot be checkpointed: start Go programs with GODEBUG=multipathtcp=0"),
    ("Can't get 1:16 opt", "this kernel needs CRIU 4.2 or newer to dump sockets: run install.sh"),
    ("io_uring", "io_uring cannot be checkpointed: turn it off in the application (UV_USE_IO_URING=0 for Node.js and uvloop)"),
    (
        "Can't lookup mount",
        "a file was opened outside the container's root: give it to the container as a volume; or a message queue is open",
    ),
    ("unix: Unix socket", "a socket of another network namespace, as the log driver passthrough gives: use k8s-file or journald"),
    ("Can't get rlimit", "CRIU lacks the right to read limits of another user's process (CAP_SYS_RESOURCE)"),
    (
        "trim failed: @link_remap",
        "a file is deleted and still open on a file system that goes on counting a name for it, as FUSE may",
    ),
    ("Can't handle non-regular mapping", "a process maps a device that CRIU cannot save: end it before the checkpoint"),
)


def hint_for(text: str) -> str:
    """The remedy for what CRIU's log says, where we know one."""
    return next((hint for mark, hint in _HINTS if mark in text), "the container goes on running as before")


def _read(log: Path) -> str:
    try:
        return log.read_text(errors="replace")
    except OSError:
        return ""
