"""`smr check`: findings about a node and an image, each with what was found, what is needed and how to get it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from smr.images.store import Store
from smr.proto.errors import Code, SmrError
from smr.shim import check, criu, preflight
from smr.shim.check import Finding, Level
from smr.shim.config import Config
from smr.shim.gpu import inventory
from tests.store_support import commit, make_config

Answers = dict[str, tuple[int, str]]


@pytest.fixture
def answers() -> Answers:
    """What programs answer: exit status and output by the end of the command line."""
    return {
        "criu --version": (0, "Version: 4.2\n"),
        "criu check": (0, "Looks good.\n"),
        "runc --version": (0, "runc version 1.1.5\ncommit: x\n"),
        "{{.Host.OCIRuntime.Path}}": (0, "/usr/local/bin/smr-runtime\n"),
    }


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: Answers) -> Config:
    """A node with everything on PATH, as fakes that are never run."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("criu", "runc", "podman", "containerd", "containerd-shim-smr-v1"):
        (programs / name).write_text("#!/bin/false\n")
        (programs / name).chmod(0o755)

    def run(argv: list[object], **_: object) -> subprocess.CompletedProcess[str]:
        line = " ".join(map(str, argv))
        status, text = next(answer for end, answer in answers.items() if line.endswith(end))
        if status == 99:
            raise SmrError(f"'{line}' did not end within 60 s", code=Code.TIMEOUT)
        return subprocess.CompletedProcess([], status, text if status == 0 else "", "" if status == 0 else text)

    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("SMR_RUNTIME", raising=False)
    monkeypatch.setattr(check, "run", run)
    monkeypatch.setattr(criu, "run", run)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(inventory, "vendor", lambda: "")
    monkeypatch.setattr(inventory, "has_idle_nvidia", lambda: False)
    (tmp_path / "store").mkdir()
    return Config(store=tmp_path / "store", run=tmp_path / "run", criu=str(programs / "criu"), runtime=str(programs / "runc"))


def by_code(config: Config) -> Mapping[str, Finding]:
    """The node's findings, each code once."""
    found = check.check_node(config)
    assert len({finding.code for finding in found}) == len(found)
    return {finding.code: finding for finding in found}


def errors(found: Mapping[str, Finding]) -> set[str]:
    """Codes of what stops restores."""
    return {code for code, finding in found.items() if finding.level is Level.ERROR}


def program(config: Config, name: str) -> Path:
    """A fake on PATH."""
    return Path(config.criu).with_name(name)


def test_node_that_has_everything(node: Config) -> None:
    """No error; the versions and paths are told."""
    found = by_code(node)
    assert errors(found) == set()
    assert found["criu"].found == f"4.2 at {node.criu}"
    assert found["runtime"].found == f"{node.runtime}: runc version 1.1.5"
    assert found["podman_runtime"].found == "/usr/local/bin/smr-runtime"
    assert str(node.store) in found["store"].found


