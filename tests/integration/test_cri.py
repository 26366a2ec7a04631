"""Pods through containerd's CRI, 1.6 and 2.x: what an annotation on a pod restores, and that the rest of the pod is as ever."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.command import eventually
from tests.integration.cri import EXITED, RUNNING, TOKEN_FOLDER, Cri, CriError, Pod, fetch

FAIL = {"smr.fallback": "fail"}
AT_ONCE = 3
# What depends on us alone need not be shown with each containerd.
newer = pytest.mark.parametrize("cri", ["cri_2"], indirect=True)
_images: dict[str, Image] = {}


@dataclass(frozen=True)
class Image:
    """A checkpoint of a pod's container `server`, made when /count had been asked `count` times."""

    name: str
    count: int
    boot: str


@pytest.fixture
def image(cri: Cri) -> Image:
    """An image for the tests here, made once for each containerd."""
    if cri.name not in _images:
        pod = cri.run_pod("source", volumes=["data"])
        cri.run_container(pod, "server", "workers", mounts=[("/data", "data")])
        cri.answers(pod)
        for _ in range(3):
            answer = cri.query(pod, "server", "count")
        cri.checkpoint_pod(pod, "server", "app:1")
        cri.remove_pod(pod)
        _images[cri.name] = Image("app:1", int(str(answer["count"])), str(answer["boot"]))
    return _images[cri.name]


def restored(cri: Cri, image: Image, name: str = "again", *, handler: str = "smr", memory_bytes: int = 0) -> Pod:
    """A pod whose container is restored."""
    pod = cri.run_pod(name, {"smr.restore": image.name, **FAIL}, handler=handler, volumes=["data"])
    cri.run_container(pod, "server", "workers", mounts=[("/data", "data")], memory_bytes=memory_bytes)
    return pod


def cold(cri: Cri, pod: Pod, name: str = "server") -> str:
    """Why a container has started cold: what its log says."""
    record = cri.node.records()[pod.containers[name]]
    assert record["status"] == "cold", record
    assert str(record["reason"]) in cri.pod_log(pod, name)
    return str(record["reason"])


@pytest.mark.parametrize(("cri", "handler"), [("cri_1", "smr"), ("cri_2", "smr"), ("cri_2", "")], indirect=["cri"])
def test_a_restored_pod_is_a_pod_like_any(cri: Cri, image: Image, handler: str) -> None:
    """Address, probes, exec, port-forward, names, volumes, token, limits, termination message, log and grace are the pod's."""
    pod = restored(cri, image, handler=handler, memory_bytes=256 << 20)
    assert cri.probe(pod, "count") == {"count": image.count + 1, "boot": image.boot}
    assert cri.forward(pod, "count") == {"count": image.count + 2, "boot": image.boot}
    assert cri.query(pod, "server", "workers")["values"] == [1, 101]
    assert cri.probe(pod, "hostname") == {"hostname": "again"}

    def read(path: str) -> str:
        return cri.exec_sync(pod, "server", "cat", path).stdout

    assert "hosts of again" in read("/etc/hosts")
    assert "10.96.0.10" in read("/etc/resolv.conf")
    assert read("/etc/hostname") == "again\n"
    assert read(f"{TOKEN_FOLDER}/token") == f"token of {pod.uid}\n"
    (pod.folder / "token/token").write_text("rotated\n")
    assert read(f"{TOKEN_FOLDER}/token") == "rotated\n"
    cri.exec_sync(pod, "server", "sh", "-c", "echo kept >/data/file; echo bye >/dev/termination-log")
    assert (pod.volumes["data"] / "file").read_text() == "kept\n"
    assert (pod.folder / "server-0-termination-log").read_text() == "bye\n"
    assert cri.exec_sync(pod, "server", "false", check=False).returncode == 1
    assert cri.memory_limit(pod, "server") == 256 << 20
    told = json.loads(read("/run/smr/restored.json"))
    assert (told["addresses"][0], told["environment"]["POD_NAME"]) == (pod.address, "again")
    assert "smr:" not in cri.pod_log(pod, "server")
    status = cri.stop_container(pod, "server")
    assert (status.state, status.exit_code) == (EXITED, 7)


