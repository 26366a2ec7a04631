"""The GPUs of the node, by a fake NVML: facts, refusals, GPUs that are lost, and nodes that have none."""

from __future__ import annotations

import sys
from pathlib import Path
from threading import Thread

import pytest

from smr.proto.checkpoint import Gpu
from smr.proto.errors import Code, SmrError
from smr.shim.gpu import inventory
from tests.fakes.nvml import DRIVER, H200_BYTES, LIBRARY_NOT_FOUND, LOST, VERSION_MISMATCH, FakeGpu, install, uuid


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A node with no driver file, no AMD device and an empty PCI bus, in `tmp_path`."""
    monkeypatch.setattr(inventory, "DRIVER_VERSION", tmp_path / "version")
    monkeypatch.setattr(inventory, "AMD_DEVICE", tmp_path / "kfd")
    monkeypatch.setattr(inventory, "PCI_DEVICES", tmp_path / "pci")
    return tmp_path


def failure() -> SmrError:
    """The error of a node that must have none to show."""
    with pytest.raises(SmrError) as caught:
        inventory.read()
    assert caught.value.hint
    return caught.value


def test_facts_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a checkpoint and a preflight need, and one initialisation, ended."""
    fake = install(
        monkeypatch,
        FakeGpu(uuid=uuid(1), minor=3, free=5 << 30, mode=3, persistence=0, processes={41: 7 << 20, 42: None}),
        FakeGpu(uuid=uuid(2), mig=1),
    )
    found = inventory.read()
    assert (found.driver, found.cuda) == (DRIVER, 13000)
    first, second = found.gpus
    assert first.gpu == Gpu(uuid=uuid(1), name="NVIDIA H200", memory_bytes=H200_BYTES, minor=3, compute_capability="9.0")
    assert (first.index, first.free_bytes, first.compute_mode) == (0, 5 << 30, 3)
    assert (first.persistent, first.mig, first.fault) == (False, False, "")
    assert first.used_bytes == {41: 7 << 20, 42: 0}
    assert (second.index, second.mig, second.persistent) == (1, True, True)
    assert (fake.inits, fake.initialised) == (1, 0)


def test_memory_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By process and GPU, those asked for only."""
    install(monkeypatch, FakeGpu(uuid=uuid(1), processes={41: 7, 50: 1}), FakeGpu(uuid=uuid(2), processes={41: 8}))
    assert inventory.read().vram({41, 99}) == {41: {uuid(1): 7, uuid(2): 8}}


def test_what_a_gpu_does_not_support_is_left_at_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without MIG, memory of its own or persistence mode is no error."""
    refuses = frozenset({"mig", "memory", "persistence", "mode", "recovery", "processes"})
    install(monkeypatch, FakeGpu(uuid=uuid(1), refuses=refuses))
    (one,) = inventory.read().gpus
    assert (one.mig, one.gpu.memory_bytes, one.free_bytes, one.persistent, one.compute_mode) == (False, 0, 0, None, 0)
    assert one.fault == ""


def test_a_lost_gpu_is_listed_with_its_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others stay usable."""
    install(monkeypatch, FakeGpu(uuid=uuid(1), error=LOST), FakeGpu(uuid=uuid(2), recovery=1))
    lost, pending = inventory.read().gpus
    assert (lost.gpu.uuid, lost.fault, lost.label) == ("", "GPU is lost", "GPU 0")
    assert (pending.gpu.uuid, pending.fault) == (uuid(2), "a reset is pending")
    assert pending.label == "GPU 1 (NVIDIA H200, GPU-22222222)"


def test_an_initialisation_is_ended_when_a_question_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node whose driver is loaded and shows no GPU: GPU_MISSING, nothing left open."""
    fake = install(monkeypatch)
    assert "shows no GPU" in failure().message
    assert (fake.inits, fake.initialised) == (1, 0)


def test_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML may be asked beside other work."""
    install(monkeypatch, FakeGpu(uuid=uuid(1)))
    found: list[inventory.Inventory] = []
    thread = Thread(target=lambda: found.append(inventory.read()))
    thread.start()
    thread.join()
    assert found[0].by_uuid(uuid(1)) is found[0].gpus[0]
    assert found[0].by_uuid(uuid(2)) is None


def test_cpu_only_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library: it is said that there is no NVIDIA GPU."""
    install(monkeypatch, init_error=LIBRARY_NOT_FOUND)
    error = failure()
    assert error.code is Code.GPU_MISSING
    assert "no NVIDIA GPU" in error.message
    assert inventory.vendor() == ""


def test_amd_node(monkeypatch: pytest.MonkeyPatch, bare: Path) -> None:
    """AMD is named, and that it is not supported."""
    (bare / "kfd").touch()
    install(monkeypatch, init_error=LIBRARY_NOT_FOUND)
    error = failure()
    assert error.code is Code.GPU_MISSING
    assert "AMD GPUs (/dev/kfd)" in error.message
    assert inventory.vendor() == "amd"


@pytest.mark.parametrize(("kind", "there"), [("0x030200", True), ("0x040300", False)])
def test_a_gpu_whose_driver_is_not_loaded(monkeypatch: pytest.MonkeyPatch, bare: Path, kind: str, there: bool) -> None:
    """Found on the PCI bus; the sound device of a GPU is none."""
    device = bare / "pci" / "0000:1b:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text(f"{kind}\n")
    install(monkeypatch, init_error=LIBRARY_NOT_FOUND)
    assert ("its driver is not loaded" in failure().message) is there


def test_a_driver_that_was_updated_and_not_loaded(monkeypatch: pytest.MonkeyPatch, bare: Path) -> None:
    """Library and kernel module of two versions: GPU_DRIVER, with the way out."""
    (bare / "version").touch()
    install(monkeypatch, init_error=VERSION_MISMATCH)
    error = failure()
    assert error.code is Code.GPU_DRIVER
    assert "reboot" in error.hint
    assert inventory.vendor() == "nvidia"


def test_without_the_python_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is named; nothing is imported before it is needed."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py" in failure().message
