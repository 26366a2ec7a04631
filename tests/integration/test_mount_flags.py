"""Mounts of a restored container have the flags of its own spec, whatever the image has, on real runtimes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from smr.proto.errors import Code
from tests.integration.command import run
from tests.integration.podman import Podman
from tests.integration.runc import Edit, Runc
from tests.integration.sandbox import Sandbox

FAIL = {"smr.fallback": "fail"}
COMMAND = ("python3", "/app/workload.py")
HARDENED = ("ro", "nosuid", "nodev", "noexec")


@pytest.fixture
def volume(restoring_runc: Runc) -> Iterator[Path]:
    """A folder of the host's, with a program in it."""
    folder = restoring_runc.path.with_name(f"{restoring_runc.path.name}-volume")
    folder.mkdir()
    (folder / "program").write_text("#!/bin/sh\necho it ran\n")
    (folder / "program").chmod(0o755)
    yield folder
    run(["rm", "-r", folder])


def mounting(volume: Path, *options: str, root_readonly: bool = False) -> Edit:
    """A spec with the volume on /data."""

    def edit(spec: dict[str, object]) -> None:
        mounts, root, process = spec["mounts"], spec["root"], spec["process"]
        assert isinstance(mounts, list)
        assert isinstance(root, dict)
        assert isinstance(process, dict)
        mounts.append({"destination": "/data", "type": "bind", "source": str(volume), "options": ["rbind", *options]})
        root["readonly"] = root_readonly
        for kind in ("bounding", "effective", "permitted"):
            process["capabilities"][kind].append("CAP_SYS_ADMIN")  # to mount, in one test

    return edit


def checkpointed(runc: Runc, edit: Edit, *commands: str) -> None:
    """An image flags:1 of a container with that spec, in which `commands` have run."""
    runc.start("source", edit=edit)
    runc.ready("source")
    for command in commands:
        runc.exec("source", "sh", "-c", command)
    runc.checkpoint("source", "flags:1")
    runc.remove("source")


def restored(runc: Runc, edit: Edit) -> None:
    """The image in a container with that spec, running."""
    folder = runc.bundle("again", *COMMAND, annotations={"smr.restore": "flags:1", **FAIL}, edit=edit)
    runc.create("again", folder)
    runc("start", "again")


def written(runc: Runc, path: str) -> str:
    """What a write there in the restored container says; "" when it was done."""
    return runc.exec("again", "sh", "-c", f"echo text >{path}", check=False).stderr.strip()


def test_a_volume_that_was_writable(restoring_runc: Runc, volume: Path) -> None:
    """A checkpoint with a writable volume, in a container that has it read-only and hardened: EROFS, and nothing runs there."""
    runc = restoring_runc
    checkpointed(runc, mounting(volume, "rw"))
    restored(runc, mounting(volume, *HARDENED))
    assert "Read-only file system" in written(runc, "/data/new")
    assert "ermission denied" in runc.exec("again", "/data/program", check=False).stderr
    assert not (volume / "new").exists()
    assert runc.ask("again", "count")["count"] == 1


def test_a_volume_that_was_read_only(restoring_runc: Runc, volume: Path) -> None:
    """A checkpoint with a read-only volume, in a container that has it writable: files are written, programs run."""
    runc = restoring_runc
    checkpointed(runc, mounting(volume, *HARDENED))
    restored(runc, mounting(volume, "rw"))
    assert written(runc, "/data/new") == ""
    assert (volume / "new").read_text() == "text\n"
    assert "it ran" in runc.exec("again", "/data/program").stdout


def test_flags_that_agree_are_left(restoring_runc: Runc, volume: Path) -> None:
    """The same spec gives the same mounts, flag by flag, as the checkpoint had; but for masked paths, which are CRIU's."""
    runc = restoring_runc
    runc.start("source", edit=mounting(volume, "ro", "nodev"))
    runc.ready("source")
    before = flags(runc.pid("source"))
    runc.checkpoint("source", "flags:1")
    runc.remove("source")
    restored(runc, mounting(volume, "ro", "nodev"))
    assert flags(runc.pid("again")) == before


def flags(pid: int) -> dict[str, str]:
    """Mount point to flags, without masked files."""
    lines = (line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines())
    return {words[4]: words[5] for words in lines if words[3] != "/null"}


def test_the_volume_at_another_place(restoring_runc: Runc, volume: Path) -> None:
    """What the image has of the volume at a place that no spec names is read-only, too."""
    runc = restoring_runc
    checkpointed(runc, mounting(volume, "rw"), "mkdir /elsewhere", "mount --bind /data /elsewhere")
    restored(runc, mounting(volume, "ro"))
    assert "Read-only file system" in written(runc, "/data/new")
    assert "Read-only file system" in written(runc, "/elsewhere/new")
    assert list(volume.iterdir()) == [volume / "program"]


def test_a_root_that_was_writable(restoring_runc: Runc, volume: Path) -> None:
    """A read-only root is one after the restore, too, and a writable one is writable."""
    runc = restoring_runc
    checkpointed(runc, mounting(volume, "rw"))
    restored(runc, mounting(volume, "rw", root_readonly=True))
    assert "Read-only file system" in written(runc, "/new")
    assert written(runc, "/data/new") == ""
    assert json.loads(runc.exec("again", "cat", "/run/smr/restored.json").stdout)["container"] == "again"
    runc.checkpoint("again", "flags:1")
    runc.remove("again")
    restored(runc, mounting(volume, "rw"))
    assert written(runc, "/new") == ""


def test_a_file_that_is_open_for_writing(restoring_runc: Runc, volume: Path) -> None:
    """The kernel does not make such a mount read-only: an error that says so, and nothing of the restore is left."""
    runc = restoring_runc
    checkpointed(runc, mounting(volume, "rw"), "(sleep 1000 >/data/held 2>&1 </dev/null &)")
    folder = runc.bundle("again", *COMMAND, annotations={"smr.restore": "flags:1", **FAIL}, edit=mounting(volume, "ro"))
    done = runc.create("again", folder, check=False)
    assert done.returncode == 1
    assert "the mount /data" in done.stderr
    assert "open for writing" in done.stderr
    assert json.loads(runc.node.log_text().splitlines()[-1])["code"] == Code.MOUNT_MISMATCH
    assert runc("state", "again", check=False).returncode != 0
    assert runc.node.records() == {}


@pytest.mark.parametrize("users", [(), ("--uidmap=0:200000:65536", "--gidmap=0:200000:65536")], ids=["", "user namespace"])
@pytest.mark.parametrize(("before", "after"), [("rw", "ro"), ("ro", "rw")])
def test_a_volume_of_podman(podman: Podman, box: Sandbox, before: str, after: str, users: tuple[str, ...]) -> None:
    """`-v X:/data:rw` at the checkpoint and `:ro` at the restore, and the other way round: what the last command says."""
    folder = Path(tempfile.mkdtemp(dir=box.base))  # CRIU looks for it as the container's root
    folder.chmod(0o777)
    podman.start("source", options=("-v", f"{folder}:/data:{before}", *users))
    podman.ready("source")
    podman.checkpoint("source", "podman-flags:1")
    podman.remove("source")
    wanted = {"smr.restore": "podman-flags:1", **FAIL}
    podman.start("again", options=("-v", f"{folder}:/data:{after}", *users), annotations=wanted)
    done = podman.exec("again", "sh", "-c", "echo text >/data/new", check=False)
    assert ("Read-only file system" in done.stderr) == (after == "ro")
    assert (folder / "new").exists() == (after == "rw")