@newer
def test_a_container_that_does_not_end_is_killed_after_its_grace(cri: Cri, image: Image) -> None:
    """SIGTERM first, SIGKILL when the grace is over."""
    pod = restored(cri, image)
    os.kill(cri.pid(pod.containers["server"]), signal.SIGSTOP)
    assert cri.stop_container(pod, "server", grace_s=1).exit_code == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("cri", "keys"),
    [
        ("cri_1", {"smr.restore": "app:1"}),
        ("cri_1", {"smr.restore.server": "app:1"}),
        ("cri_2", {"smr.restore": "app:1"}),
        ("cri_2", {"smr.restore": "app:1", "kubectl.kubernetes.io/default-container": "server"}),
    ],
    ids=["1.6-by-image", "1.6-by-name", "2.x-by-image", "2.x-default-container"],
    indirect=["cri"],
)
def test_one_of_a_pods_containers_is_restored(cri: Cri, image: Image, keys: dict[str, str]) -> None:
    """The application container; not the sandbox, not an init container of the same image, not a sidecar of the same image."""
    pod = cri.run_pod("again", {**keys, **FAIL}, volumes=["data"])
    cri.run_container(pod, "init", command=("sh", "-c", "echo ready"))
    assert eventually(lambda: cri.status(pod, "init").state == EXITED)
    cri.run_container(pod, "server", "workers", mounts=[("/data", "data")])
    cri.run_container(pod, "sidecar", "--port", "9000")
    assert cri.probe(pod, "count") == {"count": image.count + 1, "boot": image.boot}
    sidecar = cri.answers(pod, port=9000)
    assert (sidecar["count"], sidecar["boot"] != image.boot) == (0, True)
    assert set(cri.node.records()) == {pod.containers["server"]}
    assert cri.pod_log(pod, "init") == "ready\n"
    assert cri.pod_log(pod, "sidecar") == f"ready {sidecar['boot']}\n"


@newer
def test_two_keys_for_one_container(cri: Cri, image: Image) -> None:
    """The pod starts cold and says which keys; a pod that asked to fail does."""
    keys = {"smr.restore": "app:1", "smr.restore.server": "other:1"}
    pod = cri.run_pod("again", keys)
    cri.run_container(pod, "server", "workers")
    assert cri.answers(pod)["count"] == 0
    assert "two keys name an image for container server" in cold(cri, pod)
    pod = cri.run_pod("fails", {**keys, **FAIL})
    with pytest.raises(CriError, match="two keys name an image for container server"):
        cri.run_container(pod, "server", "workers")


@newer
def test_a_key_that_names_no_container(cri: Cri) -> None:
    """Told once the pod has had time to show its containers: in the journal, for its events and metrics. The pod is as ever."""
    with cri.node.setting(pod_names_wait_s=1):
        pod = cri.run_pod("again", {"smr.restore.serverr": "app:1"})
        cri.run_container(pod, "server")
        cri.run_container(pod, "sidecar", "--port", "9000")
        journal = cri.node.run_dir / "events/journal"
        said = eventually(lambda: [line for line in journal.read_text().splitlines() if "serverr" in line])
    assert len(said) == 1
    event = json.loads(said[0])
    assert (event["event"], event["code"], event["pod"]["name"]) == ("restore_failed", "annotation_invalid", "again")
    assert "had no container serverr within 1 s, but server, sidecar" in event["reason"]
    assert cri.answers(pod)["count"] == 0
    assert cri.pod_log(pod, "server").startswith("ready ")
    assert cri.node.records() == {}


@newer
def test_an_image_of_another_namespace(cri: Cri, image: Image) -> None:
    """Memory of one tenant is not another's: the pod starts cold and says so, unless the node's settings share images."""
    pod = cri.run_pod("theirs", {"smr.restore": image.name}, namespace="other", volumes=["data"])
    cri.run_container(pod, "server", "workers", mounts=[("/data", "data")])
    assert cri.answers(pod)["count"] == 0
    assert "made of a pod of namespace default, this pod is of other" in cold(cri, pod)
    with cri.node.setting(image_namespaces="any"):
        pod = cri.run_pod("shared", {"smr.restore": image.name, **FAIL}, namespace="other", volumes=["data"])
        cri.run_container(pod, "server", "workers", mounts=[("/data", "data")])
    assert cri.probe(pod, "count")["boot"] == image.boot


