"""What a restored tree takes of its new container's spec after CRIU has made it, and what it cannot take.

Taken: resource limits, the OOM score, sysctls of its own namespaces, the domain name. A process that had set a limit itself keeps
it: only what still has the value that the checkpoint's container gave is given the new container's. cgroup limits are the
runtime's, which sets them before CRIU begins.

Not taken, since only the process itself could: user, seccomp filter, working directory, scheduling. These are compared, and each
difference is a warning. Capabilities and no_new_privs are taken away in CRIU's images, where the new spec has less (see
`smr.shim.rights`); more is not given. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from smr.proto.oci import Spec, as_list, as_object
from smr.shim import procs

_NAMESPACES = {"net": 0x40000000, "ipc": 0x08000000, "uts": 0x04000000}
_SPEC_NAMES = {"net": "network", "ipc": "ipc", "uts": "uts"}
_SYS = Path("/proc/sys")
_UNLIMITED = (1 << 64) - 1
Limits = dict[str, tuple[int, int]]


def adopt(pid: int, old: Spec, new: Spec) -> list[str]:
    """Give the stopped tree of `pid` what it can take of `new`; returns what it cannot, or could not, in words."""
    return [*_set_limits(pid, old, new), *_set_oom_score(pid, old, new), *_set_sysctls(pid, new), *differences(old, new)]


def differences(old: Spec, new: Spec) -> Iterator[str]:
    """What a restored process keeps of the checkpoint although its new container's spec says something else."""
    before, now = _process(old), _process(new)
    for key, what in (
        ("user", "user"),
        ("cwd", "working directory"),
        ("scheduler", "scheduling"),
        ("ioPriority", "I/O priority"),
    ):
        if _differ(before.get(key), now.get(key)):
            yield f"{what} is the checkpoint's ({_shown(before.get(key))}), not this container's ({_shown(now.get(key))})"
    if _differ(_linux(old).get("seccomp"), _linux(new).get("seccomp")):
        had, has = ("none" if _linux(spec).get("seccomp") is None else "a filter" for spec in (old, new))
        other = " of other contents" if had == has else ""
        yield f"seccomp filters are the checkpoint's ({had}), not this container's ({has}{other})"
    if _linux(new).get("timeOffsets") and _differ(_linux(old).get("timeOffsets"), _linux(new).get("timeOffsets")):
        yield "clocks go on from the checkpoint's, not from the timeOffsets of this container"
    if _linux(new).get("personality") and _linux(old).get("personality") != _linux(new).get("personality"):
        yield "the personality is the checkpoint's, not this container's"


def limits(spec: Spec) -> Limits:
    """`process.rlimits`: name without RLIMIT_ to (soft, hard)."""
    found: Limits = {}
    for entry in as_list(_process(spec).get("rlimits"), "process.rlimits"):
        fields = as_object(entry, "process.rlimits[]")
        soft, hard = (int(str(fields.get(key, 0))) for key in ("soft", "hard"))
        found[str(fields.get("type", "")).removeprefix("RLIMIT_")] = (soft, hard)
    return found


def sysctls(spec: Spec) -> dict[str, str]:
    """`linux.sysctl`, names with dots or slashes as the spec has them."""
    return {key: str(value) for key, value in as_object(_linux(spec).get("sysctl"), "linux.sysctl").items()}


def _set_limits(pid: int, old: Spec, new: Spec) -> Iterator[str]:
    wanted, given = limits(new), limits(old)
    wanted = {name: pair for name, pair in wanted.items() if given.get(name) != pair}
    if not wanted:
        return
    import resource

    tree = [process.pid for process in procs.tree(pid)]
    for name, pair in wanted.items():
        number = getattr(resource, f"RLIMIT_{name}", None)
        if number is None:
            yield f"RLIMIT_{name} is not known here and stays the checkpoint's"
            continue
        try:
            base = given.get(name) or _limit(pid, number)
            for one in tree:
                _change_limit(one, number, base, pair)
        except (OSError, ValueError) as error:
            yield f"RLIMIT_{name} is the checkpoint's, not {_pair(pair)}: {_reason(error)}"


def _limit(pid: int, number: int) -> tuple[int, int]:
    """As a spec has it, where the largest number stands for no limit; in Python that is -1."""
    import resource

    soft, hard = resource.prlimit(pid, number)
    return soft & _UNLIMITED, hard & _UNLIMITED


def _change_limit(pid: int, number: int, base: tuple[int, int], wanted: tuple[int, int]) -> None:
    """What the process has changed itself stays, as far as its new hard limit goes."""
    import resource

    with contextlib.suppress(ProcessLookupError):
        now = _limit(pid, number)
        soft, hard = (new if has == old else has for has, old, new in zip(now, base, wanted, strict=True))
        value = (min(soft, hard), hard)
        if value != now:
            resource.prlimit(pid, number, tuple(-1 if one >= _UNLIMITED else one for one in value))  # type: ignore[arg-type]


