"""Labels of AppArmor and SELinux: what CRIU is told of them, by image, node and specs. No machine of the tests has either."""

from __future__ import annotations

from pathlib import Path

import pytest

from smr.images.criu_files import read_message
from smr.proto.criu import identity_pb2
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec, parse_spec
from smr.shim import lsm
from smr.shim.lsm import Module
from tests.unit.test_criu_needs import INVENTORY, MAGIC, write

OLD, NEW = "system_u:system_r:container_t:s0:c1,c2", "system_u:system_r:container_t:s0:c3,c4"
FILES = "system_u:object_r:container_file_t:s0:c3,c4"


def spec(apparmor: str = "", selinux: str = "", mounts: str = "") -> Spec:
    """A spec with those labels; none for ""."""
    labels = {"apparmorProfile": apparmor, "selinuxLabel": selinux}
    return parse_spec({"process": {k: v for k, v in labels.items() if v}, "linux": {"mountLabel": mounts}})


def test_another_label_of_selinux() -> None:
    """Each container has categories of its own, for its processes and its mounts: CRIU is told the new ones."""
    labels = lsm.plan(Module.SELINUX, Module.SELINUX, spec(selinux=OLD), spec(selinux=NEW, mounts=FILES))
    assert labels.options == {"lsm-profile": f"selinux:{NEW}", "lsm-mount-context": FILES}
    assert (labels.strip, labels.warnings) == (False, ())


@pytest.mark.parametrize(("wanted", "value"), [("docker-default", "apparmor:docker-default"), ("unconfined", "none:")])
def test_another_profile_of_apparmor(wanted: str, value: str) -> None:
    """The new container's profile; an unconfined one is none to CRIU."""
    labels = lsm.plan(Module.APPARMOR, Module.APPARMOR, spec("crio-default"), spec(wanted, mounts=FILES))
    assert labels.options == {"lsm-profile": value}


@pytest.mark.parametrize(
    ("image", "node", "old", "new", "words"),
    [
        (Module.NONE, Module.APPARMOR, spec(), spec("docker-default"), ("AppArmor", "docker-default", "was not given")),
        (Module.APPARMOR, Module.APPARMOR, spec(), spec("docker-default"), ("was not given",)),
        (Module.APPARMOR, Module.APPARMOR, spec("docker-default"), spec(), ("docker-default", "stays")),
        (Module.SELINUX, Module.APPARMOR, spec(), spec("docker-default"), ("was not given",)),
        (Module.APPARMOR, Module.APPARMOR, spec("a"), spec("two words"), ("'two words'", "none that CRIU can be told")),
        (Module.APPARMOR, Module.APPARMOR, spec("a"), spec("a\nlibdir /tmp"), ("none that CRIU can be told",)),
    ],
)
def test_labels_that_cannot_be_given(image: Module, node: Module, old: Spec, new: Spec, words: tuple[str, ...]) -> None:
    """No option, and one warning that names the label."""
    labels = lsm.plan(image, node, old, new)
    (warning,) = labels.warnings
    assert all(word in warning for word in words), warning
    assert (labels.options, labels.strip) == ({}, False)


@pytest.mark.parametrize("node", [Module.NONE, Module.SELINUX])
def test_a_label_of_another_module(node: Module) -> None:
    """CRIU would refuse the image, so the label is taken out, with a warning that says what is not in its place."""
    labels = lsm.plan(Module.APPARMOR, node, spec("docker-default"), spec("docker-default", NEW))
    assert labels.strip
    assert labels.options == {}
    assert "docker-default" in labels.warnings[0]
    assert (NEW in labels.warnings[0]) is (node is Module.SELINUX)


def test_nothing_to_do() -> None:
    """No labels, no warnings, on any node."""
    for node in Module:
        assert lsm.plan(Module.NONE, node, spec(), spec()) == lsm.Labels()
        assert lsm.plan(node, node, spec(), spec()) == lsm.Labels()
        same = spec("docker-default", OLD, FILES)
        assert lsm.plan(node, node, same, same) == lsm.Labels()


@pytest.mark.parametrize(("number", "module"), [(None, Module.NONE), (0, Module.NONE), (1, Module.SELINUX), (2, Module.APPARMOR)])
def test_module_of_an_image(tmp_path: Path, number: int | None, module: Module) -> None:
    """As CRIU numbers them."""
    write(tmp_path / "inventory.img", identity_pb2.InventoryEntry(lsmtype=number), magic=INVENTORY)
    assert lsm.of_image(tmp_path) is module


@pytest.mark.parametrize("data", [b"", b"\x00" * 6, INVENTORY + b"\x05\0\0\0\xff\xff"])
def test_an_inventory_that_does_not_parse(tmp_path: Path, data: bytes) -> None:
    """It is named."""
    (tmp_path / "inventory.img").write_bytes(data)
    with pytest.raises(SmrError, match="inventory") as caught:
        lsm.of_image(tmp_path)
    assert caught.value.code is Code.IMAGE_CORRUPT


def test_labels_are_taken_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every thread, on a node without a security module; an image without labels is not even read."""
    monkeypatch.setattr(lsm, "of_node", lambda: Module.NONE)
    assert lsm.apply(tmp_path, spec(), spec("docker-default")) == lsm.Labels()
    write(tmp_path / "inventory.img", identity_pb2.InventoryEntry(lsmtype=2), magic=INVENTORY)
    ids = dict.fromkeys(("uid", "gid", "euid", "egid", "suid", "sgid", "fsuid", "fsgid"), 0)
    creds = identity_pb2.CredsEntry(**ids, lsm_profile="docker-default")
    core = identity_pb2.CoreEntry(thread_core=identity_pb2.ThreadCoreEntry(creds=creds))
    write(tmp_path / "core-1.img", core, magic=MAGIC)
    assert lsm.apply(tmp_path, spec("docker-default"), spec()).strip
    assert not read_message(tmp_path / "core-1.img", identity_pb2.CoreEntry).thread_core.creds.HasField("lsm_profile")


def test_module_of_a_node(tmp_path: Path) -> None:
    """By the kernel's files; CRIU looks for AppArmor first."""
    there, absent = tmp_path, tmp_path / "absent"
    assert lsm.of_node(absent, absent) is Module.NONE
    assert lsm.of_node(absent, there) is Module.SELINUX
    assert lsm.of_node(there, there) is Module.APPARMOR
