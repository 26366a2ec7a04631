"""--engines-json FILE: which engine, runtime and CRIU each test ran on, and how it ended, for docs/engines.md (dev/engines)."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_counts: dict[tuple[tuple[str, str], ...], Counter[str]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    """The file's name."""
    parser.addoption(
        "--engines-json", type=Path, help="write there which engines and versions the tests ran on, and how they ended"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Count a test that ran, for each engine among its fixtures; one that failed at its set-up or afterwards has failed."""
    report = yield
    if item.config.getoption("--engines-json") and (report.when == "call" or report.failed):
        for parts in {_parts(value) for value in getattr(item, "funcargs", {}).values() if _is_engine(value)}:
            _counts.setdefault(parts, Counter())[report.outcome] += 1
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the file."""
    file = session.config.getoption("--engines-json")
    if file:
        rows = [dict(parts) | {"passed": 0, "failed": 0, "skipped": 0} | counts for parts, counts in sorted(_counts.items())]
        file.write_text(json.dumps({"machine": _machine(), "rows": rows}, indent=1) + "\n")


def _is_engine(value: object) -> bool:
    return type(value).__module__.rpartition(".")[2] in {"podman", "containerd", "runc", "cri"} and hasattr(value, "node")


def _parts(engine: Any) -> tuple[tuple[str, str], ...]:
    """What a row is about: the engine, its version, and those of runtime and CRIU."""
    kind = type(engine).__name__.lower()
    runtime, criu = Path(engine.node.runtime), Path(engine.node.criu)
    program = {"podman": "podman", "runc": ""}.get(kind, getattr(engine, "program", ""))
    name = {"podman": "podman", "containerd": "containerd (ctr)", "cri": "containerd (CRI)", "runc": "by hand"}[kind]
    return (
        ("engine", name),
        ("version", _version(program) if program else ""),
        ("runtime", f"{runtime.name} {_version(str(runtime))}"),
        ("criu", _version(str(criu))),
        ("cgroups", "v2" if getattr(engine, "prefix", ()) or _is_unified() else "v1"),
    )


@functools.cache
def _version(program: str) -> str:
    """As it prints it: the word that begins with a digit."""
    done = subprocess.run([program, "--version"], check=False, capture_output=True, text=True)
    words = done.stdout.replace(",", " ").split()
    return next((word.removeprefix("v") for word in words if word.removeprefix("v")[:1].isdigit()), "unknown")


def _is_unified() -> bool:
    return Path("/sys/fs/cgroup/cgroup.controllers").exists()


def _machine() -> dict[str, str]:
    system = platform.freedesktop_os_release()
    return {
        "system": f"{system.get('NAME', '')} {system.get('VERSION_ID', '')}".strip(),
        "kernel": os.uname().release,
        "architecture": platform.machine(),
        "python": platform.python_version(),
    }
