"""Fixtures of the GPU tests. The sandbox, CRIU and the runtimes are those of the integration tests.

`runc` has GPUs by CDI. Where CUDA cannot be initialised, or torch is missing, every test is skipped with what was seen. After
each test nothing may be left: processes, mounts, records (`leaks`), and memory of the GPUs (`vram`).
"""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import cdi
from tests.gpu.container import GpuRunc, python
from tests.integration import conftest as integration
from tests.integration.command import eventually
from tests.integration.conftest import box, criu, engines, leaks, nodes, runtimes  # noqa: F401  # fixtures
from tests.integration.sandbox import Sandbox

_HERE = Path(__file__).parent
# What the driver itself keeps for a context that has just ended, or moves about.
_SLACK_BYTES = 64 << 20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker("gpu")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(300))


@functools.cache
def _found() -> cdi.Probe | str:
    """What is here, or why nothing can be tested."""
    try:
        found = cdi.probe()
    except (LookupError, OSError, subprocess.SubprocessError) as error:
        return f"no GPU to test with: {error}"
    if os.geteuid() != 0:
        return "needs root"
    tried = subprocess.run(
        [python(), "-c", "import torch; torch.zeros(1, device='cuda')"], capture_output=True, text=True, check=False, timeout=120
    )
    if tried.returncode != 0:
        return f"{python()} has no torch that works with CUDA: {tried.stderr.strip().splitlines()[-1]}"
    return found


@pytest.fixture(scope="session")
def gpu() -> cdi.Probe:
    """What CUDA says of this machine."""
    found = _found()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def two_gpus(gpu: cdi.Probe) -> cdi.Probe:
    """A machine with two GPUs at least."""
    if gpu.gpus < 2:
        pytest.skip(f"needs two GPUs, found {gpu.gpus}")
    return gpu


@pytest.fixture(scope="session")
def document(gpu: cdi.Probe) -> dict[str, Any]:
    """The CDI document of this machine."""
    return cdi.specification(gpu)


@pytest.fixture(scope="session")
def runc(gpu: cdi.Probe, document: dict[str, Any], box: Sandbox, nodes: Any, runtimes: dict[str, Path]) -> GpuRunc:  # noqa: F811
    """runc, the newer one where there are two, driven by hand, with smr-runtime in front."""
    runtime = runtimes.get("runc-new") or runtimes.get("runc")
    if runtime is None:
        pytest.skip("no runc: run dev/provision")
    instance = GpuRunc(box.base / "bundles-gpu", nodes("gpu", runtime), box, document)
    integration._started.append(instance)
    return instance


def used_bytes() -> list[int]:
    """Memory in use on each GPU."""
    import pynvml

    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


@pytest.fixture(autouse=True)
def vram(gpu: cdi.Probe, request: pytest.FixtureRequest) -> Iterator[None]:
    """No memory of a GPU is in use after a test that was not before."""
    before = used_bytes()
    # Asked for here so that it ends after this one, which removes the containers.
    request.getfixturevalue("leaks")
    yield
    for engine in integration._started:
        engine.remove_all()

    def free() -> bool:
        now = used_bytes()
        assert all(one <= then + _SLACK_BYTES for one, then in zip(now, before, strict=True)), f"{now} in use, before {before}"
        return True

    eventually(free, timeout_s=20, what="the GPUs' memory is free again")


@pytest.fixture(autouse=True)
def store(request: pytest.FixtureRequest) -> Iterator[None]:
    """A failed test shows SMR's own log."""
    yield
    report = getattr(request.node, "_report", None)
    if report is not None and report.failed:
        for folder in integration.boxes():
            for log in folder.base.glob("node-*/smr.log"):
                print(f"--- {log}\n{log.read_text()[-3000:]}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    if report.when == "call":
        item._report = report  # type: ignore[attr-defined]
    return report
