"""smr doctor on a node with containers whose secrets were planted where they may lie, and on nodes that are broken."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import pytest

from tests.integration import testimage
from tests.integration.command import run
from tests.integration.conftest import Warm
from tests.integration.podman import Podman

SMR = [sys.executable, "-c", "import sys; from smr.shim.cli import main; main(sys.argv[1:])"]
PLANTED = {
    "environment": "planted-environment-4711",
    "annotation": "planted-annotation-4712",
    "label": "planted-label-4713",
    "command": "planted-command-4714",
    "hook": "planted-hook-4715",
    "part of a hook": "planted-part-4718",
    "own environment": "planted-own-4716",
    "file": "planted-file-4717",
}


@pytest.fixture
def report(podman: Podman, podman_warm: Warm, tmp_path: Path) -> dict[str, str]:
    """The archive's files after a restore, and a cold start whose reason quotes its command; nothing of PLANTED may be there."""
    words = ["--label", f"key={PLANTED['label']}", "-e", f"PLAIN={PLANTED['environment']}"]
    hook = f"exec:login --password {PLANTED['hook']} {PLANTED['part of a hook']}"
    more = {"vault.example/key": PLANTED["annotation"], "smr.resume": hook}
    podman.start("warm", *podman_warm.features, options=words, annotations={"smr.restore": podman_warm.image, **more})
    podman.ready("warm")
    podman.exec("warm", "sh", "-c", f"echo {PLANTED['file']} >/tmp/planted")
    annotations = ["--annotation", f"smr.restore={podman_warm.image}", *podman.network, f"--cgroup-parent={podman.parent}"]
    podman("run", "-d", *words, *annotations, testimage.NAME, "sh", "-c", "exec sleep 1000", f"--token={PLANTED['command']}")
    env = {**podman.env, "SMR_PLANTED_TOKEN": PLANTED["own environment"], "MY_TOKEN": PLANTED["own environment"]}
    target = tmp_path / "report.tar.gz"
    done = json.loads(podman.node.smr("doctor", "-o", target, "--json", env=env).stdout)
    assert done["file"] == str(target)
    with tarfile.open(target) as tar:
        files = {Path(member.name).name: tar.extractfile(member).read().decode() for member in tar}  # type: ignore[union-attr]
    assert target.stat().st_size < 1 << 20
    return files


def test_a_report_has_the_facts_and_no_secrets(podman: Podman, podman_warm: Warm, report: dict[str, str]) -> None:
    """Versions, checks, states, reasons, ends of logs; of all that was planted nothing, in any file."""
    containers = {one["status"]: one for one in json.loads(report["containers.json"])}
    assert containers["restored"]["image"] == podman_warm.image
    assert containers["cold"]["reason_code"] == "command_mismatch"
    assert containers["restored"]["annotations"] == {"smr.restore": podman_warm.image, "smr.resume": "exec:login"}
    assert json.loads(report["versions.json"])["podman"].startswith("podman version")
    assert json.loads(report["criu_check.json"])["check"]["status"] == 0
    assert json.loads(report["settings.json"])["in_force"]["store"] == str(podman.node.store)
    assert podman_warm.image in [image["reference"] for image in json.loads(report["store.json"])["images"]]
    assert "started_cold" in report["log.txt"]
    assert "command_mismatch" in report["journal.json"]
    assert {"check.json", "node.json", "disks.json", "cgroup_mode.json", "registration.json", "processes.json"} <= report.keys()
    for what, secret in PLANTED.items():
        assert not [name for name, text in report.items() if secret in text], what


def test_a_broken_node_gets_its_report(tmp_path: Path) -> None:
    """Bad settings, a store and records that cannot be read, no CRIU, no log: each is told, and the rest is there."""
    for folder in ("store", "run/containers/default/c1"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "store/index.json").write_text("{")
    (tmp_path / "run/containers/default/c1/state.json").write_text("{")
    (tmp_path / "smr.toml").write_text("[smr]\nfills = 'many'\n")
    env = {
        "PATH": str(tmp_path),
        "SMR_CONFIG": str(tmp_path / "smr.toml"),
        "SMR_RUN": str(tmp_path / "run"),
        "SMR_STORE": str(tmp_path / "store"),
        "SMR_LOG": str(tmp_path / "none/smr.log"),
    }
    found = json.loads(run([*SMR, "doctor", "--json"], env=env).stdout)
    assert "fills" in found["settings_problem"]
    assert "CRIU not found" in found["criu_check"]["error"]
    assert "store" in found["store"]["error"]
    assert found["containers"][0]["status"] == "cold"
    assert "cannot be read" in found["containers"][0]["reason"]
    assert found["log"] == ""
    assert found["versions"]["kernel"]
    assert found["disks"][str(tmp_path / "store")]["available_bytes"] > 0
    text = run([*SMR, "doctor"], env=env).stdout
    assert "== criu_check\ncould not be collected: CRIU not found" in text
