"""Images of another machine's security module, and images whose files do not parse, on real runtimes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smr.images.criu_files import read_image_file, read_message, write_messages
from smr.proto.criu import identity_pb2
from smr.shim import lsm
from tests.integration.edited_image import edited
from tests.integration.runc import Runc

pytestmark = pytest.mark.parametrize("runc", ["runc-new"], indirect=True)
FAIL = {"smr.fallback": "fail"}
COMMAND = ("python3", "/app/workload.py")
PROFILE = "docker-default"


@pytest.fixture
def source(restoring_runc: Runc) -> Runc:
    """A runtime with an image source:1."""
    runc = restoring_runc
    runc.start("source")
    runc.ready("source")
    runc.ask("source", "count")
    runc.checkpoint("source", "source:1")
    runc.remove("source")
    return runc


def label(folder: Path) -> None:
    """As AppArmor's node would have written it."""
    inventory = read_message(folder / "inventory.img", identity_pb2.InventoryEntry)
    inventory.lsmtype = 2
    magic = read_image_file(folder / "inventory.img")[:4]
    payload = inventory.SerializeToString()
    (folder / "inventory.img").write_bytes(magic + len(payload).to_bytes(4, "little") + payload)
    for path in folder.glob("core-*.img"):
        core = read_message(path, identity_pb2.CoreEntry)
        core.thread_core.creds.lsm_profile = PROFILE
        write_messages(path, read_image_file(path)[:8], [core])


def test_a_label_of_another_machine(source: Runc) -> None:
    """CRIU refuses an image of a node with AppArmor where there is none; SMR takes its labels out, and says so."""
    if lsm.of_node() is not lsm.Module.NONE:
        pytest.skip(f"this machine has {lsm.of_node()}")
    runc = source
    edited(runc.node, "source:1", "labelled:1", label, process={"apparmorProfile": PROFILE})
    runc.create("again", runc.bundle("again", *COMMAND, annotations={"smr.restore": "labelled:1", **FAIL}))
    runc("start", "again")
    assert runc.ask("again", "count")["count"] == 2
    warnings = json.loads(runc.node.smr("inspect", "again", "--json").stdout)["warnings"]
    assert [warning for warning in warnings if PROFILE in warning and "AppArmor" in warning]
    runc.remove("again")


def test_files_that_do_not_parse(source: Runc) -> None:
    """An image whose digests are right and whose content is not: the file's name in the reason, and the fallback."""
    runc = source
    for name, fallback in (
        ("files.img", "cold"),
        ("core-1.img", "fail"),
        ("inventory.img", "fail"),
        ("mountpoints-*.img", "fail"),
    ):
        edited(runc.node, "source:1", "spoiled:1", lambda folder, name=name: spoil(folder, name))
        wanted = {"smr.restore": "spoiled:1", "smr.fallback": fallback}
        done = runc.create("again", runc.bundle("again", *COMMAND, annotations=wanted), check=False)
        assert (done.returncode == 0) == (fallback == "cold")
        reason = json.loads(runc.node.log_text().splitlines()[-1])["reason"]
        assert name.partition("-")[0].removesuffix(".img") in reason, reason
        if fallback == "cold":
            runc("start", "again")
            assert runc.ready("again")["count"] == 0
        runc.remove("again")


def spoil(folder: Path, name: str) -> None:
    """Leave the beginning of a file, and garbage."""
    (file,) = folder.glob(name)
    file.write_bytes(file.read_bytes()[:12] + b"\xff" * 40)
