"""CRIU's options follow from what is in the tree, on real runtimes: a restore has those that it needs, and says why."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.outside import COMMAND, Outside
from tests.integration.runc import Runc

FAIL = {"smr.fallback": "fail"}


@pytest.fixture
def outside(restoring_runc: Runc) -> Iterator[Outside]:
    """The folder and its socket."""
    folder = Path(tempfile.mkdtemp(dir=restoring_runc.path.parent))
    there = Outside(folder)
    yield there
    there.close()


@pytest.mark.parametrize("runc", ["runc", "runc-new"], indirect=True)
def test_options_follow_from_the_tree(restoring_runc: Runc, outside: Outside) -> None:
    """A lock, deleted files and a socket to the outside come back; image and container say which options that took, and why.

    A container without any of them is restored without those options.
    """
    runc = restoring_runc
    runc.create("source", runc.bundle("source", *COMMAND, annotations={"smr.criu.ghost-limit": "2G"}, edit=outside.edit))
    runc("start", "source")
    runc.ready("source")
    runc.checkpoint("source", "plain:1")
    outside.begin(runc.pid("source"))
    runc.checkpoint("source", "options:1")
    runc.remove("source")
    described = json.loads(runc.node.smr("images", "inspect", "options:1", "--json").stdout)["config"]
    assert set(described["criu_options"]) == {"file-locks", "ext-unix-sk"}
    assert "1 unix socket outside of the container, such as /data/log" in described["criu_why"]["ext-unix-sk"]
    assert described["criu_dump"]["ghost-limit"] == "2G"
    assert "1 open file that was deleted" in described["criu_why"]["ghost-limit"]
    assert "other" in described["criu_why"]["link-remap"] or "linked" in described["criu_why"]["link-remap"]
    assert "1 lock of files" in runc.node.smr("images", "inspect", "options:1").stdout
    folder = runc.bundle("again", *COMMAND, annotations={"smr.restore": "options:1", **FAIL}, edit=outside.edit)
    runc.create("again", folder)
    runc("start", "again")
    said = outside.hear()
    assert (said["locked"], said["ghost"], said["linked"]) == (True, "a ghost", "a link")
    inspected = json.loads(runc.node.smr("inspect", "again", "--json").stdout)
    assert {"file-locks", "ext-unix-sk", "tcp-close", "leave-stopped"} == set(inspected["criu_options"])
    assert inspected["criu_why"].keys() == set(inspected["criu_options"])
    assert "1 lock of files" in inspected["criu_why"]["file-locks"]
    assert "file-locks" in runc.node.smr("inspect", "again").stdout
    runc.remove("again")
    wanted = {"smr.restore": "plain:1", "smr.criu.skip-file-rwx-check": "", **FAIL}
    runc.create("again", runc.bundle("again", *COMMAND, annotations=wanted, edit=outside.edit))
    runc("start", "again")
    why = json.loads(runc.node.smr("inspect", "again", "--json").stdout)["criu_why"]
    assert set(why) == {"tcp-close", "leave-stopped", "skip-file-rwx-check"}
    assert why["skip-file-rwx-check"] == "smr.criu.skip-file-rwx-check asks for it"