@newer
def test_a_node_that_cannot_restore(cri: Cri, image: Image, tmp_path: Path) -> None:
    """Where CRIU does not work the pod starts cold with the reason; a pod that asked to fail gets it from the engine."""
    broken = tmp_path / "criu"
    broken.write_text("#!/bin/sh\necho 'kernel lacks what is needed' >&2\nexit 1\n")
    broken.chmod(0o755)
    with cri.node.setting(criu=broken):
        pod = cri.run_pod("again", {"smr.restore": image.name}, volumes=["data"])
        cri.run_container(pod, "server", "workers", mounts=[("/data", "data")])
        assert cri.answers(pod)["count"] == 0
        assert str(broken) in cold(cri, pod)
        with pytest.raises(CriError, match=str(broken)):
            restored(cri, image, "fails")


@newer
def test_unknown_annotations_fail_the_container(cri: Cri) -> None:
    """A mistyped key is told by the engine, with the right one: a cold start without a word would be worse."""
    pod = cri.run_pod("again", {"smr.resotre": "app:1"})
    with pytest.raises(CriError, match=r"unknown annotation smr\.resotre \(did you mean smr\.restore\?\)"):
        cri.run_container(pod, "server", "workers")


@newer
def test_a_restarted_container_restores_again_until_it_gives_up(cri: Cri, image: Image) -> None:
    """A container that ends is restored in the same pod; when that has ended early three times, it starts cold."""
    pod = cri.run_pod("again", {"smr.restore": image.name}, volumes=["data"])
    for attempt in range(4):
        cri.run_container(pod, "server", "workers", mounts=[("/data", "data")])
        answer = cri.answers(pod)
        assert (answer["boot"] == image.boot) == (attempt < 3)
        if attempt < 3:
            os.kill(cri.pid(pod.containers["server"]), signal.SIGKILL)
            eventually(lambda: cri.status(pod, "server").state == EXITED)
            cri.remove_container(pod, "server")
    assert "was restored 3 times" in cold(cri, pod)


@pytest.mark.parametrize(("cri", "in_a_row"), [("cri_1", 2), ("cri_2", 6)], indirect=["cri"])
def test_pods_in_a_row_and_at_once(cri: Cri, image: Image, in_a_row: int) -> None:
    """Every one serves the checkpoint's state on an address of its own, and nothing of any of them is left."""
    for number in range(in_a_row):
        pod = restored(cri, image, f"row-{number}")
        assert cri.probe(pod, "count") == {"count": image.count + 1, "boot": image.boot}
        cri.remove_pod(pod)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        pods = list(pool.map(lambda number: restored(cri, image, f"once-{number}"), range(AT_ONCE)))
    assert len({cri.address(pod) for pod in pods}) == AT_ONCE
    for pod in pods:
        assert cri.probe(pod, "count") == {"count": image.count + 1, "boot": image.boot}


def test_containerd_is_killed_and_started_again(cri: Cri, image: Image) -> None:
    """Restored pods go on and are as before to the new daemon; a restore that was under way leaves nothing that stays."""
    pod = restored(cri, image)
    beside = cri.run_pod("beside", {"smr.restore": image.name, **FAIL}, volumes=["data"])
    cri.create_container(beside, "server", "workers", mounts=[("/data", "data")])
    with ThreadPoolExecutor(1) as pool:
        start = pool.submit(cri.start_container, beside, "server")
        eventually(lambda: beside.containers["server"] in cri.node.records() or start.done())
        cri.stop_daemon(signal.SIGKILL)
        with contextlib.suppress(CriError, ValueError):
            start.result()
    assert fetch(Path(f"/run/netns/{cri.netns}"), pod.address, 8000, "count") == {"count": image.count + 1, "boot": image.boot}
    cri.start_daemon()
    eventually(cri.network_ready)
    assert cri.status(pod, "server").state == RUNNING
    assert cri.query(pod, "server", "count") == {"count": image.count + 2, "boot": image.boot}
    cri.remove_pod(beside)
    again = restored(cri, image, "after")
    assert cri.probe(again, "count")["boot"] == image.boot
    for one in (pod, again):
        cri.remove_pod(one)

    def collected() -> bool:
        cri.node.smr("gc")
        return not (cri.node.run_dir / "containers/run").exists()

    eventually(collected, what="what a create has left that nobody waited for is collected")
