"""Two GPUs: a restore on the other one, one process on both, and NCCL's ranks with each kind of transport."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import cdi
from tests.gpu.container import GpuRunc, network
from tests.integration.command import eventually

pytestmark = pytest.mark.usefixtures("two_gpus")
WORDS = ("server", "--vram-gib", "2")
RANKS = ("--ranks", "2")
# What lets ranks be checkpointed as they are: no memory of another process or GPU is mapped. CRIU brings the connections back.
SOCKETS = ("NCCL_P2P_DISABLE=1", "NCCL_SHM_DISABLE=1", "NCCL_NVLS_ENABLE=0", "NCCL_IB_DISABLE=1", "NCCL_SOCKET_IFNAME=lo")
DEFAULT = ("NCCL_NVLS_ENABLE=0",)


@pytest.fixture
def image(runc: GpuRunc) -> Iterator[tuple[str, dict[str, object]]]:
    """A checkpoint of a server on GPU 0, and its answer."""
    runc.start("source", *WORDS)
    runc.ready("source")
    check = runc.ask("source", "check")
    runc.checkpoint("source", "gpu-zero:1")
    yield "gpu-zero:1", check
    runc.remove_all()
    runc.drop("gpu-zero:1")


def used_by(pid: int) -> set[str]:
    """UUIDs of the GPUs on which a process has memory."""
    import pynvml

    pynvml.nvmlInit()
    try:
        found = set()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            if any(process.pid == pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)):
                found.add(str(pynvml.nvmlDeviceGetUUID(handle)))
        return found
    finally:
        pynvml.nvmlShutdown()


def test_on_the_second_gpu_while_the_first_is_busy(runc: GpuRunc, image: tuple[str, dict[str, object]]) -> None:
    """A container that has only the second GPU gets the state there; the source works on the first meanwhile."""
    runc.restore("again", image[0], *WORDS, devices=("1",))
    assert runc.ask("source", "count")["count"] > 0
    assert runc.ask("again", "check") == image[1]
    assert runc.ask("source", "check") == image[1]
    assert used_by(runc.pid("again")) == {cdi.uuids()[1]}


def test_a_map_by_annotation(runc: GpuRunc, image: tuple[str, dict[str, object]]) -> None:
    """`smr.gpu.map` puts it on the second of the two GPUs that the container has, by UUID."""
    first, second = cdi.uuids()[:2]
    runc.restore("again", image[0], *WORDS, devices=("0", "1"), annotations={"smr.gpu.map": f"{first}={second}"})
    assert runc.ask("again", "check") == image[1]
    assert used_by(runc.pid("again")) == {second}


def test_the_container_is_told_which_gpu_it_got(runc: GpuRunc, image: tuple[str, dict[str, object]]) -> None:
    """/run/smr/restored.json names the old and the new GPU."""
    runc.restore("again", image[0], *WORDS, devices=("1",))
    first, second = cdi.uuids()[:2]
    text = eventually(lambda: runc.exec("again", "cat", "/run/smr/restored.json").stdout, what="restored.json")
    assert first in text
    assert second in text


def test_a_map_to_a_gpu_that_the_container_lacks_is_refused(runc: GpuRunc, image: tuple[str, dict[str, object]]) -> None:
    """Before anything is restored, with the UUID in the message."""
    first, second = cdi.uuids()[:2]
    annotations = {"smr.gpu.map": f"{first}={second}"}
    done = runc.restore("again", image[0], *WORDS, devices=("0",), annotations=annotations, check=False)
    assert done.returncode != 0
    assert second in done.stderr


def test_one_process_on_both(runc: GpuRunc) -> None:
    """Its memory on each is as before; with the GPUs in the other order, too."""
    words = (*WORDS, "--gpus", "2")
    runc.start("source", *words, devices=("0", "1"))
    runc.ready("source")
    check = runc.ask("source", "check")
    runc.checkpoint("source", "gpu-both:1")
    runc.remove("source")
    first, second = cdi.uuids()[:2]
    for mapping in ("auto", f"{first}={second},{second}={first}"):
        runc.restore("again", "gpu-both:1", *words, devices=("0", "1"), annotations={"smr.gpu.map": mapping})
        assert runc.ask("again", "check") == check
        runc.remove("again")
    done = runc.restore("again", "gpu-both:1", *words, devices=("1",), check=False)
    assert done.returncode != 0
    assert "GPU" in done.stderr
    runc.drop("gpu-both:1")


def test_ranks_over_sockets_survive(runc: GpuRunc, tmp_path: Path) -> None:
    """Two ranks reduce on after the checkpoint, and again in the restored container, over the connections they had."""
    more: dict[str, Any] = {"program": "ranks.py", "devices": ("0", "1"), "env": SOCKETS}
    with network(tmp_path / "before") as there:
        runc.start("source", *RANKS, edit=there, **more)
        runc.ready("source")
        check = runc.ask("source", "check")
        runc.checkpoint("source", "gpu-ranks:1", "--tcp", "established")
        assert runc.ask("source", "check") == check
        runc.remove("source")
    # In the runtime's own namespace `lo` would be down while CRIU connects sockets to each other.
    with network(tmp_path / "after") as there:
        runc.restore("again", "gpu-ranks:1", *RANKS, edit=there, annotations={"smr.tcp": "established"}, **more)
        assert runc.ask("again", "check") == check
        assert runc.ask("again", "count")["value"] == [check["value"][0]] * 2
        runc.remove("again")
    runc.drop("gpu-ranks:1")


def test_ranks_with_peer_to_peer_are_refused_before_anything_is_locked(runc: GpuRunc) -> None:
    """The message names the remedy, no image is made, and the ranks never waited: requests go on all the while."""
    runc.start("source", *RANKS, program="ranks.py", devices=("0", "1"), env=DEFAULT)
    runc.ready("source")
    check = runc.ask("source", "check")
    done = runc.checkpoint("source", "gpu-peer:1", "--tcp", "established", check=False)
    assert done.returncode == 4
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "gpu_unsupported"
    assert "NCCL" in error["message"] + error["hint"]
    assert runc.ask("source", "check") == check
    assert "gpu-peer" not in runc.node.smr("images", "ls").stdout


def test_hooks_tear_the_group_down_and_build_it_again(runc: GpuRunc) -> None:
    """A tensor-parallel server with default transports: /quiesce destroys the process group, /resume makes a new one."""
    hooks = {
        "smr.quiesce": "http://127.0.0.1:8000/quiesce",
        "smr.resume": "http://127.0.0.1:8000/resume",
        "smr.hook.timeout": "120",
    }
    more = {"program": "ranks.py", "devices": ("0", "1"), "env": DEFAULT}
    runc.start("source", *RANKS, annotations=hooks, **more)
    runc.ready("source")
    check = runc.ask("source", "check")
    runc.checkpoint("source", "gpu-tp:1")
    assert runc.ask("source", "check") == check
    assert runc.ask("source", "resume")["groups"] == [2, 2]
    runc.remove("source")
    runc.restore("again", "gpu-tp:1", *RANKS, annotations=hooks, **more)

    def resumed() -> bool:
        return bool(runc.ask("again", "check") == check)

    eventually(resumed, timeout_s=120, what="the ranks are a group again")
    assert runc.ask("again", "resume")["groups"] == [2, 2]
    runc.remove("again")
    runc.drop("gpu-tp:1")


def test_both_gpus_are_restored_at_the_same_time(runc: GpuRunc) -> None:
    """Two containers come back on a GPU each, at once, from one image."""
    runc.start("source", *WORDS)
    runc.ready("source")
    check = runc.ask("source", "check")
    runc.checkpoint("source", "gpu-one-each:1")
    runc.remove("source")
    annotations = {"smr.restore": "gpu-one-each:1", "smr.fallback": "fail"}
    import threading

    names = {"one": "0", "two": "1"}
    threads = [
        threading.Thread(target=runc.start, args=(name, *WORDS), kwargs={"devices": (device,), "annotations": annotations})
        for name, device in names.items()
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert [runc.ask(name, "check") for name in names] == [check, check]
    runc.remove_all()
    runc.drop("gpu-one-each:1")