def _set_oom_score(pid: int, old: Spec, new: Spec) -> Iterator[str]:
    wanted, given = _process(new).get("oomScoreAdj"), _process(old).get("oomScoreAdj")
    if not isinstance(wanted, int) or wanted == given:
        return
    try:
        base = given if isinstance(given, int) else int(_oom_score(pid).read_text())
        for process in procs.tree(pid):
            if int(_oom_score(process.pid).read_text()) == base:
                _oom_score(process.pid).write_text(str(wanted))
    except (OSError, ValueError) as error:
        yield f"oom_score_adj is the checkpoint's, not {wanted}: {_reason(error)}"


def _oom_score(pid: int) -> Path:
    return Path(f"/proc/{pid}/oom_score_adj")


def _set_sysctls(pid: int, new: Spec) -> Iterator[str]:
    """In a thread of its own, which enters the namespaces: /proc/sys shows those of who opens a file there."""
    wanted = sysctls(new)
    domain = new.document.get("domainname")
    if isinstance(domain, str) and domain:
        wanted = {"kernel.domainname": domain, **wanted}
    if not wanted:
        return
    problems: list[str] = []
    kinds: dict[str, dict[str, str]] = {}
    for key, value in wanted.items():
        kind = _kind(key)
        if kind is None or _SPEC_NAMES[kind] not in new.namespaces:
            problems.append(f"sysctl {key} was not set: it belongs to no namespace of this container's own")
        else:
            kinds.setdefault(kind, {})[key] = value
    thread = threading.Thread(target=_in_namespaces, args=(pid, kinds, problems), name="smr-sysctl")
    thread.start()
    thread.join()
    yield from problems


def _in_namespaces(pid: int, kinds: Mapping[str, Mapping[str, str]], problems: list[str]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for kind, values in kinds.items():
        try:
            fd = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            problems.append(f"sysctls of the {kind} namespace were not set: {_reason(error)}")
            continue
        try:
            if libc.setns(fd, _NAMESPACES[kind]) != 0:
                problems.append(f"sysctls of the {kind} namespace were not set: {os.strerror(ctypes.get_errno())}")
                continue
        finally:
            os.close(fd)
        for key, value in values.items():
            try:
                _path(key).write_text(value)
            except OSError as error:
                problems.append(f"sysctl {key}={value} was not set: {_reason(error)}")


def _kind(key: str) -> str | None:
    """The namespace that a sysctl belongs to, as runc's validator has them; None for one of the whole machine."""
    name = ".".join(_parts(key))
    if name.startswith("net."):
        return "net"
    if name.startswith(("fs.mqueue.", "kernel.msg", "kernel.shm")) or name == "kernel.sem":
        return "ipc"
    return "uts" if name in {"kernel.domainname", "kernel.hostname"} else None


def _parts(key: str) -> list[str]:
    """By the separator that occurs first, as sysctl(8) has it: net.ipv4.conf.eth0/1.mtu is net/ipv4/conf/eth0.1/mtu."""
    slash, dot = key.find("/"), key.find(".")
    if slash >= 0 and (dot < 0 or slash < dot):
        return key.split("/")
    return [part.replace("/", ".") for part in key.split(".")]


def _path(key: str) -> Path:
    parts = _parts(key)
    if any(part in {"", ".", ".."} for part in parts):
        raise FileNotFoundError(2, "no such sysctl")
    return _SYS.joinpath(*parts)


def _process(spec: Spec) -> Mapping[str, object]:
    return as_object(spec.document.get("process"), "process")


def _linux(spec: Spec) -> Mapping[str, object]:
    return as_object(spec.document.get("linux"), "linux")


def _differ(one: object, other: object) -> bool:
    """Whether they mean different things; a seccomp filter has thousands of names, so what is the same is not looked into."""
    return one != other and _plain(one) != _plain(other)


def _plain(value: object) -> object:
    """A value that compares as what it means: no empty members, lists of numbers and names without their order."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item not in (None, [], {}, "", False)} or None
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        return sorted(map(str, value))
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _shown(value: object) -> str:
    if isinstance(value, dict):
        plain = {key: item for key, item in value.items() if item not in (None, [], "")}
        return ", ".join(f"{key} {item}" for key, item in plain.items()) or "none"
    return str(value) if value else "none"


def _pair(value: tuple[int, int]) -> str:
    return ":".join("unlimited" if one >= _UNLIMITED else str(one) for one in value)


def _reason(error: Exception) -> str:
    """`prlimit` of a hard limit that grows, and a score that falls, need CAP_SYS_RESOURCE."""
    if isinstance(error, PermissionError) or "not allowed to raise" in str(error):
        return "SMR lacks CAP_SYS_RESOURCE"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
