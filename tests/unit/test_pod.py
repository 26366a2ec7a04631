"""Which container of a pod the annotations mean, whose images it may have, and when it is not restored any more."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from smr.images.criu_uts import set_hostname
from smr.proto.annotations import Annotations, parse
from smr.proto.checkpoint import CheckpointConfig, Host, Source
from smr.proto.errors import Code, SmrError
from smr.proto.oci import parse_spec
from smr.proto.pod import Pod, pod_of
from smr.shim import pods
from smr.shim.config import Config

CONTAINERD = {
    "io.kubernetes.cri.container-type": "container",
    "io.kubernetes.cri.sandbox-id": "s1",
    "io.kubernetes.cri.sandbox-name": "web-0",
    "io.kubernetes.cri.sandbox-namespace": "shop",
    "io.kubernetes.cri.sandbox-uid": "u-1",
    "io.kubernetes.cri.container-name": "server",
    "io.kubernetes.cri.image-name": "localhost/app:1",
}
CRIO = {
    "io.kubernetes.cri-o.ContainerType": "container",
    "io.kubernetes.cri-o.SandboxID": "s1",
    "io.kubernetes.pod.name": "web-0",
    "io.kubernetes.pod.namespace": "shop",
    "io.kubernetes.pod.uid": "u-1",
    "io.kubernetes.container.name": "server",
}
POD = Pod(name="web-0", namespace="shop", uid="u-1", sandbox="s1", container="server")


def asked(keys: Mapping[str, str], container: str = "server") -> Annotations | None:
    return parse({**CONTAINERD, "io.kubernetes.cri.container-name": container, **keys})


def image(args: tuple[str, ...], annotations: Mapping[str, str], name: str = "") -> CheckpointConfig:
    return CheckpointConfig(
        created="2026-01-01T00:00:00+00:00",
        host=Host(architecture="x86_64", kernel="6.1", criu="4.1", runtime="runc"),
        source=Source(engine="containerd", container_id="c", image=name),
        spec={"process": {"args": list(args)}, "annotations": dict(annotations)},
    )


@pytest.mark.parametrize("annotations", [CONTAINERD, CRIO], ids=["containerd", "CRI-O"])
def test_a_pods_container_knows_its_pod(annotations: Mapping[str, str]) -> None:
    """From what the engine writes into its spec."""
    assert pod_of(annotations) == POD


@pytest.mark.parametrize("key", ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"])
def test_a_sandbox_asks_for_nothing(key: str) -> None:
    """It carries its pod's annotations; even wrong ones are not its matter."""
    assert parse({key: "sandbox", "smr.restore": "app", "smr.wrong": "x"}) is None


def test_a_key_with_a_name_is_for_that_container() -> None:
    """The others of the pod are not asked to restore."""
    keys = {"smr.restore.server": "app:1", "smr.fallback": "fail"}
    found = asked(keys)
    assert found is not None
    assert (found.restore, found.bare, found.conflict, found.pod) == ("app:1", False, "", POD)
    assert asked(keys, "sidecar") is None


@pytest.mark.parametrize("naming", ["smr.container", "kubectl.kubernetes.io/default-container"])
def test_the_pod_may_say_which_is_the_application(naming: str) -> None:
    """Then nothing has to be guessed."""
    keys = {"smr.restore": "app:1", naming: "server"}
    found = asked(keys)
    assert found is not None
    assert (found.restore, found.bare) == ("app:1", False)
    assert asked(keys, "sidecar") is None


def test_our_own_naming_comes_before_kubectls() -> None:
    """smr.container is for pods where they differ."""
    keys = {"smr.restore": "app:1", "smr.container": "server", "kubectl.kubernetes.io/default-container": "sidecar"}
    assert asked(keys) is not None
    assert asked(keys, "sidecar") is None


def test_without_a_name_the_image_decides() -> None:
    """An image of a pod is for the container of its name; any other for the container of its command."""
    found = asked({"smr.restore": "app:1"})
    assert found is not None
    assert found.bare
    spec = parse_spec({"process": {"args": ["serve"]}, "annotations": CONTAINERD})
    other = {**CONTAINERD, "io.kubernetes.cri.container-name": "sidecar"}
    assert pods.meant(image(("x",), CONTAINERD), spec, found)
    assert not pods.meant(image(("serve",), other), spec, found)
    assert pods.meant(image(("serve",), {}), spec, found)
    assert not pods.meant(image(("other",), {}), spec, found)


