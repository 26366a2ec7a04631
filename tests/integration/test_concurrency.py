"""Many at once: restores of one image, checkpoints of one container, and an image removed while it is read."""

from __future__ import annotations

import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from tests.integration.command import eventually
from tests.integration.conftest import Engine, Warm, make_warm
from tests.integration.podman import Podman

FAIL = {"smr.fallback": "fail"}
MANY = 10


def test_ten_restores_at_once(engine: Engine, warm: Warm) -> None:
    """Ten containers from one image, started together, each with the checkpoint's state and a life of its own."""
    names = [f"c{number}" for number in range(MANY)]
    with ThreadPoolExecutor(MANY) as pool:
        list(pool.map(lambda name: engine.start(name, *warm.features, annotations={"smr.restore": warm.image, **FAIL}), names))
    for number, name in enumerate(names):
        for _ in range(number + 1):
            answer = engine.ask(name, "count")
        assert answer == {"count": warm.count + number + 1, "boot": warm.boot}
    everything = {"restored": MANY}
    eventually(
        lambda: Counter(record["status"] for record in engine.node.records().values()) == everything, what="all are recorded"
    )


def test_two_checkpoints_of_one_container(podman: Podman) -> None:
    """Each gives a whole image or an error that says that the container is busy; the container serves on."""
    podman.start("source", "workers")
    boot = podman.ready("source")["boot"]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda name: podman.checkpoint("source", name, check=False), ["left:1", "right:1"]))
    assert any(one.returncode == 0 for one in done), [one.stderr for one in done]
    assert eventually(lambda: podman.ask("source", "count"), what="it serves") == {"count": 1, "boot": boot}
    podman.remove("source")
    for one, name in zip(done, ["left:1", "right:1"], strict=True):
        if one.returncode != 0:
            assert one.stderr.startswith("smr:")
            continue
        podman.node.smr("images", "verify", name)
        podman.start("again", "workers", annotations={"smr.restore": name, **FAIL})
        assert podman.ask("again", "count") == {"count": 1, "boot": boot}
        podman.remove("again")


def test_an_image_is_removed_while_it_is_restored(podman: Podman) -> None:
    """rm during a restore is refused, or comes before or after it; never does a container come up half."""
    make_warm(podman, "short:1", "memory")
    annotations = {"smr.restore": "short:1", **FAIL}
    with ThreadPoolExecutor(1) as pool:
        restore = pool.submit(lambda: podman.start("again", "memory", annotations=annotations, check=False))
        removed = False
        while not removed and not restore.done():
            removed = podman.node.smr("images", "rm", "short:1", check=False).returncode == 0
        done = restore.result()
    if done.returncode == 0:
        assert podman.ask("again", "memory") == {"crc": 646947347}
    else:
        assert "short:1" in done.stderr
    podman.node.smr("images", "rm", "--force", "short:1", check=False)
    podman.node.smr("gc")


def test_a_checkpoint_beside_restores(podman: Podman, podman_warm: Warm) -> None:
    """While containers are restored, another is checkpointed, and the store is collected."""
    podman.start("source", "workers")
    podman.ready("source")
    with ThreadPoolExecutor(4) as pool:
        starts = [
            pool.submit(podman.start, f"c{number}", *podman_warm.features, annotations={"smr.restore": podman_warm.image, **FAIL})
            for number in range(3)
        ]
        image = pool.submit(podman.checkpoint, "source", "beside:1")
        for _ in range(5):
            podman.node.smr("gc")
        for one in starts:
            one.result()
        image.result()
    for number in range(3):
        assert podman.ask(f"c{number}", "count") == {"count": podman_warm.count + 1, "boot": podman_warm.boot}
    podman.node.smr("images", "verify", "beside:1")


def test_another_reader_does_not_delay_a_restore_for_ever(podman: Podman, podman_warm: Warm) -> None:
    """`smr images verify` reads the image while it is restored; both succeed."""
    argv = [str(podman.node.bin / "smr"), "images", "verify", podman_warm.image]
    with subprocess.Popen(argv, env=podman.env, stdout=subprocess.DEVNULL) as verify:
        podman.start("again", *podman_warm.features, annotations={"smr.restore": podman_warm.image, **FAIL})
        assert verify.wait(60) == 0
    assert podman.ask("again", "count")["count"] == podman_warm.count + 1
