"""What is collected, a section a function. Each may raise: the others do not care. None of them changes anything.

Programs are asked with time limits; of logs the end is taken. Nothing here may return what the package's docstring rules out.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version as package_version
from pathlib import Path

from smr.proto.annotations import PREFIX
from smr.shim import cgroups, mountinfo
from smr.shim.config import Config
from smr.shim.doctor.redact import HOOKS, head
from smr.shim.run import run

_LINES = 200
_CRIU_LOGS = 4
_CRIU_LOG_BYTES = 48 << 10
_PROGRAM_S = 20.0
_PROGRAMS = ("runc", "crun", "containerd", "ctr", "podman", "conmon", "crio", "nerdctl", "kubelet", "nvidia-container-runtime")
_PACKAGES = ("smr-restore", "protobuf", "grpclib", "prometheus-client", "structlog", "zstandard", "click")
_SYSCTLS = {
    "fs": ("pipe-max-size", "nr_open", "file-max", "inotify/max_user_watches", "inotify/max_user_instances"),
    "kernel": ("pid_max", "yama/ptrace_scope", "unprivileged_userns_clone"),
    "user": ("max_user_namespaces",),
    "vm": ("overcommit_memory", "max_map_count", "unprivileged_userfaultfd", "swappiness"),
}
_MEMORY = ("MemTotal", "MemAvailable", "SwapTotal", "SwapFree", "Cached", "Mlocked", "Shmem", "HugePages_Total", "Hugepagesize")
_KERNEL_OPTIONS = re.compile(
    r"^(CONFIG_(?:CHECKPOINT_RESTORE|USERFAULTFD|NAMESPACES|\w+_NS|FHANDLE|INET_DIAG|UNIX_DIAG|MEMCG|CGROUP_FREEZER|OVERLAY_FS|PROC_PAGE_MONITOR))="
)
_OURS = (
    "/etc/containers/containers.conf.d/50-smr.conf",
    "/etc/containerd/conf.d/99-smr.toml",
    "/etc/crio/crio.conf.d/50-smr.conf",
    "/etc/smr/runtime",
)
_PROCESSES = re.compile(rb"smr\.(?:shim|images|hooks)\.[\w.]+|/smr$")


def versions(config: Config) -> object:
    """SMR, Python, kernel, distribution, engines and runtimes, the GPU's driver."""
    found: dict[str, object] = {
        "smr": _package("smr-restore"),
        "python": sys.version,
        "packages": {name: _package(name) for name in _PACKAGES},
        "kernel": " ".join(os.uname()[2:]),
        "distribution": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
        "libc": " ".join(platform.libc_ver()),
        "criu": _first_lines(config.criu),
    }
    found |= {name: _first_lines(name) for name in _PROGRAMS if shutil.which(name)}
    driver = Path("/proc/driver/nvidia/version")
    return {**found, "nvidia_driver": driver.read_text().strip() if driver.exists() else "none"}


def node(config: Config) -> object:
    """Processors, memory, rights, kernel settings, security modules, devices."""
    from smr.shim import preflight

    status = Path("/proc/self/status").read_text()
    return {
        "cpu": preflight.cpu_model(),
        "cpus": os.cpu_count(),
        "cpus_usable": len(os.sched_getaffinity(0)),
        "uptime": _read("/proc/uptime"),
        "load": _read("/proc/loadavg"),
        "memory": {
            line.split(":")[0]: line.split(":")[1].strip() for line in _lines("/proc/meminfo") if line.split(":")[0] in _MEMORY
        },
        "rights": [line for line in status.splitlines() if line.startswith(("Uid", "Cap", "Seccomp", "NoNewPrivs"))],
        "limits": _lines("/proc/self/limits"),
        "sysctls": {f"{top}/{name}": _read(f"/proc/sys/{top}/{name}") for top, names in _SYSCTLS.items() for name in names},
        "security_modules": _read("/sys/kernel/security/lsm"),
        "selinux_enforce": _read("/sys/fs/selinux/enforce"),
        "kernel_options": _kernel_options(),
        "transparent_hugepages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "gpu_devices": sorted(str(path) for path in Path("/dev").glob("nvidia*")),
        "container": _read("/run/systemd/container") or ("kubepods" if "kubepods" in _read("/proc/1/cgroup") else ""),
    }


def cgroup_mode(config: Config) -> object:
    """Whether cgroups are v1 or v2, what is mounted, where we are."""
    mounts = [line for line in _lines("/proc/self/mountinfo") if " - cgroup" in line]
    return {
        "version": cgroups.version(),
        "mounts": mounts,
        "controllers": _read("/sys/fs/cgroup/cgroup.controllers"),
        "own": _lines("/proc/self/cgroup"),
        "pid_1": _lines("/proc/1/cgroup"),
    }


