"""Mounts below the sources of volumes: where they come from at a restore, and what an image has of propagation."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from smr.images.criu_files import read_messages, write_messages
from smr.images.mount_sharing import make_private
from smr.proto.annotations import Annotations
from smr.proto.checkpoint import CheckpointConfig, Host, Source
from smr.proto.criu import images_pb2 as pb
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec, parse_spec
from smr.shim import mounts, nested_mounts

MAGIC = struct.pack("<II", 0x54564319, 0x55563928)
ASKED = Annotations(restore="a")
CONFIG = CheckpointConfig(
    created="",
    host=Host(architecture="", kernel="", criu="", runtime=""),
    source=Source(engine="", container_id=""),
    spec={"mounts": [{"destination": "/data", "type": "bind", "source": "/x", "options": ["rbind"]}]},
    external_mounts=("/data", "/data/sub"),
)


def spec(source: Path, option: str = "rbind") -> Spec:
    """A container with that volume on /data."""
    return parse_spec({"mounts": [{"destination": "/data", "type": "bind", "source": str(source), "options": [option]}]})


def test_the_same_place_below_the_new_source(tmp_path: Path) -> None:
    """A mount that came along with a volume comes from below the volume's new source."""
    (tmp_path / "sub").mkdir()
    mounts.check(CONFIG, spec(tmp_path), ASKED)
    assert nested_mounts.restore_externals(CONFIG, spec(tmp_path), ASKED) == {"external": f"mnt[/data/sub]:{tmp_path}/sub"}
    named = Annotations(restore="a", mounts={"/data/sub": "/tmp"})
    assert nested_mounts.restore_externals(CONFIG, spec(tmp_path), named) == {}


def test_a_place_that_is_not_there(tmp_path: Path) -> None:
    """The folder that is missing is named; a volume that is not recursive has nothing below."""
    with pytest.raises(SmrError) as caught:
        mounts.check(CONFIG, spec(tmp_path), ASKED)
    assert caught.value.code is Code.MOUNT_MISMATCH
    assert f"/data/sub: its source {tmp_path}/sub does not exist" in caught.value.message
    with pytest.raises(SmrError) as caught:
        mounts.check(CONFIG, spec(tmp_path, "bind"), ASKED)
    assert "/data/sub of the checkpoint is missing" in caught.value.message


def test_a_change_while_criu_was_at_work(tmp_path: Path) -> None:
    """What CRIU fails for is said in our words where it went meanwhile; other errors stay what they are."""
    (tmp_path / "sub").mkdir()
    failed = SmrError("CRIU", code=Code.CRIU_FAILED)
    with pytest.raises(SmrError) as caught, mounts.explained(CONFIG, spec(tmp_path), ASKED):
        raise failed
    assert caught.value is failed
    with pytest.raises(SmrError) as caught, mounts.explained(CONFIG, spec(tmp_path), ASKED):
        (tmp_path / "sub").rmdir()
        raise failed
    assert caught.value.code is Code.MOUNT_MISMATCH
    assert caught.value.__cause__ is failed


def test_slaves_of_the_hosts_mounts(tmp_path: Path) -> None:
    """They and what shares their group are private in the image; slaves of the container's own mounts stay."""
    entries = [
        pb.MntEntry(mnt_id=1, mountpoint="./"),
        pb.MntEntry(mnt_id=2, mountpoint="./data", ext_key="/data", master_id=7),
        pb.MntEntry(mnt_id=3, mountpoint="./both", ext_mount=True, master_id=7, shared_id=9),
        pb.MntEntry(mnt_id=4, mountpoint="./elsewhere", master_id=7),
        pb.MntEntry(mnt_id=5, mountpoint="./own", master_id=9),
    ]
    write_messages(tmp_path / "mountpoints-9.img", MAGIC, entries)
    assert make_private(tmp_path) == 3
    found = [(mount.master_id, mount.shared_id) for mount in read_messages(tmp_path / "mountpoints-9.img", pb.MntEntry)]
    assert found == [(0, 0), (0, 0), (0, 9), (0, 0), (9, 0)]
    assert make_private(tmp_path) == 0
