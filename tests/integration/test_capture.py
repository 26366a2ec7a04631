"""Automatic capture: the first pod that comes up cold becomes the image of all that follow, by an annotation alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.command import eventually, run
from tests.integration.cri import EXITED, Cri, CriError, Pod
from tests.integration.podman import Podman

newer = pytest.mark.parametrize("cri", ["cri_2"], indirect=True)
READY = {"smr.capture.ready": "http://:8000/look"}


def serve(cri: Cri, name: str, annotations: dict[str, str], *workload: str, namespace: str = "default") -> Pod:
    """A pod with one container that answers."""
    pod = cri.run_pod(name, annotations, namespace=namespace)
    cri.run_container(pod, "server", *workload)
    cri.answers(pod)
    return pod


def record(cri: Cri, pod: Pod, name: str = "server") -> dict[str, object]:
    return cri.node.records()[pod.containers[name]]


def captured(cri: Cri, pod: Pod, name: str = "server") -> str:
    """The image that was made of a pod's container."""

    def made() -> str:
        said = str(record(cri, pod, name)["capture"])
        assert not said.startswith(("gave up", "failed")), said
        return said.removeprefix("made ") if said.startswith("made ") else ""

    return eventually(made, what="the capture")


def gave_up(cri: Cri, pod: Pod, name: str = "server") -> str:
    """Why there is no capture; it is in the journal of events too, with the pod."""

    def said() -> str:
        found = str(record(cri, pod, name)["capture"])
        return found if found.startswith(("gave up", "failed")) else ""

    why = eventually(said, what="the watcher gives up")
    lines = (cri.node.run_dir / "events/journal").read_text().splitlines()
    events = [json.loads(line) for line in lines if pod.containers[name] in line]
    assert any(event["event"] == "checkpoint_failed" and event["pod"]["name"] == pod.name for event in events), events
    return why


@contextlib.contextmanager
def under_load(cri: Cri, pod: Pod) -> Iterator[list[dict[str, object]]]:
    """Ask for /count, one request after the other, all the while; gives the answers. A request that fails fails the test."""
    answers: list[dict[str, object]] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            answers.append(cri.probe(pod, "count"))

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield answers
        finally:
            over.set()
        asking.result()


def drop_images(cri: Cri) -> None:
    for image in json.loads(cri.node.smr("images", "ls", "--json").stdout):
        cri.node.smr("images", "rm", "--force", image["digest"], check=False)


@newer
def test_the_first_replica_makes_the_image_of_the_next(cri: Cri) -> None:
    """The same pod is cold, and captured under load; then restored. It asked to fail: not yet captured is no failure."""
    keys = {"smr.restore": "fleet", "smr.capture": "fleet", "smr.fallback": "fail", **READY}
    first = serve(cri, "first", keys, "workers")
    with under_load(cri, first) as answers:
        image = captured(cri, first)
    assert len(answers) > 1
    assert [answer["count"] for answer in answers] == list(range(1, len(answers) + 1))
    assert image.startswith("fleet:k")
    answer = cri.probe(first, "count")
    boot = answer["boot"]
    assert "no image fleet:latest" in cri.pod_log(first, "server")
    second = cri.run_pod("second", keys)
    cri.run_container(second, "server", "workers")
    assert cri.probe(second)["boot"] == boot
    assert (record(cri, second)["image"], record(cri, second)["capture"]) == (image, "")
    other = serve(cri, "other", keys, "workers", namespace="another")
    assert cri.probe(other)["boot"] != boot
    assert captured(cri, other) not in {"", image}
    drop_images(cri)


@newer
def test_two_captures_of_one_key_at_once(cri: Cri) -> None:
    """Of three replicas that come up together one is captured; the others find its image."""
    keys = {"smr.restore": "auto", "smr.capture": "auto", **READY}
    with ThreadPoolExecutor(3) as pool:
        pods = list(pool.map(lambda number: serve(cri, f"replica-{number}", keys, "workers"), range(3)))

    def said() -> list[str]:
        found = sorted(str(record(cri, pod)["capture"]).split()[0] for pod in pods)
        return found if "waits" not in found and "makes" not in found else []

    assert eventually(said) == ["found", "found", "made"]
    (image,) = json.loads(cri.node.smr("images", "ls", "--json").stdout)
    assert image["name"] == "auto/default/server"
    assert list((cri.node.run_dir / "captures").iterdir()) == []
    for pod in pods:
        assert cri.probe(pod)["count"] == 0
    drop_images(cri)


@newer
def test_a_container_that_never_gets_ready(cri: Cri) -> None:
    """The node gives up, says what it waited for, and leaves the container alone."""
    keys = {"smr.capture": "never", "smr.capture.ready": "http://:8000/nothing", "smr.capture.timeout": "1"}
    pod = serve(cri, "unready", keys)
    assert "was not ready within 1 s: http://127.0.0.1:8000/nothing answers 500" in gave_up(cri, pod)
    assert cri.probe(pod)["count"] == 0


