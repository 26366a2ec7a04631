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
