"""Dumps whose pages SMR takes itself, from the frozen processes: CRIU's part of it, and whether it can be had here.

With --lazy-pages CRIU writes everything but the pages of memory that can be lazy, and then serves those to one client. It is
given a socket (--ps-socket) that says at once that nobody will ask: nothing listens anywhere, and CRIU ends by itself, also when
SMR is killed meanwhile. The tree is frozen before and after (CRIU thaws the cgroup for its parasite and freezes it again before
it lets go of the tasks), so its memory does not change until it is thawed, and is read in that time: `smr.images.livesplit`.

Until it ends, CRIU holds all those pages in pipes. A pipe takes 4 MiB, or fs.pipe-max-size (1 MiB) without CAP_SYS_RESOURCE, and
two descriptors. Where they would be too many, and wherever a lazy dump fails, CRIU dumps the pages itself, in one thread.

So it does, too, with a thread whose stack pointer is at the start of a page: CRIU (criu/mem.c, is_stack, up to 4.3) means to
keep the page that a stack pointer is in, compares only the offsets within pages, and then leaves out none of that process.
Stacks begin at random multiples of 16 bytes: one process of 256.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from smr.images.livesplit import LiveSplit, Taken
from smr.images.pagecache import available_bytes
from smr.images.staging import dirty_room
from smr.proto.errors import Code, SmrError
from smr.shim import cgroups, procs
from smr.shim.criu import Criu
from smr.shim.dump import dump
from smr.shim.engines.target import Target
from smr.shim.guard import Guard
from smr.shim.procs import PROC, Process

# Below this CRIU is as fast alone.
_WORTH_BYTES = 48 << 20
# runc, Go and CRIU open files at low numbers, and give some of those to what they start.
_SOCKET_FROM = 200
_PIPE_BYTES = 4 << 20
# What CRIU opens besides those of the processes: images, service descriptors, what it asks of /proc.
_OTHER_FILES = 1024
_REFREEZE_S = 2.0
# What forked processes share is compared and copied while all wait: 13 s for 7 GB of 16 compile workers, on as many cores.
_MOST_COMMON_BYTES = 1 << 30
# Memory that segments must leave to others when they wait there.
_LEFT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """Who has the pages of a dump: SMR, as `taken`; or else CRIU's files, and `why` is a warning or ""."""

    taken: Taken | None = None
    why: str = ""


def dump_pages(
    target: Target,
    folder: Path,
    work: Path,
    chosen: Mapping[str, str],
    tool: Criu,
    guard: Guard,
    logs: Path,
    *,
    out: Path,
    compress: bool,
    stage: Callable[[str], AbstractContextManager[None]],
) -> Pages:
    """Dump the frozen `target` into `folder`, and its pages into segments in `out`: with `compress`, into CRIU's files.

    The container stays frozen. `stage` is entered for "dump", CRIU's part, and for "pages", what is left to do after it.
    Raises CHECKPOINT_FAILED quoting CRIU's log, DISK_FULL.
    """
    tree = procs.tree(target.pid)
    need = _anonymous_bytes(tree)
    why = _obstacle(target, tree, need) if need >= _WORTH_BYTES else ""
    if need >= _WORTH_BYTES and not why:
        try:
            pids, staged = {process.ns_pid: process.pid for process in tree}, _wait_in_memory(need)
            with LiveSplit(out, pids, staged=staged) as pages, server_socket() as server:
                if not compress:
                    pages.begin()
                with stage("dump"):
                    dump(target, folder, work, chosen, tool, guard, logs, server=server)
                with stage("pages"):
                    _check_frozen(target)
                    taken = pages.complete(folder) if compress else pages.finish(folder)
                    _check_frozen(target)
            return Pages(taken=taken, why="" if taken is not None else "the dump is not lazy, whatever it was told")
        except SmrError as error:
            if error.code is not Code.CHECKPOINT_FAILED:
                raise
            why = error.message
        except OSError as error:
            why = str(error)  # as when memory runs out
        for used in (folder, out, work):
            _empty(used)
    with stage("dump"):
        dump(target, folder, work, chosen, tool, guard, logs)
    return Pages(why=f"CRIU dumped the pages itself, in one thread: {why}" if why else "")


@contextlib.contextmanager
def server_socket() -> Iterator[int]:
    """A socket for CRIU to serve pages on; it finds its end as soon as it reads there."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.shutdown(socket.SHUT_WR)
        fd = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD_CLOEXEC, _SOCKET_FROM)
        try:
            yield fd
        finally:
            os.close(fd)


def raise_file_limit() -> int:
    """As many open files as this process may ever have, for what it starts; returns how many CRIU may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if not procs.has_capability(procs.CAP_SYS_RESOURCE):
        return hard
    return max(hard, int((PROC / "sys/fs/nr_open").read_text()))  # CRIU raises it