@newer
def test_nobody_waits_beside_a_container_that_has_ended(cri: Cri) -> None:
    """The waiting process goes with its container."""
    pod = cri.run_pod("short", {"smr.capture": "short", "smr.capture.after": "600"})
    cri.run_container(pod, "server")
    cri.answers(pod)
    watchers = [pid for pid, command in cri.box.processes() if "smr.shim.capture" in command]
    assert len(watchers) == 1
    os.kill(cri.pid(pod.containers["server"]), signal.SIGKILL)
    eventually(lambda: cri.status(pod, "server").state == EXITED)
    eventually(lambda: not Path(f"/proc/{watchers[0]}").exists(), what="the watcher has ended")


@newer
def test_the_application_of_a_pod_is_captured(cri: Cri) -> None:
    """The one that owns the port; not the sidecar that shares its network, nor the init container that lives long before."""
    pod = cri.run_pod("several", {"smr.restore": "several", "smr.capture": "several", **READY, "smr.capture.timeout": "20"})
    cri.run_container(pod, "init", command=("sh", "-c", "sleep 1"))
    eventually(lambda: cri.status(pod, "init").state == EXITED)
    cri.run_container(pod, "sidecar", "--port", "9000")
    cri.run_container(pod, "server")
    cri.answers(pod)
    image = captured(cri, pod)
    assert "does not listen on port 8000" in gave_up(cri, pod, "sidecar")
    facts = json.loads(cri.node.smr("images", "inspect", image, "--json").stdout)
    assert "sidecar" not in json.dumps(facts["config"]["source"])
    drop_images(cri)


@newer
def test_where_nothing_tells_which_container_is_meant(cri: Cri) -> None:
    """Two containers and a mere time: neither is captured, and the reason says what to write. A name decides."""
    keys = {"smr.capture": "which"}
    pod = cri.run_pod("two", {**keys, "smr.capture.after": "5"})
    cri.run_container(pod, "server")
    cri.run_container(pod, "sidecar", "--port", "9000")
    assert "sidecar run in it too" in gave_up(cri, pod)
    assert "server run in it too" in gave_up(cri, pod, "sidecar")
    cri.remove_pod(pod)
    pod = cri.run_pod("named", {**keys, "smr.container": "sidecar"})
    cri.run_container(pod, "server")
    cri.run_container(pod, "sidecar", "--port", "9000")
    assert captured(cri, pod, "sidecar").startswith("which:k")
    assert pod.containers["server"] not in cri.node.records()
    drop_images(cri)


@newer
@pytest.mark.parametrize(("share", "message"), [(0.15, "would leave less than"), (0, "o space left")], ids=["foreseen", "met"])
def test_a_full_disk(cri: Cri, share: float, message: str) -> None:
    """A capture does not fill the disk, and says so; where it may try, it fails with the reason. The pod serves on."""
    small = cri.path / "small"
    small.mkdir(exist_ok=True)
    run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", small])
    try:
        with cri.node.setting(store=small / "store", capture_free_share=share):
            pod = serve(cri, "full", {"smr.capture": "full", **READY}, "memory")
            assert message in gave_up(cri, pod)
            assert cri.probe(pod, "memory") == {"crc": 646947347}
            cri.remove_pod(pod)
        assert list((small / "store").glob("ingest/*/*")) == []
    finally:
        run(["umount", "-l", small])


@newer
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"smr.capture": "a:1"}, "needed a name in lower case and no tag"),
        ({"smr.capture.after": "5"}, "nothing names the image to make"),
        ({"smr.capture": "a", "smr.capture.ready": "ftp://x"}, "smr.capture.ready"),
        ({"smr.capture": "a", "smr.capture.after": "soon"}, "not a number of seconds"),
    ],
)
def test_wrong_annotations(cri: Cri, keys: dict[str, str], message: str) -> None:
    """They fail the container, as all wrong annotations do."""
    pod = cri.run_pod("wrong", keys)
    with pytest.raises(CriError, match=message):
        cri.run_container(pod, "server")


def test_without_kubernetes(podman: Podman) -> None:
    """The same annotations do the same under podman: the second container is the first, restored."""
    keys = {"smr.restore": "solo", "smr.capture": "solo"}
    podman.start("first", annotations=keys)
    boot = podman.ready("first")["boot"]
    (known,) = podman.node.records().values()
    eventually(lambda: str(podman.node.records()[str(known["id"])]["capture"]).startswith("made "), what="the capture")
    podman.start("second", annotations=keys)
    assert podman.ask("second", "look")["boot"] == boot
