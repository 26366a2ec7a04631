"""Cgroups of a container, v1 hybrid and v2: found by the spec's path, emptied and removed when a create is undone."""

from __future__ import annotations

import contextlib
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def version() -> str:
    """"v2" for the unified hierarchy, else "v1"."""
    return "v2" if (ROOT / "cgroup.controllers").exists() else "v1"


def name_of(cgroups_path: str, container_id: str) -> str:
    """Last component of a container's cgroup: cgroupfs paths end in it, systemd's slice:prefix:name becomes prefix-name.scope."""
    if cgroups_path.count(":") == 2:
        _, prefix, name = cgroups_path.split(":")
        return f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
    return cgroups_path.rstrip("/").rpartition("/")[2] or container_id


def members(cgroup_name: str) -> list[int]:
    """Processes that are in a cgroup of that name or below it, in any hierarchy."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                lines = (entry / "cgroup").read_text().splitlines()
                if any(cgroup_name in line.split(":", 2)[2].split("/") for line in lines):
                    found.append(int(entry.name))
    return found


def remove(cgroup_name: str) -> list[Path]:
    """Remove empty cgroups of that name in every hierarchy; returns those that could not be removed."""
    left = []
    for folder in _folders(cgroup_name):
        for child in sorted(folder.rglob("*/"), key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(OSError):
                child.rmdir()
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            left.append(folder)
    return left


def _folders(cgroup_name: str) -> list[Path]:
    """Directories of that name, at most four levels below a hierarchy's root (engines nest no deeper than kubepods do)."""
    roots = [ROOT] if version() == "v2" else [path for path in ROOT.iterdir() if path.is_dir() and not path.is_symlink()]
    return [
        found
        for root in roots
        for depth in range(5)
        for found in root.glob("/".join(["*"] * depth + [cgroup_name]))
        if found.is_dir()
    ]
