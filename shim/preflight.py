"""Image against container and host, before anything is touched: each check names what was found and what was needed.

`compare` is what a restore runs. Checks that need no container (`host_findings`) are shared with `smr check`.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

from smr.proto.annotations import Annotations, Check
from smr.proto.checkpoint import CheckpointConfig
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec, parse_spec
from smr.shim import clocks, mounts, userns

# A library that found one of these at its start goes on using it after a restore (glibc's ifuncs, oneDNN, OpenBLAS).
_CPU_PREFIXES = ("avx", "amx", "sse", "ssse", "fma", "f16c", "bmi", "popcnt", "movbe", "adx", "sha_ni", "vaes", "gfni", "aes")
_CPU_PREFIXES_ARM = ("sve", "sme", "asimd", "bf16", "i8mm", "atomics", "crc32", "sha", "aes", "pmull")
# Files that each engine makes for each container: never the user's, so their absence on one side has a clear cause.
ENGINE_FILES = frozenset({"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/run/.containerenv", "/run/secrets"})


def compare(config: CheckpointConfig, spec: Spec, annotations: Annotations) -> None:
    """Raise the first difference that makes a restore of `config` into a container with `spec` wrong."""
    old = parse_spec(config.spec)
    check_host(config)
    check_families(config)
    check_terminal(old, spec)
    if annotations.command is Check.CHECK:
        check_command(old, spec)
    check_namespaces(old, spec)
    userns.check(old, spec)
    clocks.check(config.clocks_s)
    mounts.check(config, spec, annotations)


def check_host(config: CheckpointConfig) -> None:
    """Architecture and CPU features."""
    machine = platform.machine()
    if config.host.architecture != machine:
        raise SmrError(
            f"checkpoint was made on {config.host.architecture}, this node is {machine}",
            hint="checkpoint again on a node of this architecture",
            code=Code.ARCH_MISMATCH,
        )
    missing = sorted(set(_relevant(config.host.cpu_flags)) - set(cpu_flags()))
    if missing:
        raise SmrError(
            f"this CPU lacks {', '.join(missing)}, which the checkpoint's process may use (made on {config.host.cpu_model})",
            hint="checkpoint on the oldest CPU of the pool",
            code=Code.CPU_MISMATCH,
        )


def check_families(config: CheckpointConfig, proc: Path = Path("/proc")) -> None:
    """Sockets of IPv6 need a kernel that has it; one where it is only turned off for interfaces (disable_ipv6) will do."""
    if config.ipv6 and not (proc / "net/if_inet6").exists():
        raise SmrError(
            "the checkpoint has sockets of IPv6, this kernel has none",
            hint="boot without ipv6.disable=1, or checkpoint a server that is told to use IPv4 (0.0.0.0 in place of ::)",
            code=Code.NETWORK_FAILED,
        )


def check_command(old: Spec, new: Spec) -> None:
    """The command must be the checkpoint's: a user who asks for another one would not get it."""
    if old.args != new.args:
        raise SmrError(
            f"command differs from the checkpoint's: found {_shown(new.args)}, needed {_shown(old.args)}",
            hint="start with the checkpoint's command, or set smr.command=force",
            code=Code.COMMAND_MISMATCH,
        )


def check_terminal(old: Spec, new: Spec) -> None:
    """A process that had a terminal needs one, and one that had none cannot be given one."""
    if old.terminal != new.terminal:
        had, has = ("a", "none") if old.terminal else ("no", "one")
        raise SmrError(
            f"checkpoint was made with {had} terminal, this container has {has}",
            hint="add -t" if old.terminal else "leave out -t",
            code=Code.TERMINAL_MISMATCH,
        )


def check_namespaces(old: Spec, new: Spec) -> None:
    """The kinds of namespaces must be the same: shared with the host, private, or one that the engine made.

    Of a network namespace only whether it is the host's: who made it is no matter (smr.shim.netns).
    """
    for kind in ("user", "network", "pid", "ipc", "uts", "mount", "cgroup"):
        before, now = _namespace(old, kind), _namespace(new, kind)
        if before != now:
            raise SmrError(
                f"{kind} namespace differs from the checkpoint's: found {now}, needed {before}",
                hint=_namespace_hint(kind, before),
                code=Code.NAMESPACE_MISMATCH,
            )


def check_source(config: CheckpointConfig, image: str, digest: str, layers: str = "") -> None:
    """The container's own image must be the checkpoint's, where both are known: files of another would be wrong under it.

    The layers decide, by their chain id. A digest does only where that is not known of both: it names an image, and what an
    engine knows a container's image by may be a name that has moved to another.
    """
    source = config.source
    if source.image_layers and layers:
        known, found, what = source.image_layers, layers, "has the layers"
    else:
        known, found, what = source.image_digest, digest, "is"
    if known and found and known != found:
        raise SmrError(
            f"container image {image} {what} {_short(found)}, the checkpoint was made from {source.image} {_short(known)}",
            hint="checkpoint again from the new image, or set smr.rootfs=force",
            code=Code.SOURCE_MISMATCH,
        )


def code_features() -> tuple[str, ...]:
    """The features of this CPU by which libraries choose their code."""
    return tuple(_relevant(cpu_flags()))


def cpu_flags() -> tuple[str, ...]:
    """CPU features of this machine as /proc/cpuinfo names them, sorted."""
    return tuple(sorted(set(_cpuinfo("flags", "Features").split())))


def cpu_model() -> str:
    """CPU model of this machine as /proc/cpuinfo names it."""
    return _cpuinfo("model name", "CPU part")


def _cpuinfo(*names: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in names:
            return value.strip()
    return ""


def _relevant(flags: tuple[str, ...]) -> Iterator[str]:
    prefixes = _CPU_PREFIXES if platform.machine() == "x86_64" else _CPU_PREFIXES_ARM
    return (flag for flag in flags if flag.startswith(prefixes))


def _namespace(spec: Spec, kind: str) -> str:
    if kind not in spec.namespaces:
        return "host"
    if kind == "network":
        return "own"
    return "engine's" if spec.namespaces[kind] else "private"


def _namespace_hint(kind: str, needed: str) -> str:
    if kind == "network":
        return {
            "host": "use --network host (podman) or --net-host (ctr)",
            "own": "leave out --network host (podman) or --net-host (ctr), or checkpoint a container of the host's network",
        }[needed]
    if kind == "user":
        return "leave out --userns and --uidmap" if needed == "host" else "add --userns=auto, or --uidmap and --gidmap (podman)"
    return f"run with the {needed} {kind} namespace"


def _shown(args: tuple[str, ...]) -> str:
    text = " ".join(args)
    return f"'{text}'" if len(text) <= 200 else f"'{text[:200]}...'"


def _short(digest: str) -> str:
    algorithm, _, value = digest.rpartition(":")
    return f"{algorithm or 'sha256'}:{value[:12]}"
