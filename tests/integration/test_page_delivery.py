"""The page strategies through the engines: the same state whichever way the pages came, and a clear end when they cannot come."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from smr.images.budget import Limits, fill_slot
from tests.integration.command import eventually
from tests.integration.conftest import Engine, Warm, make_warm
from tests.integration.podman import Podman
from tests.integration.runc import Runc
from tests.integration.sandbox import Sandbox

FAIL = {"smr.fallback": "fail"}
FEATURES = ("memory", "workers")
CRC = {"crc": 646947347}


@pytest.fixture(scope="module")
def image(podman: Podman) -> Warm:
    """An image most of whose memory is in segments."""
    warm = make_warm(podman, "pages:1", *FEATURES)
    inspected = json.loads(podman.node.smr("images", "inspect", warm.image, "--json").stdout)
    sizes: Counter[str] = Counter()
    for layer in inspected["layers"]:
        sizes[layer["mediaType"]] += layer["size"]
    assert sizes["application/vnd.smr.segment.v1"] > 4 << 20  # 64 MiB, most of it the same
    assert sizes["application/vnd.smr.criu.pages.v1"] < 32 << 20
    return warm


def start(podman: Podman, warm: Warm, *options: str, **annotations: str) -> None:
    """A restore that must not become a cold start."""
    podman.start("again", *warm.features, options=options, annotations={"smr.restore": warm.image, **FAIL, **annotations})


@pytest.mark.parametrize("pages", ["auto", "fill", "lazy", "criu"])
def test_memory_is_the_same_whichever_way_it_came(podman: Podman, image: Warm, pages: str) -> None:
    """64 MiB of patterned memory, counters of forked children, and the counter of the server."""
    start(podman, image, **{"smr.pages": pages})
    record = eventually(lambda: podman.node.only_record("restored"), what="the record")
    assert record["pages"]["strategy"] == {"auto": "fill"}.get(pages, pages)
    assert podman.ask("again", "memory") == CRC
    assert podman.ask("again", "workers")["values"] == [3, 103]
    assert podman.ask("again", "count") == {"count": image.count + 1, "boot": image.boot}


def test_a_restored_container_is_checkpointed_again(podman: Podman, image: Warm) -> None:
    """Memory that was filled is dumped as any other, and the image of it restores."""
    start(podman, image)
    podman.ask("again", "count")
    podman.checkpoint("again", "pages-again:1")
    podman.remove("again")
    podman.start("third", *image.features, annotations={"smr.restore": "pages-again:1", **FAIL})
    assert podman.ask("third", "memory") == CRC
    assert podman.ask("third", "count") == {"count": image.count + 2, "boot": image.boot}


def test_compressed_pages(podman: Podman) -> None:
    """--compress makes a smaller image of the same container, and the state is the same."""
    podman.start("source", *FEATURES)
    boot = podman.ready("source")["boot"]
    podman.checkpoint("source", "raw:1")
    podman.checkpoint("source", "small:1", "--compress")
    podman.remove("source")
    sizes = [
        json.loads(podman.node.smr("images", "inspect", name, "--json").stdout)["size_bytes"] for name in ("raw:1", "small:1")
    ]
    assert sizes[1] < sizes[0] / 2
    podman.start("again", *FEATURES, annotations={"smr.restore": "small:1", **FAIL})
    assert podman.ask("again", "memory") == CRC
    assert podman.ask("again", "count") == {"count": 1, "boot": boot}


def test_a_memory_limit_below_the_image_is_said_before_the_kernel_kills(podman: Podman, image: Warm) -> None:
    """The container does not start; nothing was killed for memory, and the message names both sizes."""
    done = podman(
        *("run", "-d", "--name=again", f"--cgroup-parent={podman.parent}", *podman.network, "--memory=40m"),
        *(f"--annotation=smr.restore={image.image}", "--annotation=smr.fallback=fail", "localhost/smr-test:1"),
        *("python3", "/app/workload.py", *image.features),
        check=False,
    )
    assert done.returncode != 0
    assert "memory limit leaves" in done.stderr
    assert "raise the container's memory limit" in done.stderr


def test_a_cut_segment_starts_cold(podman: Podman) -> None:
    """A segment that lost its end is found before anything is restored; the container starts cold and says why."""
    warm = make_warm(podman, "cut:1", *FEATURES)
    inspected = json.loads(podman.node.smr("images", "inspect", warm.image, "--json").stdout)
    segment = next(layer for layer in inspected["layers"] if layer["mediaType"] == "application/vnd.smr.segment.v1")
    path = Path(segment["path"])
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.truncate(segment["size"] - 4096)
    podman.start("again", *warm.features, annotations={"smr.restore": warm.image})
    assert podman.ready("again")["boot"] != warm.boot
    record = podman.node.only_record("cold")
    assert "is damaged" in record["reason"]
    podman.node.smr("images", "rm", warm.image)


@pytest.fixture(scope="module")
def bundle_image(restoring_runc: Runc) -> Iterator[Warm]:
    """As `image`, of a runtime driven by hand."""
    yield make_warm(restoring_runc, "pages:1", *FEATURES)


def test_killed_in_the_fill(restoring_runc: Runc, bundle_image: Warm, box: Sandbox) -> None:
    """kill -9 when the tree exists and waits for its pages, and while they come: nothing is left, and the next restore works."""
    runc, before, statuses = restoring_runc, box.snapshot(), []
    command = ("python3", "/app/workload.py", *FEATURES)
    for moment in range(8):
        folder = runc.bundle("again", *command, annotations={"smr.restore": bundle_image.image, **FAIL})
        argv = [*runc.smr, "create", "--bundle", str(folder), "again"]
        with ExitStack() as stack:
            output = stack.enter_context(runc.output(folder))
            slots = stack.enter_context(ExitStack())
            for _ in range(Limits().fills):  # no place is left for the fill, so it waits
                slots.enter_context(fill_slot(runc.node.run_dir, 4096))
            process = stack.enter_context(
                subprocess.Popen(argv, env=runc.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            )
            eventually(lambda: _filling(runc), timeout_s=20, what="the fill begins")
            assert process.poll() is None
            if moment:
                slots.close()
                time.sleep((moment - 1) * 0.003)
            process.send_signal(signal.SIGKILL)
            statuses.append(process.wait())
        runc("delete", "--force", "again", check=False)
        runc.remove("again")
        eventually(lambda: not box.snapshot().left_since(before), timeout_s=15, what=f"clean after moment {moment}")
    assert statuses[:2] == [-signal.SIGKILL, -signal.SIGKILL]
    runc.start("again", *FEATURES, annotations={"smr.restore": bundle_image.image, **FAIL})
    assert runc.ask("again", "memory") == CRC


def _filling(runc: Runc) -> bool:
    """Whether a create of this node has come to its fill."""
    return any(record["stages"] and record["stages"][-1]["name"] == "mounts" for record in runc.node.records().values())


@pytest.mark.parametrize("pages", ["fill", "lazy", "criu"])
def test_every_engine(engine: Engine, warm: Warm, pages: str) -> None:
    """podman and both containerds, each with an image of its own."""
    engine.start("again", *warm.features, annotations={"smr.restore": warm.image, **FAIL, "smr.pages": pages})
    assert engine.ask("again", "memory") == CRC
    assert engine.ask("again", "count") == {"count": warm.count + 1, "boot": warm.boot}