def test_a_forced_command_leaves_the_container_image_to_decide() -> None:
    """smr.command=force: the command cannot tell them apart."""
    found = asked({"smr.restore": "app:1", "smr.command": "force"})
    assert found is not None
    spec = parse_spec({"process": {"args": ["serve"]}, "annotations": CONTAINERD})
    assert pods.meant(image(("other",), {}, "localhost/app:1"), spec, found)
    assert not pods.meant(image(("other",), {}, "localhost/proxy:1"), spec, found)


def test_two_keys_for_one_container_are_told_when_it_restores() -> None:
    """So that the pod's fallback counts; the message names both."""
    found = asked({"smr.restore": "a:1", "smr.restore.server": "b:1"})
    assert found is not None
    with pytest.raises(SmrError, match=r"smr\.restore=a:1 and smr\.restore\.server=b:1") as caught:
        pods.check_keys(found)
    assert caught.value.code is Code.ANNOTATION_INVALID
    other = asked({"smr.restore": "a:1", "smr.restore.server": "b:1", "smr.container": "sidecar"})
    assert other is not None
    assert other.conflict == ""


@pytest.mark.parametrize("key", ["smr.restore.", "smr.restore.Server", "smr.restore.a.b", f"smr.restore.{'a' * 64}"])
def test_names_that_no_container_can_have(key: str) -> None:
    """An error in every container of the pod."""
    with pytest.raises(SmrError, match="is not the name of a container"):
        asked({key: "app"}, "sidecar")


@pytest.mark.parametrize("key", ["smr.restore.server", "smr.container"])
def test_names_outside_of_a_pod(key: str) -> None:
    """podman and ctr have no containers of containers."""
    with pytest.raises(SmrError, match="this container is in none"):
        parse({key: "app", "smr.restore": "app"})


@pytest.mark.parametrize("key", ["smr.restore", "smr.restore.server"])
def test_an_empty_value_is_an_error(key: str) -> None:
    """Not a cold start without a word."""
    with pytest.raises(SmrError, match="not an image reference"):
        asked({key: ""})


def admit(tmp_path: Path, namespace: str = "shop", **settings: object) -> None:
    found = asked({"smr.restore": "app:1"})
    assert found is not None
    before = {**CONTAINERD, "io.kubernetes.cri.sandbox-namespace": namespace}
    config = Config(run=tmp_path / "run", **settings)  # type: ignore[arg-type]
    pods.admit(image(("serve",), before), found, tmp_path / "bundles/c1", config)


def test_images_of_another_namespace(tmp_path: Path) -> None:
    """They hold its secrets; the node's settings may share them."""
    with pytest.raises(SmrError, match="of namespace bank, this pod is of shop") as caught:
        admit(tmp_path, "bank")
    assert caught.value.code is Code.IMAGE_NAMESPACE
    admit(tmp_path, "bank", image_namespaces="any")
    admit(tmp_path)


def test_restores_that_end_early_are_counted(tmp_path: Path) -> None:
    """The limit is reached by restores alone that follow each other closely; after a while it is tried again."""
    (tmp_path / "bundles/s1").mkdir(parents=True)
    for _ in range(3):
        admit(tmp_path)
    for _ in range(2):
        with pytest.raises(SmrError, match="was restored 3 times") as caught:
            admit(tmp_path)
    assert caught.value.code is Code.RESTORE_GAVE_UP
    (file,) = (tmp_path / "run/pods").iterdir()
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "restored": time.clock_gettime(time.CLOCK_BOOTTIME) - 601}))
    admit(tmp_path)


def test_what_is_kept_of_a_pod_goes_after_it(tmp_path: Path) -> None:
    """With the sandbox's bundle; a damaged file too."""
    folder = tmp_path / "run/pods"
    folder.mkdir(parents=True)
    (folder / "u-0.server").write_text(json.dumps({"sandbox": str(tmp_path / "gone")}))
    (folder / "u-2.server").write_text("{")
    (tmp_path / "bundles/s1").mkdir(parents=True)
    admit(tmp_path)
    assert [file.name for file in folder.iterdir()] == ["u-1.server"]


def test_a_hostname_in_crius_image(tmp_path: Path) -> None:
    """The name changes, the domain stays; what is no such image is an error."""
    file = tmp_path / "utsns-11.img"
    message = b"\x0a\x06source\x12\x06(none)"
    file.write_bytes(struct.pack("<III", 0x54564319, 0x54473203, len(message)) + message)
    set_hostname(tmp_path, "web-0")
    changed = b"\x0a\x05web-0\x12\x06(none)"
    assert file.read_bytes() == struct.pack("<III", 0x54564319, 0x54473203, len(changed)) + changed
    file.write_bytes(b"short")
    with pytest.raises(SmrError, match="not CRIU's image"):
        set_hostname(tmp_path, "web-0")
