"""What containerd users do with a restored container, on 1.6 and 2.x: shim names, metrics, stdio, its own checkpoint verb."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.integration import testimage
from tests.integration.conftest import Warm, make_warm
from tests.integration.containerd import Containerd
from tests.integration.terminal import converse, on_terminal

FAIL = {"smr.fallback": "fail"}
_images: dict[str, Warm] = {}


@pytest.fixture
def image(containerd: Containerd) -> Warm:
    """An image for the tests here, made once for each containerd."""
    if containerd.name not in _images:
        _images[containerd.name] = make_warm(containerd, "containerd-warm:1", "workers", "shm")
    return _images[containerd.name]


def again(containerd: Containerd, image: Warm, *options: str, runtime: str = "io.containerd.smr.v2") -> None:
    """A container restored from `image`."""
    containerd.start("again", *image.features, options=options, runtime=runtime, annotations={"smr.restore": image.image, **FAIL})


@pytest.mark.parametrize("runtime", ["io.containerd.smr.v1", "io.containerd.smr.v2"])
def test_both_names_of_the_shim(containerd: Containerd, image: Warm, runtime: str) -> None:
    """The runtime can be named io.containerd.smr.v1 and .v2."""
    again(containerd, image, runtime=runtime)
    assert containerd.ask("again", "count") == {"count": image.count + 1, "boot": image.boot}


def test_the_stock_shim_does_not_restore(containerd: Containerd, image: Warm) -> None:
    """Without our shim the annotation means nothing: the container starts as usual, in a new state."""
    containerd.start("again", *image.features, runtime="io.containerd.runc.v2", annotations={"smr.restore": image.image, **FAIL})
    assert containerd.ready("again")["boot"] != image.boot
    assert containerd.node.records() == {}


def test_task_list_processes_and_metrics(containerd: Containerd, image: Warm) -> None:
    """containerd sees the restored task as any other: its pid, its processes, its memory."""
    again(containerd, image)
    pid, status = containerd.tasks()["again"]
    assert status == "RUNNING"
    pids = {int(line.split()[0]) for line in containerd("task", "ps", "again").stdout.splitlines()[1:]}
    assert pid in pids
    assert len(pids) == 4
    memory = json.loads(containerd("task", "metrics", "--format", "json", "again").stdout)["memory"]
    usage = memory.get("usage", memory.get("Usage"))  # a number on cgroup v2, numbers on v1
    assert int(usage["usage"] if isinstance(usage, dict) else usage) > 0


def test_pause_and_resume(containerd: Containerd, image: Warm) -> None:
    """The freezer of the new container's cgroup holds the restored processes."""
    again(containerd, image)
    containerd("task", "pause", "again")
    assert containerd.tasks()["again"][1] == "PAUSED"
    containerd("task", "resume", "again")
    assert containerd.ask("again", "count")["count"] == image.count + 1


def test_run_in_the_foreground(containerd: Containerd) -> None:
    """`ctr run` without -d prints the restored container's output and ends with its exit code."""
    containerd.start("source", "--log", "--exit", "9")
    make_warm(containerd, "foreground:1", "--log", "--exit", "9", start=False)
    argv = _foreground(containerd, "foreground:1", "--log", "--exit", "9")
    with subprocess.Popen(argv, env=containerd.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("line ")
        containerd.kill("again", "TERM")
        assert "ready" not in process.stdout.read()
    assert process.returncode == 9


def test_a_terminal(containerd: Containerd) -> None:
    """A container with a terminal is restored with a new one, and speaks through it."""
    boot = ""
    for name, image in (("source", ""), ("again", "terminal:1")):
        argv = _foreground(containerd, image, "--stdin", name=name, terminal=True)
        with on_terminal(argv, containerd.env, ends=True) as fd:
            answer = containerd.ready(name)
            converse(fd, "hello\n", "echo: hello")
            if name == "source":
                boot = str(answer["boot"])
                containerd.checkpoint("source", "terminal:1")
            assert answer["boot"] == boot
            containerd.kill(name)
        containerd.remove(name)


def _foreground(containerd: Containerd, image: str, *workload: str, name: str = "again", terminal: bool = False) -> list[str]:
    """A `ctr run` that stays; restored from `image` where one is named."""
    annotations = ["--annotation", f"smr.restore={image}", "--annotation", "smr.fallback=fail"] if image else []
    words = ["run", "--runtime", "io.containerd.smr.v2", *annotations, *(["-t"] if terminal else [])]
    return [containerd.ctr, *words, testimage.NAME, name, "python3", "/app/workload.py", *workload]


def test_the_hosts_network(containerd: Containerd) -> None:
    """With --net-host the server listens on the host again."""
    containerd.start("source", "--port", "18997", options=["--net-host"])
    boot = containerd.ready("source", port=18997)["boot"]
    containerd.checkpoint("source", "host:1")
    containerd.remove("source")
    annotations = {"smr.restore": "host:1", **FAIL}
    containerd.start("again", "--port", "18997", options=["--net-host"], annotations=annotations)
    assert containerd.ask("again", "count", port=18997) == {"count": 1, "boot": boot}


def test_a_memory_limit(containerd: Containerd, image: Warm) -> None:
    """The memory limit of the new container is in force."""
    again(containerd, image, "--memory-limit", str(200 << 20))
    limits = [Path("/sys/fs/cgroup/memory") / containerd.namespace / "again/memory.limit_in_bytes"]
    limits.append(Path("/sys/fs/cgroup") / containerd.namespace / "again/memory.max")
    (limit,) = [path for path in limits if path.exists()]
    assert limit.read_text().strip() == str(200 << 20)
    pids = {int(line) for line in (limit.parent / "cgroup.procs").read_text().split()}
    assert containerd.pid("again") in pids


def test_seccomp_is_on(containerd: Containerd) -> None:
    """A container with the default seccomp profile is restored under it."""
    containerd.start("source", options=["--seccomp"])
    warm = make_warm(containerd, "seccomp:1", start=False)
    again(containerd, warm, "--seccomp")
    assert "Seccomp:\t2" in Path(f"/proc/{containerd.pid('again')}/status").read_text()
    assert containerd.ask("again", "count")["boot"] == warm.boot


def test_containerds_own_checkpoint_verb(containerd: Containerd, tmp_path: Path) -> None:
    """`ctr tasks checkpoint` on our shim writes CRIU's images, with SMR's CRIU, and the container runs on."""
    containerd.start("source", "workers")
    boot = containerd.ready("source")["boot"]
    folder = tmp_path / "images"
    containerd("task", "checkpoint", "--image-path", folder, "source")
    if containerd.name == "containerd-1.6":
        # Its client knows --image-path for runtimes of its own names only, and makes an image otherwise.
        (name,) = [line.split()[0] for line in containerd("images", "ls").stdout.splitlines() if "/checkpoint/source" in line]
        containerd("images", "rm", name)
    else:
        assert (folder / "inventory.img").exists()
        assert list(folder.glob("pages-*.img"))
    assert containerd.ask("source", "count")["boot"] == boot
