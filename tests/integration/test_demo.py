"""`smr demo` on the engines of this machine, with a tiny model: what it prints, and that nothing is left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.node import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
_MEMBERS = {"cold_ttft_s", "restored_ttft_s", "tokens_equal", "stages_ms"}


@pytest.fixture(scope="module")
def python() -> Path:
    """An interpreter with torch: SMR_DEMO_PYTHON, or the one dev/demo has made."""
    path = Path(os.environ.get("SMR_DEMO_PYTHON", REPOSITORY / ".venv-demo/bin/python"))
    if not path.exists():
        pytest.skip(f"no {path}: run dev/demo once")
    code = "import torch, transformers, safetensors"
    done = subprocess.run([path, "-I", "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"{path} has no torch and transformers: run dev/demo once")
    return path


@pytest.fixture
def argv(python: Path, tmp_path: Path) -> list[str]:
    """The command; engines that are not here are skipped by the demo itself."""
    program = Path(sys.executable).parent / "smr"
    return [str(program), "demo", "--params=tiny", f"--python={python}", "--json", f"--output={tmp_path}/demo.html"]


@pytest.fixture
def env(newer_criu: Path) -> dict[str, str]:
    """SMR on the CRIU of the tests, untouched by an installed one."""
    return {**os.environ, "SMR_CRIU": str(newer_criu), "SMR_CONFIG": "/nonexistent/smr.toml"}


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """No folder, mount, process or cgroup of the demo is left that was not there before."""
    before = set(left_over())
    yield
    deadline = time.monotonic() + 15
    while (left := set(left_over()) - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def left_over() -> Iterator[str]:
    yield from (str(path) for path in Path(tempfile.gettempdir()).glob("smr-demo-*"))
    yield from (str(path) for path in Path("/var/tmp").glob("smr-demo-*"))
    yield from (line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "smr-demo" in line)
    yield from (str(path) for path in Path("/run/containerd/runc").glob("smr-demo-*/*"))
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        if b"smr-demo-" in command or b"shim/demo/server.py" in command:
            yield f"process {entry.name}: {command.replace(bytes(1), b' ').decode(errors='replace')}"


def test_restored_server_answers_as_before_on_every_engine(argv, env, tmp_path):
    """Greedy tokens are equal, the JSON has its members and no others, and the picture is there."""
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert set(document) == {"podman", "containerd"}
    measured = {name: result for name, result in document.items() if set(result) != {"skipped"}}
    if not measured:
        pytest.skip(f"no engine works here: {document}")
    for result in measured.values():
        assert set(result) == _MEMBERS
        assert result["tokens_equal"] is True
        assert result["cold_ttft_s"] > 0 and result["restored_ttft_s"] > 0
        assert {"locate", "create", "start"} <= set(result["stages_ms"])
    page = (tmp_path / "demo.html").read_text()
    assert all(f"{name}, restored" in page for name in measured)


@pytest.mark.parametrize("engine", ["podman", "containerd"])
def test_interrupt_leaves_nothing(argv, env, tmp_path, engine):
    """Ctrl-C while a container loads: container, mounts and daemon are gone, and no picture is written."""
    demo = subprocess.Popen([*argv, f"--engine={engine}"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not list(Path("/var/tmp").glob("smr-demo-*/*cold-0.pid")) and demo.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if demo.poll() == 0:
            pytest.skip(f"{engine} does not work here: {demo.communicate()[0]}")
        demo.send_signal(signal.SIGINT)
        output = demo.communicate(timeout=120)
    finally:
        demo.kill()
        demo.wait()
    assert demo.returncode == 130, output
    assert not (tmp_path / "demo.html").exists()