def test_every_error_and_warning_has_a_fix(node: Config, answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a node where nothing works."""
    answers["criu check"] = (1, "Error: no CONFIG_CHECKPOINT_RESTORE")
    answers["{{.Host.OCIRuntime.Path}}"] = (125, "Error: default OCI runtime smr not found")
    program(node, "containerd-shim-smr-v1").unlink()
    program(node, "runc").unlink()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    found = by_code(node)
    assert {"criu_check", "runtime_missing", "root"} <= errors(found)
    assert {"podman_runtime", "shim"} <= found.keys()
    assert all(finding.fix for finding in found.values() if finding.level is not Level.INFO)
    assert "CONFIG_CHECKPOINT_RESTORE" in found["criu_check"].found
    assert "smr not found" in found["podman_runtime"].found


@pytest.mark.parametrize(("version", "code"), [("Version: 3.17.1", "criu_too_old"), ("what?", "criu_missing")])
def test_unusable_criu(node: Config, answers: Answers, version: str, code: str) -> None:
    """The error of a restore, as a finding; `criu check` is not asked then."""
    answers["criu --version"] = (0, version)
    found = by_code(node)
    assert errors(found) == {code}
    assert "criu" not in found
    assert "4.1" in found[code].needed


def test_criu_that_is_too_old_for_the_kernel(node: Config, answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux 6.16 wants 4.2 for sockets; an older kernel does not."""
    answers["criu --version"] = (0, "Version: 4.1.1")
    monkeypatch.setattr(criu, "kernel_answers_passcred", lambda: False)
    assert errors(by_code(node)) == {"criu_sockets"}
    monkeypatch.setattr(criu, "kernel_answers_passcred", lambda: True)
    assert errors(by_code(node)) == set()


def test_engines_that_are_not_there(node: Config) -> None:
    """No fault: said, and nothing more."""
    for name in ("podman", "containerd"):
        program(node, name).unlink()
    found = by_code(node)
    assert errors(found) == set()
    assert (found["podman"].found, found["containerd"].found) == ("not installed", "not installed")


def test_program_that_hangs_is_a_finding(node: Config, answers: Answers) -> None:
    """The rest of the node is looked at all the same."""
    answers["{{.Host.OCIRuntime.Path}}"] = (99, "")
    found = by_code(node)
    assert "podman" in found["timeout"].found
    assert "store" in found


def test_store_on_a_full_disk(node: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under 1 GiB is a warning."""
    monkeypatch.setattr(check.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5 << 20}))
    found = by_code(node)["store"]
    assert found.level is Level.WARNING
    assert "5 MiB free" in found.found


def test_store_that_cannot_be_written(node: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that is in the way is named: the store's, or the nearest above it."""
    monkeypatch.setattr(check.os, "access", lambda *_: False)
    found = by_code(replace(node, store=node.store / "a" / "b"))["store"]
    assert found.level is Level.ERROR
    assert found.found.startswith(f"{node.store} ")


def test_json_has_all_members() -> None:
    """As programs read it: every member a string."""
    found = Finding(code="c", level=Level.WARNING, what="w")
    assert found.as_json() == {"code": "c", "level": "warning", "what": "w", "found": "", "needed": "", "fix": ""}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of the image's kind."""
    monkeypatch.setattr(preflight.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(preflight, "cpu_flags", lambda: ("avx2",))


@pytest.mark.usefixtures("machine")
def test_image_that_fits(node: Config) -> None:
    """Whole, for this CPU; the mounts it needs are told."""
    config = make_config()
    commit(Store(node.store), "llama", config=replace(config, external_mounts=("/data",)))
    found = {finding.code: finding for finding in check.check_image(node, "llama")}
    assert {code for code, finding in found.items() if finding.level is Level.ERROR} == set()
    assert found["mount"].needed == "/data"
    assert found["kernel"].needed == "made on 6.8.1"


@pytest.mark.usefixtures("machine")
def test_image_that_does_not_fit(node: Config) -> None:
    """CPU features, a newer CRIU and a damaged blob are separate findings."""
    config = make_config()
    host = replace(config.host, cpu_flags=("avx2", "avx512f"), criu="4.3")
    image = commit(Store(node.store), "llama", config=replace(config, host=host))
    image.layers[0].path.unlink()
    found = {finding.code: finding for finding in check.check_image(node, "llama")}
    assert found["cpu_mismatch"].level is Level.ERROR
    assert "avx512f" in found["cpu_mismatch"].found
    assert found["image_corrupt"].level is Level.ERROR
    assert (found["criu_older"].level, found["criu_older"].found) == (Level.WARNING, "4.2")


def test_image_that_is_not_there(node: Config) -> None:
    """An error of the command, with its own exit status, and no finding."""
    with pytest.raises(SmrError) as caught:
        check.check_image(node, "llama")
    assert caught.value.code is Code.IMAGE_NOT_FOUND
