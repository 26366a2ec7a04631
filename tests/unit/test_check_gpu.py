"""`smr check` on GPUs: a quiet line where there is none, facts and remedies where there are, an image's against the node's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from smr.images.store import Store
from smr.proto.checkpoint import CudaTask, Gpu, GpuState
from smr.shim import check, check_gpu, preflight
from smr.shim.check import Finding, Level
from smr.shim.config import Config
from smr.shim.gpu import inventory
from tests.fakes.nvml import DRIVER, H200_BYTES, LIBRARY_NOT_FOUND, LOST, FakeGpu, install, uuid
from tests.store_support import commit, make_config

STATE = GpuState(
    driver=DRIVER,
    gpus=(Gpu(uuid=uuid(1), name="NVIDIA H200", memory_bytes=H200_BYTES, compute_capability="9.0"),),
    tasks=(CudaTask(pid=1, vram_bytes={uuid(1): 8 << 30}),),
)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A node without GPU files; NVIDIA's driver file, the toolkit's configuration and CDI lie in `tmp_path`."""
    monkeypatch.setattr(inventory, "DRIVER_VERSION", tmp_path / "version")
    monkeypatch.setattr(inventory, "AMD_DEVICE", tmp_path / "kfd")
    monkeypatch.setattr(inventory, "PCI_DEVICES", tmp_path / "pci")
    monkeypatch.setattr(check_gpu, "TOOLKIT", tmp_path / "toolkit.toml")
    monkeypatch.setattr(check_gpu, "CDI_FOLDERS", (tmp_path / "cdi",))
    install(monkeypatch, init_error=LIBRARY_NOT_FOUND)
    return tmp_path


def found(code: str) -> list[Finding]:
    """The node's findings of a code."""
    return [finding for finding in check_gpu.node_findings() if finding.code == code]


def test_cpu_only_node() -> None:
    """One line, no warning, and NVML is not asked."""
    (only,) = check_gpu.node_findings()
    assert (only.level, only.found) == (Level.INFO, "none")


def test_amd_node(bare: Path) -> None:
    """A clear word."""
    (bare / "kfd").touch()
    (only,) = check_gpu.node_findings()
    assert only.level is Level.INFO
    assert "only NVIDIA's" in only.found


def test_driver_that_does_not_answer(bare: Path) -> None:
    """A warning: containers without a GPU can be restored all the same."""
    (bare / "version").touch()
    (only,) = check_gpu.node_findings()
    assert (only.code, only.level) == ("gpu_missing", Level.WARNING)
    assert only.fix


def test_facts(monkeypatch: pytest.MonkeyPatch, bare: Path) -> None:
    """Driver, and each GPU with what is free; persistence mode only where it is off."""
    (bare / "version").touch()
    install(monkeypatch, FakeGpu(uuid=uuid(1), free=100 << 30), FakeGpu(uuid=uuid(2), persistence=0))
    assert found("gpu_driver")[0].found == f"{DRIVER}, CUDA 13.0"
    first, second = found("gpu")
    assert first.found == "GPU 0 (NVIDIA H200, GPU-11111111): 100.0 of 140.4 GiB free"
    assert second.what == "GPU 1"
    (persistence,) = found("gpu_persistence")
    assert (persistence.what, persistence.level) == ("GPU 1", Level.INFO)
    assert "-pm 1" in persistence.fix


@pytest.mark.parametrize(
    ("gpu", "word", "fix"),
    [
        (FakeGpu(uuid=uuid(1), mig=1), "MIG mode", "-mig 0"),
        (FakeGpu(uuid=uuid(1), mode=2), "compute mode Prohibited", "-c 0"),
        (FakeGpu(uuid=uuid(1), error=LOST), "GPU is lost", "--gpu-reset"),
    ],
)
def test_a_gpu_that_cannot_be_restored_to(monkeypatch: pytest.MonkeyPatch, bare: Path, gpu: FakeGpu, word: str, fix: str) -> None:
    """A warning with the command that ends it."""
    (bare / "version").touch()
    install(monkeypatch, gpu)
    (one,) = found("gpu_busy")
    assert one.level is Level.WARNING
    assert word in one.found
    assert fix in one.fix


@pytest.mark.parametrize(
    ("text", "level", "word"),
    [
        ('[nvidia-container-runtime]\nmode = "legacy"\n', Level.WARNING, "mode legacy"),
        ('[nvidia-container-runtime]\nmode = "cdi"\n', Level.INFO, "mode cdi"),
        ("# empty\n", Level.INFO, "mode auto"),
        ("mode = [", Level.WARNING, "cannot be read"),
    ],
)
def test_toolkit(monkeypatch: pytest.MonkeyPatch, bare: Path, text: str, level: Level, word: str) -> None:
    """The legacy mode is warned of."""
    (bare / "version").touch()
    (bare / "toolkit.toml").write_text(text)
    install(monkeypatch, FakeGpu(uuid=uuid(1)))
    (one,) = found("gpu_toolkit")
    assert one.level is level
    assert word in one.found


def test_cdi(monkeypatch: pytest.MonkeyPatch, bare: Path) -> None:
    """None, one of this driver, one that an update of the driver has left behind; other vendors' do not count."""
    (bare / "version").touch()
    install(monkeypatch, FakeGpu(uuid=uuid(1)))
    assert "no spec" in found("gpu_cdi")[0].found
    (bare / "cdi").mkdir()
    (bare / "cdi" / "other.json").write_text('{"kind": "vendor.com/nic"}')
    (bare / "cdi" / "a.yaml").write_text(f"kind: nvidia.com/gpu\n- /usr/lib/libcuda.so.{DRIVER}\n")
    (bare / "cdi" / "b.yaml").write_text("kind: nvidia.com/gpu\n- /usr/lib/libcuda.so.570.1\n")
    good, stale = found("gpu_cdi")
    assert (good.level, stale.level) == (Level.INFO, Level.WARNING)
    assert good.found.endswith("a.yaml")
    assert "nvidia-ctk cdi generate" in stale.fix


def test_image_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which GPU it would get."""
    install(monkeypatch, FakeGpu(uuid=uuid(2)))
    (only,) = check_gpu.image_findings(STATE)
    assert (only.code, only.level) == ("gpu", Level.INFO)
    assert "GPU-22222222" in only.found
    assert DRIVER in only.needed


def test_image_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reason, each an error."""
    install(monkeypatch, FakeGpu(uuid=uuid(2), name="NVIDIA L4", free=1 << 30))
    findings = list(check_gpu.image_findings(replace(STATE, driver="570.1")))
    assert [(one.code, one.level) for one in findings] == [
        ("gpu_driver", Level.ERROR),
        ("gpu_mismatch", Level.ERROR),
        ("gpu_memory", Level.ERROR),
    ]


def test_image_with_gpus_in_smr_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`smr check IMAGE` on a CPU-only node says what is missing; an image without a GPU has no such line."""
    monkeypatch.setattr(preflight.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(preflight, "cpu_flags", lambda: ("avx2",))
    (tmp_path / "store").mkdir()
    node = Config(store=tmp_path / "store", run=tmp_path / "run", criu=str(tmp_path / "criu"))
    commit(Store(node.store), "plain", config=make_config())
    commit(Store(node.store), "llama", config=replace(make_config(), gpu=STATE))
    assert "gpu_missing" in {finding.code for finding in check.check_image(node, "llama")}
    assert not {finding.code for finding in check.check_image(node, "plain") if finding.code.startswith("gpu")}
