"""Which OCI runtime SMR stands in front of: never itself, and never another than the one that was named."""

from __future__ import annotations

from pathlib import Path

import pytest

from smr.proto.errors import Code, SmrError
from smr.shim import real_runtime as module
from smr.shim.config import Config
from smr.shim.real_runtime import real_runtime


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with runc and crun on PATH, and no settings."""
    for name in ("runc", "crun"):
        program(tmp_path / "usr" / name)
    monkeypatch.setenv("PATH", str(tmp_path / "usr"))
    monkeypatch.delenv("SMR_RUNTIME", raising=False)
    monkeypatch.setattr(module, "_NAMED_IN", tmp_path / "runtime")
    return tmp_path


def program(path: Path) -> Path:
    """An executable."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/false\n")
    path.chmod(0o755)
    return path


def test_runc_before_crun(machine: Path) -> None:
    """What PATH has, where nothing is named."""
    assert real_runtime(Config()) == f"{machine}/usr/runc"
    (machine / "usr/runc").unlink()
    assert real_runtime(Config()) == f"{machine}/usr/crun"


def test_order_of_settings(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller, the environment, smr.toml, /etc/smr/runtime."""
    (machine / "runtime").write_text(f"{program(machine / 'd')}\n# more\n")
    assert real_runtime(Config()) == f"{machine}/d"
    config = Config(runtime=str(program(machine / "c")))
    assert real_runtime(config) == f"{machine}/c"
    monkeypatch.setenv("SMR_RUNTIME", str(program(machine / "b")))
    assert real_runtime(config) == f"{machine}/b"
    assert real_runtime(config, asked="crun") == f"{machine}/usr/crun"


@pytest.mark.parametrize("named", ["/no/such/runc", "youki", "/etc/passwd"])
def test_runtime_that_is_named_and_not_there(named: str) -> None:
    """Another one in its place would be a surprise: an error with its name."""
    with pytest.raises(SmrError) as caught:
        real_runtime(Config(runtime=named))
    assert caught.value.code is Code.RUNTIME_MISSING
    assert named in caught.value.message


def test_no_runtime_at_all(monkeypatch: pytest.MonkeyPatch, machine: Path) -> None:
    """Both names are told."""
    monkeypatch.setenv("PATH", str(machine))
    with pytest.raises(SmrError) as caught:
        real_runtime(Config())
    assert "runc or crun" in caught.value.message


def test_own_folder_on_path_is_passed_over(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The containerd shim puts it first: runc is SMR there."""
    ours = program(machine / "smr-runtime")
    for folder in ("smr-path", "links"):
        (machine / folder).mkdir()
        (machine / folder / "runc").symlink_to(ours)
    monkeypatch.setenv("PATH", f"{machine}/smr-path:{machine}/usr")
    assert real_runtime(Config()) == f"{machine}/usr/runc"
    monkeypatch.setenv("PATH", f"{machine}/links")
    with pytest.raises(SmrError) as caught:
        real_runtime(Config())
    assert "is SMR itself" in caught.value.message