def is_frozen(pid: int) -> bool:
    """Whether a process's cgroup is seen to be frozen, v1's or v2's."""
    with contextlib.suppress(OSError):
        for line in (PROC / str(pid) / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "freezer" in controllers.split(","):
                found = _read(cgroups.ROOT / "freezer" / path.strip("/") / "freezer.state") == "FROZEN"
            elif not controllers:
                events = [_read(root / path.strip("/") / "cgroup.events") for root in (cgroups.ROOT, cgroups.ROOT / "unified")]
                found = any("frozen 1" in text.splitlines() for text in events)
            else:
                continue
            if found:
                return True
    return False


def _obstacle(target: Target, tree: Sequence[Process], need_bytes: int) -> str:
    """Why a lazy dump is not tried; "" when nothing speaks against it."""
    if len({process.ns_pid for process in tree}) != len(tree):
        return "processes of other pid namespaces are among those of the container"
    common = _common_bytes(tree)
    if common > _MOST_COMMON_BYTES:
        return f"forked processes have about {common >> 20} MiB in common with their parents, which stays CRIU's anyway"
    if not is_frozen(target.pid):
        return "it is not to be seen that the container is frozen"
    for process in tree:
        if _anonymous_bytes([process]) >= _WORTH_BYTES and (thread := procs.thread_at_page_start(process.pid)):
            return (
                f"the stack pointer of thread {thread} is at the start of a page, and CRIU then leaves out nothing of its process"
            )
    needed, limit = _files_needed(need_bytes, tree), raise_file_limit()
    if needed > limit:
        return (
            f"a lazy dump of {need_bytes >> 20} MiB opens {needed} files, {limit} are allowed:"
            " raise RLIMIT_NOFILE, or fs.pipe-max-size to 4194304"
        )
    return ""


def _files_needed(memory_bytes: int, tree: Sequence[Process]) -> int:
    """Open files of a lazy dump: criu/page-pipe.c, where a pipe is doubled until it cannot be."""
    pipe_bytes = _PIPE_BYTES
    if not procs.has_capability(procs.CAP_SYS_RESOURCE):
        pipe_bytes = min(pipe_bytes, int((PROC / "sys/fs/pipe-max-size").read_text()))
    theirs = 0
    for process in tree:
        with contextlib.suppress(OSError):
            theirs += sum(1 for _ in (PROC / str(process.pid) / "fd").iterdir())
    return 2 * (memory_bytes // pipe_bytes + 2 * len(tree)) + theirs + _OTHER_FILES


def _anonymous_bytes(tree: Sequence[Process]) -> int:
    """Memory of the tree that can be lazy, in memory and swapped out, as the kernel counts it."""
    total = 0
    for process in tree:
        lines = _read(PROC / str(process.pid) / "status").splitlines()
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "VmSwap:")))
    return total


def _common_bytes(tree: Sequence[Process]) -> int:
    """A guess of what processes have in common with a parent that they were forked from: most of their memory, or nothing."""
    known = {process.pid: _anonymous_bytes([process]) for process in tree}
    common = 0
    for process in tree:
        parent = procs.parent(process.pid)
        if known.get(parent) and known[process.pid]:
            ours, theirs = _mapped(process.pid), _mapped(parent)
            if 2 * len(ours & theirs) > len(ours):
                common += min(known[process.pid], known[parent])
    return common


def _mapped(pid: int) -> set[str]:
    """Where a process has private anonymous memory: addresses that are equal by chance are few."""
    return {
        line.split()[0] for line in _read(PROC / str(pid) / "maps").splitlines() if len(line.split()) == 5 and " rw-p " in line
    }


def _wait_in_memory(need_bytes: int) -> bool:
    """Whether the segments would be slowed down to the disk, and there is memory for them."""
    if need_bytes <= dirty_room(_read(PROC / "vmstat")):
        return False
    available = available_bytes()
    return available - need_bytes > max(_LEFT_BYTES, available // 10)


def _check_frozen(target: Target) -> None:
    """On v2 tasks that CRIU has let go of are frozen a moment later, before they run anything of their own."""
    give_up = time.monotonic() + _REFREEZE_S
    while not is_frozen(target.pid):
        if time.monotonic() > give_up:
            raise SmrError(
                f"container {target.name or target.id} did not stay frozen while its memory was read",
                hint="checkpoint again",
                code=Code.CHECKPOINT_FAILED,
                container=target.id,
            )
        time.sleep(0.001)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir() if folder.exists() else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