def criu_check(config: Config) -> object:
    """`criu check` and `criu check --all`: what this kernel lacks."""
    from smr.shim import criu

    tool = criu.find(config)
    found: dict[str, object] = {"path": str(tool.path), "version": tool.version_text}
    for words in (["check"], ["check", "--all"]):
        result = run([tool.path, *words], timeout_s=60, check=False)
        found[" ".join(words)] = {"status": result.returncode, "output": (result.stderr + result.stdout).strip().splitlines()}
    return found


def check(config: Config) -> object:
    """What `smr check` finds."""
    from smr.shim.check import check_node

    return [finding.as_json() for finding in check_node(config)]


def settings(config: Config) -> object:
    """The settings in force, the file they came from, and which variables are set; their values are in the settings."""
    from smr.shim.config import DEFAULT_PATH

    file = Path(os.environ.get("SMR_CONFIG", str(DEFAULT_PATH)))
    return {
        "file": str(file),
        "text": file.read_text(errors="replace") if file.exists() else None,
        "in_force": {name: str(value) for name, value in asdict(config).items()},
        "environment": sorted(name for name in os.environ if name.startswith(("SMR_", "CONTAINER", "KUBERNETES_SERVICE"))),
    }


def registration(config: Config) -> object:
    """How engines know SMR: our own files as they are, of containerd's those tables alone that are about runtimes."""
    programs = ("smr", "smr-runtime", "smr-hook", "containerd-shim-smr-v1", "containerd-shim-smr-v2")
    return {
        "programs": {name: _where(name) for name in programs},
        "files": {path: Path(path).read_text(errors="replace") for path in _OURS if Path(path).exists()},
        "containerd": {str(path): _runtimes(path) for path in _containerd_files()},
        "installed": sorted(str(path) for path in Path(sys.prefix).parent.glob("*")) if Path(sys.prefix).name == "venv" else [],
    }


def containers(config: Config) -> object:
    """Every container that SMR knows, as `smr inspect` shows it; of hooks, what they call and not with what."""
    from smr.shim.inspect import summary_of
    from smr.shim.state import all_states

    found = []
    for state in all_states(config.run):
        summary = summary_of(state)
        details = summary.details(state)
        annotations = {key: head(value) if key in HOOKS else value for key, value in state.record.annotations.items()}
        details["annotations"] = {key: value for key, value in annotations.items() if key.startswith(PREFIX)}
        found.append({**summary.as_json(), **details, "resume_hook": head(state.record.resume)})
    return found


def store(config: Config) -> object:
    """The images by name, digest and size; what is broken, pinned, or half made. Nothing of what is in them."""
    from smr.images.pin import pins
    from smr.images.prefetch import cached_share
    from smr.images.store import Store

    found = Store(config.store)
    return {
        "root": str(found.root),
        "images": [
            {
                "reference": image.reference,
                "digest": image.digest,
                "created": image.created,
                "size_bytes": image.size_bytes,
                "memory_bytes": image.config.memory_bytes,
                "cached_share": round(cached_share(image), 3),
                "engine": image.config.source.engine,
                "source_image": image.config.source.image,
                "host": asdict(image.config.host) | {"cpu_flags": len(image.config.host.cpu_flags)},
                "layers": [[layer.kind.name, layer.size_bytes] for layer in image.layers],
            }
            for image in found.images()
        ],
        "broken": [{"reference": one.reference, "digest": one.digest, "error": one.error.as_json()} for one in found.broken()],
        "pins": [asdict(pin) for pin in pins(config.run)],
        "ingests": _names(config.store / "ingest"),
        "restores": _names(config.store / "restores"),
    }


def disks(config: Config) -> object:
    """Space, inodes and kind of the file systems that matter."""
    places = (config.store, config.run, config.log.parent, Path("/tmp"), Path("/var/lib/containers"), Path("/var/lib/containerd"))
    found = {}
    for place in places:
        if place.exists():
            facts = os.statvfs(place)
            found[str(place)] = {
                "size_bytes": facts.f_blocks * facts.f_frsize,
                "available_bytes": facts.f_bavail * facts.f_frsize,
                "inodes_available": facts.f_favail,
                "read_only": bool(facts.f_flag & os.ST_RDONLY),
                "mount": _mount_of(place),
            }
    return found


def log(config: Config) -> object:
    """The end of SMR's own log."""
    return "\n".join(_tail(config.log))


def journal(config: Config) -> object:
    """The end of the journal of events, and what the agent has counted."""
    totals = config.run / "agent" / "totals.json"
    return {
        "events": _tail(config.run / "events" / "journal"),
        "agent": {
            "lock": _read(str(config.run / "agent" / "lock")),
            "totals": json.loads(totals.read_text()) if totals.exists() else None,
        },
    }


