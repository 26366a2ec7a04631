"""Cgroups of a container, v1 hybrid and v2: found by the spec's path, emptied and removed when a create is undone.

A runtime may put the path below its own cgroup (v1) or a slice, so a cgroup is recognised by the end of its path. Two engines
may use the same end; whoever kills by it must look at more than the path (see `smr.shim.undo`).
"""

from __future__ import annotations

import contextlib
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def version() -> str:
    """ "v2" for the unified hierarchy, else "v1"."""
    return "v2" if (ROOT / "cgroup.controllers").exists() else "v1"


def path_of(cgroups_path: str, container_id: str) -> str:
    """End of the container's cgroup path, without a leading slash: systemd's slice:prefix:name becomes prefix-name.scope."""
    if cgroups_path.count(":") == 2:
        _, prefix, name = cgroups_path.split(":")
        return f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
    return cgroups_path.strip("/") or container_id


def members(path: str) -> list[int]:
    """Processes in a cgroup whose path ends in `path`, or below it, in any hierarchy."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                lines = (entry / "cgroup").read_text().splitlines()
                if any(f"/{path}/" in line.split(":", 2)[2] + "/" for line in lines):
                    found.append(int(entry.name))
    return found


def memory_room(pid: int) -> int | None:
    """How many bytes the memory limits of a process's cgroups leave, page cache given back; None without a limit."""
    rooms = []
    for folder in _memory_folders(pid):
        limit, used, cache = _memory(folder)
        if limit is not None:
            rooms.append(max(0, limit - max(0, used - cache)))
    return min(rooms, default=None)


def _memory_folders(pid: int) -> list[Path]:
    """Its cgroup in the hierarchy that accounts memory, and those above it."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            top = ROOT / "memory" if "memory" in controllers.split(",") else ROOT
            folder = top / path.strip("/")
            if ("memory" in controllers.split(",") or not controllers) and _memory(folder)[0:2] != (None, 0):
                return [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]
    return []


def _memory(folder: Path) -> tuple[int | None, int, int]:
    """Limit, usage and page cache of one cgroup, in bytes."""
    unlimited = 1 << 60
    limit, used, cache = None, 0, 0
    for names in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):
            used = int((folder / names[1]).read_text())
            text = (folder / names[0]).read_text().strip()
            limit = int(text) if text != "max" and int(text) < unlimited else None
    with contextlib.suppress(OSError):
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        prefix = "total_" if "total_inactive_file" in stat else ""
        cache = sum(int(stat.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))
    return limit, used, cache


def remove(path: str) -> list[Path]:
    """Remove empty cgroups whose path ends in `path`, in every hierarchy; returns those that could not be removed."""
    left = []
    for folder in folders(path):
        for child in sorted(folder.rglob("*/"), key=lambda child: len(child.parts), reverse=True):
            with contextlib.suppress(OSError):
                child.rmdir()
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            left.append(folder)
    return left


def folders(path: str) -> list[Path]:
    """Directories whose path ends in `path`, at most four levels below a hierarchy's root (kubepods nests no deeper)."""
    roots = [ROOT] if version() == "v2" else [entry for entry in ROOT.iterdir() if entry.is_dir() and not entry.is_symlink()]
    patterns = ["/".join(["*"] * depth + [path]) for depth in range(5)]
    return [found for root in roots for pattern in patterns for found in root.glob(pattern) if found.is_dir()]