def criu_logs(config: Config) -> object:
    """The ends of the last logs of CRIU that were kept because something failed."""
    files = sorted(config.log.parent.glob("*.log"), key=lambda file: file.stat().st_mtime)
    found = [file for file in files if file != config.log and file.name.startswith(("restore-", "dump", "checkpoint-"))]
    return "\n".join(f"-- {file}\n{_end(file, _CRIU_LOG_BYTES)}" for file in found[-_CRIU_LOGS:])


def engine_logs(config: Config) -> object:
    """Lines about SMR in the journals of engines and agent; of the kernel's those about memory, GPUs and CRIU."""
    found: dict[str, object] = {}
    if shutil.which("journalctl"):
        units = [word for unit in ("containerd", "crio", "kubelet", "podman", "smr-agent") for word in ("--unit", unit)]
        text = _output(["journalctl", "--no-pager", "--output=short-iso", "--lines=5000", *units])
        found["engines"] = [line for line in text.splitlines() if "smr" in line.lower()][-_LINES:]
    kernel = re.compile(r"out of memory|oom-kill|killed process|criu|nvrm|xid|segfault", re.IGNORECASE)
    found["kernel"] = [line for line in _output(["dmesg"]).splitlines() if kernel.search(line)][-_LINES:]
    return found


def processes(config: Config) -> object:
    """SMR's own processes: which module, for how long, how large. Not their arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                module = _PROCESSES.search(b"\n".join((entry / "cmdline").read_bytes().split(b"\0")[:5]))
                status = (entry / "status").read_text()
            except OSError:
                continue
            if module:
                facts = dict(
                    line.split(":", 1) for line in status.splitlines() if line.startswith(("State", "VmRSS", "VmLck", "PPid"))
                )
                found.append(
                    {"pid": int(entry.name), "module": module[0].decode(), **{key: text.strip() for key, text in facts.items()}}
                )
    return found


SECTIONS: Mapping[str, Callable[[Config], object]] = {
    section.__name__: section
    for section in (
        versions,
        check,
        settings,
        registration,
        node,
        cgroup_mode,
        criu_check,
        containers,
        store,
        disks,
        processes,
        log,
        journal,
        criu_logs,
        engine_logs,
    )
}


def _package(name: str) -> str:
    try:
        return package_version(name)
    except ImportError:
        return "not installed"


def _first_lines(program: str) -> str:
    return " | ".join(_output([program, "--version"]).strip().splitlines()[:3])


def _output(argv: list[str]) -> str:
    """What a program says; why it could not be asked, where it could not."""
    from smr.proto.errors import SmrError

    try:
        result = run(argv, timeout_s=_PROGRAM_S, check=False)
    except SmrError as error:
        return str(error)
    return result.stdout or result.stderr


def _read(path: str) -> str:
    """A small file; empty where there is none that can be read."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _lines(path: str) -> list[str]:
    return _read(path).splitlines()


def _tail(path: Path) -> list[str]:
    """The last lines of a file; none where it is not there."""
    return _end(path, 1 << 20).splitlines()[-_LINES:] if path.exists() else []


def _end(path: Path, size_bytes: int) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size_bytes))
        return file.read().decode(errors="replace")


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _where(program: str) -> str:
    found = shutil.which(program)
    return f"{found} -> {Path(found).resolve()}" if found else "not on PATH"


def _containerd_files() -> Iterator[Path]:
    yield from (
        path for path in (Path("/etc/containerd/config.toml"), *Path("/etc/containerd").glob("conf.d/*.toml")) if path.exists()
    )


def _runtimes(path: Path) -> object:
    """Its version and imports, and of each plugin what is under `containerd`: runtimes and the default. No registries."""
    import tomllib

    document = tomllib.loads(path.read_text())
    plugins = document.get("plugins")
    parts = plugins.items() if isinstance(plugins, dict) else ()
    chosen = {
        name: part["containerd"] for name, part in parts if isinstance(part, dict) and isinstance(part.get("containerd"), dict)
    }
    return {"version": document.get("version"), "imports": document.get("imports"), "containerd": chosen}


def _kernel_options() -> list[str]:
    places: Iterable[Path] = (Path(f"/boot/config-{platform.release()}"), Path(f"/lib/modules/{platform.release()}/config"))
    for place in places:
        if place.exists():
            return [line for line in place.read_text().splitlines() if _KERNEL_OPTIONS.match(line)]
    packed = Path("/proc/config.gz")
    if packed.exists():
        import gzip

        return [line for line in gzip.decompress(packed.read_bytes()).decode().splitlines() if _KERNEL_OPTIONS.match(line)]
    return []


def _mount_of(place: Path) -> str:
    """The mount that it lies on: point, kind and source."""
    points = sorted(mountinfo.points(), key=len)
    best = next((point for point in reversed(points) if place.resolve().is_relative_to(point)), "/")
    lines = [line.split() for line in _lines("/proc/self/mountinfo")]
    facts = [words for words in lines if words[4] == best]
    return " ".join([best, *facts[-1][facts[-1].index("-") + 1 :][:2]]) if facts else best
