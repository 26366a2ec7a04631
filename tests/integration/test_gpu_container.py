"""Checkpoint and restore of containers with a GPU, the whole path, with a fake driver (tests/integration/gpu_node.py)."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from smr.proto.errors import Code
from tests.integration.command import eventually
from tests.integration.conftest import Machine
from tests.integration.gpu_node import (
    CHECKPOINTED,
    COLD,
    FAIL,
    FIRST,
    LOCKED,
    RUNNING,
    SECOND,
    THIRD,
    UUIDS,
    VRAM_BYTES,
    Counts,
    Gpu,
    GpuNode,
    alive,
    stopped,
)

_NOTE = "exec:sh -c 'echo {} $(cat /fake-cuda/1.state) >>/fake-cuda/hooks; cat /fake-cuda/1.counts >/fake-cuda/then'"
HOOKS = ("--quiesce", _NOTE.format("quiesce"), "--resume", _NOTE.format("resume"))


@pytest.fixture(scope="module")
def node(machine: Machine, lower: Path) -> Iterator[GpuNode]:
    """One for all tests here."""
    made = GpuNode(machine, lower)
    with made.loaded():
        yield made


@pytest.fixture(autouse=True)
def fresh(node: GpuNode) -> Iterator[None]:
    """No faults of the test before; no container afterwards."""
    node.reset()
    yield
    node.mend()
    node.runc.remove_all()


@pytest.fixture(scope="module")
def image(node: GpuNode) -> str:
    """One image for the tests that only restore: of GPU FIRST, with hooks."""
    node.reset()
    node.start("source")
    node.runc.exec("source", "sh", "-c", "echo changed >/etc/marker; echo new >/app/new; rm /etc/group; mkdir /run/mine")
    node.checkpoint("gpu:1", *HOOKS)
    node.runc.remove("source")
    return "gpu:1"


def test_a_checkpoint_leaves_it_running(node: GpuNode) -> None:
    """Quiesce, lock, checkpoint, dump, restore, unlock, resume: then it goes on, and nothing of it was lost."""
    pid = node.start()
    boot = node.counts(pid).boot
    told = json.loads(node.checkpoint("goes-on:1", *HOOKS, "--json").stdout)
    assert [name for name in told["stages_s"] if name in {"quiesce", "gpu", "dump", "gpu_back", "resume"}] == [
        "quiesce", "gpu", "dump", "gpu_back", "resume",
    ]  # fmt: skip
    assert told["warnings"] == []
    assert [call for call, _, what in node.calls() if what == "end"] == ["lock", "checkpoint", "restore", "unlock"]
    assert node.text(pid, "hooks") == "quiesce 0\nresume 0\n"
    node.serves(pid)
    counts = node.counts(pid)
    assert (counts.boot, counts.checkpoints, counts.restores, counts.unlocks) == (boot, 1, 1, 1)
    assert node.minors(pid) == [FIRST]


def test_a_restore_has_its_gpu_back_before_start(node: GpuNode, image: str) -> None:
    """After create: GPU memory and device files are back and nothing has run; start lets it run, then the resume hook."""
    node.create(image)
    pid = node.runc.pid("again")
    assert node.state(pid) == RUNNING
    assert stopped(pid)
    counts = node.counts(pid)
    assert (counts.checkpoints, counts.restores, counts.unlocks, counts.bad) == (1, 1, 1, 0)
    assert counts.ticks == counts.ticks_at_restore
    assert node.text(pid, "hooks") == "quiesce 0\n"
    node.runc("start", "again")
    node.serves(pid)
    eventually(lambda: node.text(pid, "hooks") == "quiesce 0\nresume 0\n", what="the resume hook")
    assert Counts.read(Path(f"/proc/{pid}/root/fake-cuda/then")).ticks >= counts.ticks
    assert node.minors(pid) == [FIRST]


def test_a_restore_on_another_gpu(node: GpuNode, image: str) -> None:
    """The driver gets the pairs of the map; the device node is the new spec's; the container can read what became what."""
    pid = node.restore(image, gpus=(SECOND,))
    node.serves(pid)
    assert node.open_devices(pid) == ["/dev/nvidia-uvm", f"/dev/nvidia{SECOND}", "/dev/nvidiactl"]
    assert not Path(f"/proc/{pid}/root/dev/nvidia{FIRST}").exists()
    old, new = UUIDS[FIRST], UUIDS[SECOND]
    assert node.text(pid, "1.pairs") == "".join(uuid.removeprefix("GPU-").replace("-", "") for uuid in (old, new))
    restored = json.loads(Path(f"/proc/{pid}/root/run/smr/restored.json").read_text())
    assert restored["gpus"] == {old: new}
    record = json.loads(node.node.smr("inspect", "again", "--json").stdout)
    assert record["gpus"] == {old: new}
    at = {stage["name"]: (stage["start_s"], stage["end_s"]) for stage in record["stages"]}
    assert at["gpu_check"][1] <= at["create"][0]
    for name in ("fill", "gpu"):  # these two go on beside each other
        assert at["create"][1] <= at[name][0]
        assert at[name][1] <= at["adopt"][0] <= at["start"][0]


def test_a_map_by_annotation(node: GpuNode) -> None:
    """smr.gpu.map decides; both GPUs of the checkpoint are in the pairs."""
    node.start(gpus=(FIRST, SECOND))
    node.checkpoint("map:1")
    node.runc.remove("source")
    node.create("map:1", gpus=(FIRST, SECOND), annotations={**FAIL, "smr.gpu.map": "0=1,1=0"})
    pid = node.runc.pid("again")
    first, second = (UUIDS[minor].removeprefix("GPU-").replace("-", "") for minor in (FIRST, SECOND))
    assert node.text(pid, "1.pairs") == f"{first}{second}{second}{first}"
    node.runc("start", "again")
    node.serves(pid)


def test_ten_restores_of_one_image(node: GpuNode, image: str) -> None:
    """Each begins where the checkpoint was, on one GPU or another; the last as the first."""
    found = set()
    for number in range(10):
        pid = node.restore(image, gpus=((FIRST,), (SECOND,), (THIRD, SECOND))[number % 3])
        node.serves(pid)
        counts = node.counts(pid)
        found.add((counts.boot, counts.ticks_at_restore, counts.checkpoints, counts.restores, counts.unlocks))
        node.runc.remove("again")
    assert len(found) == 1


def stages(node: GpuNode) -> dict[str, tuple[float, float]]:
    """When each stage of the restore of "again" began and ended."""
    record = json.loads(node.node.smr("inspect", "again", "--json").stdout)
    return {stage["name"]: (stage["start_s"], stage["end_s"]) for stage in record["stages"]}


def test_the_driver_begins_while_pages_are_on_their_way(node: GpuNode) -> None:
    """Much GPU memory: the driver's restore begins before the fill has ended, and finds every byte all the same."""
    node.start("source", "large", "second")
    node.checkpoint("large:1")
    pids = node.tree(node.runc.pid("source"))
    for pid in pids:
        node.serves(pid)
    tasks = json.loads(node.node.smr("images", "inspect", "large:1", "--json").stdout)["config"]["gpu"]["tasks"]
    assert [[end - start for start, end in task["areas"]] for task in tasks] == [[96 << 20], [96 << 20]]
    node.runc.remove("source")
    pid = node.restore("large:1", "large", "second")
    for one in node.tree(pid):
        node.serves(one)
        assert node.counts(one).bad == 0
    at = stages(node)
    assert at["fill"][0] < at["gpu"][0] < at["fill"][1]


def test_a_driver_that_does_not_begin_early_begins_again(node: GpuNode) -> None:
    """A restore that fails while pages are on their way, and changes nothing, is made once more when all are there."""
    node.start("source", "large")
    node.checkpoint("large:2")
    node.runc.remove("source")
    node.fault("restore", "once fail 1")
    pid = node.restore("large:2", "large")
    node.serves(pid)
    assert node.counts(pid).bad == 0
    (warning,) = json.loads(node.node.smr("inspect", "again", "--json").stdout)["warnings"]
    assert "did not begin while pages were on their way" in warning


def test_two_processes_and_a_forked_one(node: GpuNode) -> None:
    """All are locked before the first is checkpointed; a child with open devices and no CUDA is freed of them; all come back."""
    pid = node.start("source", "second", "forked", gpus=(FIRST, SECOND))
    first, second, forked = node.tree(pid)
    assert node.open_devices(forked) == node.open_devices(first)
    node.checkpoint("several:1")
    assert not Path(f"/proc/{forked}/root/fake-cuda/3.state").exists()
    order = [(call, what) for call, _, what in node.calls()]
    assert max(order.index(("lock", "end")), len(order) - 1 - order[::-1].index(("lock", "end"))) < order.index(
        ("checkpoint", "begin")
    )
    assert {one for call, one, _ in node.calls("lock")} == {first, second}
    for one in (first, second):
        node.serves(one)
        assert node.minors(one) == [FIRST, SECOND]
    ticks = node.counts(forked).ticks
    eventually(lambda: node.counts(forked).ticks > ticks, what="the forked child goes on")
    boots = [node.counts(one).boot for one in (first, second, forked)]
    node.runc.remove("source")
    again = node.tree(node.restore("several:1", "second", "forked", gpus=(SECOND, THIRD)))
    again.sort(key=node.inner)
    assert [node.counts(one).boot for one in again] == boots
    for one in again[:2]:
        node.serves(one)
        assert node.minors(one) == [SECOND, THIRD]
    ticks = node.counts(again[2]).ticks
    eventually(lambda: node.counts(again[2]).ticks > ticks, what="the forked child goes on")


def test_a_checkpoint_that_stops(node: GpuNode) -> None:
    """--stop: nothing runs after the checkpoint, GPU memory is not brought back, and the image restores."""
    pid = node.start()
    node.checkpoint("stops:1", "--stop", *HOOKS)
    assert not alive(pid)
    assert [call for call, _, what in node.calls() if what == "end"] == ["lock", "checkpoint"]
    node.runc.remove("source")
    again = node.restore("stops:1")
    node.serves(again)
    assert node.text(again, "hooks").startswith("quiesce 0\n")


# Failures of a checkpoint. The container goes on afterwards, and there is no image.

QUICK = {"SMR_GPU_TIMEOUT_S": "1"}


def refused(node: GpuNode, image: str, *words: str, env: dict[str, str] | None = None) -> str:
    """What `smr checkpoint` says, that must fail and leave no image."""
    done = node.checkpoint(image, *words, check=False, env=env)
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr
    assert not node.has_image(image)
    return done.stderr


@pytest.mark.parametrize("call", ["lock", "checkpoint"])
@pytest.mark.parametrize("words", ["fail 999", "hang", "late 50", "die"])
def test_a_call_of_the_driver_fails(node: GpuNode, call: str, words: str) -> None:
    """For the second of two processes: it fails, or never returns, or the helper is killed. Both processes run on."""
    pid = node.start("source", "second")
    node.fault(call, f"once {words}", node.inner(node.tree(pid)[1]))
    said = refused(node, "fails:1", *HOOKS, env=QUICK if words in {"hang", "late 50"} else None)
    assert f"cannot {call} process" in said
    assert f"process {node.tree(pid)[1]} (gpu_program): " in said
    assert "nothing is left locked" in said
    for one in node.tree(pid):
        node.serves(one)
    assert not any(call == "restore" for call, _, _ in node.calls()) or call == "checkpoint"
    assert node.text(pid, "hooks") == "quiesce 0\nresume 0\n"


@pytest.mark.parametrize("call", ["lock", "checkpoint"])
def test_a_process_dies_in_a_call(node: GpuNode, call: str) -> None:
    """The second of two is killed while it is locked: the error says so, the first runs on."""
    pid = node.start("source", "second")
    second = node.tree(pid)[1]
    node.fault(call, "kill", node.inner(second))
    said = refused(node, "dies:1", *HOOKS)
    assert f"process {second}" in said
    assert "ended" in said
    node.serves(pid)
    assert node.text(pid, "hooks") == "quiesce 0\nresume 0\n"


def test_the_container_dies_in_a_call(node: GpuNode) -> None:
    """Its first process is killed while it is checkpointed: an error that says so, and nothing is left."""
    pid = node.start()
    node.fault("checkpoint", "kill")
    said = refused(node, "dies:2", *HOOKS)
    assert f"process {pid}" in said
    eventually(lambda: not node.helpers(), what="no process of ours")
    assert node.runc.state("source")["status"] == "stopped"


@pytest.mark.parametrize("words", [(), ("--stop",)])
def test_a_dump_fails(node: GpuNode, words: tuple[str, ...]) -> None:
    """CRIU refuses a socket: the error quotes it, GPU memory is back, and also with --stop the container goes on."""
    pid = node.start("source", "socket")
    said = refused(node, "dump:1", *HOOKS, *words)
    assert "checkpoint of source failed" in said
    node.serves(pid)
    assert node.counts(pid).restores == 1
    assert node.text(pid, "hooks") == "quiesce 0\nresume 0\n"


def test_a_freeze_fails(node: GpuNode) -> None:
    """The runtime does not pause: GPU memory is back."""
    pid = node.start()
    (node.fake / "fail.pause").touch()
    assert "told to fail" in refused(node, "freeze:1", *HOOKS)
    node.serves(pid)
    assert node.text(pid, "hooks") == "quiesce 0\nresume 0\n"


@pytest.mark.parametrize("call", ["restore", "unlock"])
@pytest.mark.parametrize("words", ["fail 999", "hang"])
def test_a_gpu_does_not_come_back(node: GpuNode, call: str, words: str) -> None:
    """After a good dump: the image is committed, the error names it and the process, and it restores."""
    pid = node.start()
    node.fault(call, words)
    done = node.checkpoint("lost:1", *HOOKS, check=False, env=QUICK)
    assert done.returncode != 0
    assert "lost its GPU" in done.stderr
    assert "lost:1" in done.stderr
    assert f"process {pid}" in done.stderr
    assert node.state(pid) == (CHECKPOINTED if call == "restore" else LOCKED)
    node.mend()
    node.runc.remove("source")
    node.serves(node.restore("lost:1"))
    node.node.smr("images", "rm", "lost:1")


@pytest.mark.parametrize(("call", "words"), [("restore", "hang"), ("unlock", "die"), ("restore", "late 50")])
def test_a_call_hangs_once_on_the_way_back(node: GpuNode, call: str, words: str) -> None:
    """A second helper does what the first one did not: no error."""
    pid = node.start()
    node.fault(call, f"once {words}")
    node.checkpoint("second-try:1", *HOOKS, env=QUICK)
    node.serves(pid)


def test_a_quiesce_hook_fails(node: GpuNode) -> None:
    """Nothing is locked; the resume hook has run, since the quiesce hook began."""
    pid = node.start()
    words = ("--quiesce", "exec:sh -c 'echo begun >>/fake-cuda/hooks; exit 3'", *HOOKS[2:])
    assert "quiesce" in refused(node, "hook:1", *words)
    assert node.calls() == []
    node.serves(pid)
    assert node.text(pid, "hooks") == "begun\nresume 0\n"


def test_a_resume_hook_fails(node: GpuNode) -> None:
    """After the checkpoint and after a restore that is a warning: the container runs."""
    pid = node.start()
    told = json.loads(node.checkpoint("hook:2", "--resume", "exec:false", *HOOKS[:2], "--json").stdout)
    assert len(told["warnings"]) == 1
    assert "resume hook failed" in told["warnings"][0]
    node.serves(pid)
    node.runc.remove("source")
    again = node.restore("hook:2")
    node.serves(again)
    eventually(lambda: "resume hook failed" in node.node.log_text(), what="the log's line")
    record = json.loads(node.node.smr("inspect", "again", "--json").stdout)
    assert "resume hook failed" in record["warnings"][0]
    assert [stage["name"] for stage in record["stages"]][-2:] == ["start", "resume"]


def test_what_cannot_be_checkpointed(node: GpuNode) -> None:
    """It is named before anything is asked of the driver or of the container."""
    pid = node.start("source", "io_uring")
    said = refused(node, "uring:1", "--resume", HOOKS[3])
    assert "io_uring" in said
    assert node.calls() == []
    assert node.text(pid, "hooks") == ""
    node.serves(pid)


def test_a_paused_container(node: GpuNode) -> None:
    """Its processes could not take part: refused, and still paused."""
    node.start()
    node.runc("pause", "source", bare=True)
    assert "is paused and has a GPU" in refused(node, "paused:1")
    assert node.calls() == []
    assert node.runc.state("source")["status"] == "paused"
    node.runc("resume", "source", bare=True)


# smr checkpoint is killed.

_WAIT = "exec:sh -c '>/fake-cuda/in; while [ ! -e /fake-cuda/go ]; do sleep 0.1; done'"
KILLED = ["quiesce", "lock", "checkpoint", "pause", "dump", "resume", "restore", "late-restore", "unlock", "hook"]


@pytest.mark.parametrize("stage", KILLED)
def test_smr_checkpoint_is_killed(node: GpuNode, stage: str) -> None:
    """kill -9 in each stage: the guard gives the container back, hooks included; nothing of SMR is left, no half image."""
    pid = node.start("source", "second")
    second = node.inner(node.tree(pid)[1])
    go = Path(f"/proc/{pid}/root/fake-cuda/go")
    quiesce, resume = HOOKS[1], HOOKS[3]
    if stage in {"lock", "checkpoint"}:
        node.fault(stage, "once late 50", second)
    elif stage in {"restore", "unlock"}:
        node.fault(stage, "once hang", second)
    elif stage == "late-restore":
        node.fault("restore", "once late 50", second)
    elif stage in {"pause", "dump", "resume"}:
        (node.fake / f"hold.{'checkpoint' if stage == 'dump' else stage}").touch()
    elif stage == "quiesce":
        quiesce = f"{_WAIT}"
    else:
        resume = f"{_WAIT} ; {resume}"
    process = node.spawn(node.checkpoint_argv("killed:1", "--quiesce", quiesce, "--resume", resume))
    try:
        eventually(lambda: _is_in(node, stage, pid), what=f"it is in {stage}")
    finally:
        node.kill(process)
    go.touch()
    for file in node.fake.glob("hold.*"):
        file.unlink()
    eventually(lambda: "resume 0" in node.text(pid, "hooks"), what="it is given back")
    for one in node.tree(pid):
        node.serves(one)
    assert node.runc.state("source")["status"] == "running"
    eventually(lambda: not node.helpers(), what="no process of ours")
    assert not node.has_image("killed:1")
    node.node.smr("gc")
    assert list((node.node.store / "ingest").glob("*")) == []
    if stage in {"checkpoint", "dump"}:
        node.checkpoint("killed:2")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("stage", ["checkpoint", "dump", "hook"])
def test_smr_checkpoint_is_interrupted(node: GpuNode, number: signal.Signals, stage: str) -> None:
    """Ctrl-C, a kill, or a terminal that goes: the container is given back, nothing is left in the store, the status says why.

    A call of the driver's that does not return is given up; CRIU is waited for.
    """
    pid = node.start("source", "second")
    quiesce, resume = HOOKS[1], HOOKS[3]
    if stage == "checkpoint":
        node.fault("checkpoint", "once late 50", node.inner(node.tree(pid)[1]))
    elif stage == "dump":
        (node.fake / "hold.checkpoint").touch()
    else:
        quiesce = _WAIT
    process = node.spawn(node.checkpoint_argv("interrupted:1", "--quiesce", quiesce, "--resume", resume))
    try:
        eventually(lambda: _is_in(node, stage, pid), what=f"it is in the {stage}")
        process.send_signal(number)
        process.send_signal(number if number is not signal.SIGINT else 0)  # again: that ends nothing half-way
        if stage == "dump":
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            (node.fake / "hold.checkpoint").unlink()
        assert process.wait(30) == 128 + number
    finally:
        node.kill(process)
    assert list((node.node.store / "ingest").glob("*/")) == []
    eventually(lambda: node.text(pid, "hooks").endswith("resume 0\n"), what="it is given back")
    for one in node.tree(pid):
        node.serves(one)
    eventually(lambda: not node.helpers(), what="no process of ours")
    assert not node.has_image("interrupted:1")
    assert node.runc.state("source")["status"] == "running"


def _is_in(node: GpuNode, stage: str, pid: int) -> bool:
    second = node.tree(pid)[1]
    if stage in {"quiesce", "hook"}:
        return Path(f"/proc/{pid}/root/fake-cuda/in").exists()
    if stage in {"pause", "dump", "resume"}:
        return (node.fake / f"held.{'checkpoint' if stage == 'dump' else stage}").exists()
    wanted = {"lock": LOCKED, "checkpoint": CHECKPOINTED, "restore": CHECKPOINTED, "late-restore": LOCKED, "unlock": LOCKED}
    return node.begun(stage.removeprefix("late-")) and node.state(second) == wanted[stage] and not list(node.fake.glob("fault.*"))


# Failures of a restore.

MISMATCHES: dict[str, tuple[list[Gpu], str, Code]] = {
    "no driver": ([], "580.159.04", Code.GPU_MISSING),
    "fewer": ([Gpu(SECOND)], "580.159.04", Code.GPU_MISSING),
    "model": ([Gpu(FIRST, name="NVIDIA H100", capability="9.0")], "580.159.04", Code.GPU_MISMATCH),
    "driver": ([Gpu(FIRST)], "570.1.2", Code.GPU_DRIVER),
    "memory": ([Gpu(FIRST, free=VRAM_BYTES - 1)], "580.159.04", Code.GPU_MEMORY),
    "busy": ([Gpu(FIRST, mode=3)], "580.159.04", Code.GPU_BUSY),
    "lost": ([Gpu(FIRST, fault=15)], "580.159.04", Code.GPU_BUSY),
}


def lay(node: GpuNode, case: str) -> Code:
    """Put the node into a state in which a restore cannot be; the code of the error."""
    gpus, driver, code = MISMATCHES[case]
    if gpus:
        node.gpus(*gpus, driver=driver)
    else:
        (node.fake / "gpus").unlink()
    if case == "busy":
        (node.fake / "procs").write_text(f"{FIRST} {os.getpid()} 1000\n")
    return code


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_node_that_does_not_fit(node: GpuNode, image: str, case: str) -> None:
    """A clear error before CRIU has made a process; the root is as it was; nothing has asked the driver for anything."""
    code = lay(node, case)
    done = node.create(image, annotations=FAIL, check=False)
    assert done.returncode == 1
    assert json.loads(node.node.log_text().splitlines()[-1])["code"] == code
    assert node.calls() == []
    assert as_before(node)
    assert "again" not in node.node.records()
    assert node.runc("state", "again", check=False).returncode != 0


def test_smr_check_says_the_same(node: GpuNode, image: str) -> None:
    """`smr check IMAGE` is content with this node, and not with one that has another model."""
    # It would ask engines too, and podman then mounts its storage.
    env = {**node.runc.env, "PATH": str(node.node.bin)}
    done = node.node.smr("check", image, env=env)
    assert "NVIDIA H200, GPU-33333333" in done.stdout
    lay(node, "model")
    done = node.node.smr("check", image, env=env, check=False)
    assert done.returncode != 0
    assert "NVIDIA H100" in done.stdout


def as_before(node: GpuNode) -> bool:
    """Whether the bundle's root has what a bundle has before its create."""
    before = contents(node.bundle("fresh"))
    node.runc.remove("fresh")
    after = contents(node.runc.path / "again")
    assert after == before
    return True


def contents(folder: Path) -> dict[str, object]:
    """What can be seen of a bundle's root, where the image's layer has something."""
    found: dict[str, object] = {}
    for name in ("etc", "app", "run"):
        top = folder / "rootfs" / name
        for path in [top, *top.rglob("*")] if top.exists() else []:
            data = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and not path.is_symlink() else ""
            found[str(path.relative_to(folder))] = (oct(path.lstat().st_mode), data)
    return found


def started_cold(node: GpuNode, pid: int) -> None:
    """It is a new process, with nothing of the image's in its root, and says why."""
    counts = node.counts(pid)
    assert (counts.checkpoints, counts.restores, counts.bad) == (0, 0, 0)
    root = Path(f"/proc/{pid}/root")
    assert (root / "etc/marker").read_text() == "from the image\n"
    assert (root / "etc/group").exists()
    assert not (root / "app/new").exists()
    assert not (root / "run/smr").exists()
    assert node.text(pid, "hooks") == ""
    assert node.node.records()["again"]["status"] == "cold"


def test_a_container_without_a_gpu(node: GpuNode, image: str) -> None:
    """The node has it, and the spec does not: that is said."""
    done = node.create(image, gpus=(), check=False)
    assert done.returncode == 1
    assert "checkpoint has 1 GPU, this container has no GPU" in done.stderr
    assert node.calls() == []
    assert as_before(node)


@pytest.mark.parametrize("case", ["fewer", "driver"])
def test_a_node_that_does_not_fit_starts_cold(node: GpuNode, image: str, case: str) -> None:
    """With fallback=cold: really cold, and `smr ps` has the code."""
    code = lay(node, case)
    node.create(image, annotations=COLD)
    node.runc("start", "again")
    pid = node.ready("again")
    started_cold(node, pid)
    assert node.node.records()["again"]["reason_code"] == code


FAULTS = {
    "restore fails": ("restore", "fail 999", Code.GPU_FAILED),
    "no memory": ("restore", "fail 2", Code.GPU_MEMORY),
    "restore hangs": ("restore", "hang", Code.TIMEOUT),
    "restore is late": ("restore", "late 50", Code.TIMEOUT),
    "the process dies": ("restore", "kill", Code.GPU_FAILED),
    "the helper dies": ("restore", "die", Code.GPU_FAILED),
    "unlock fails": ("unlock", "fail 999", Code.GPU_FAILED),
    "unlock hangs": ("unlock", "hang", Code.TIMEOUT),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_driver_fails_a_restore(node: GpuNode, image: str, fault: str) -> None:
    """After CRIU, before start: all is taken back, then a cold start, which the driver's calls do not concern."""
    call, words, code = FAULTS[fault]
    node.fault(call, words)
    node.create(image, annotations=COLD, env=QUICK)
    assert node.begun(call)
    node.mend()
    node.runc("start", "again")
    started_cold(node, node.ready("again"))
    assert node.node.records()["again"]["reason_code"] == code


def test_the_driver_fails_a_restore_without_a_fallback(node: GpuNode, image: str) -> None:
    """The error is the engine's; the root is as it was, no process and no record is left."""
    node.fault("restore", "fail 999")
    done = node.create(image, annotations=FAIL, check=False)
    assert done.returncode == 1
    assert "cannot restore process" in done.stderr
    assert as_before(node)
    assert node.node.records() == {}
    assert not alive(node.calls("restore")[0][1])


def test_one_of_two_fails(node: GpuNode) -> None:
    """The second process does not come back: the first, which has, is taken back as well."""
    second = node.inner(node.tree(node.start("source", "second"))[1])
    node.checkpoint("two:1")
    node.runc.remove("source")
    (node.fake / "log").unlink()
    node.fault("restore", "fail 999", second)
    node.create("two:1", "second", annotations=FAIL, check=False)
    assert len({pid for _, pid, _ in node.calls("restore")}) == 2
    assert not any(alive(pid) for _, pid, _ in node.calls("restore"))
    node.mend()
    node.runc.remove("again")
    for one in node.tree(node.restore("two:1", "second")):
        node.serves(one)


@pytest.mark.parametrize("call", ["restore", "unlock"])
def test_create_is_killed_in_the_gpu_stage(node: GpuNode, image: str, call: str) -> None:
    """kill -9 while the driver is at work: the guard takes all back; a new create works."""
    folder = node.bundle("again", annotations={"smr.restore": image, **FAIL})
    node.fault(call, "once hang")
    with node.runc.output(folder) as output:
        argv = [*node.runc.smr, "create", "--bundle", str(folder), "again"]
        process = subprocess.Popen(argv, env=node.runc.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            eventually(lambda: node.begun(call), what=f"the {call} has begun")
        finally:
            node.kill(process)
    assert process.returncode == -signal.SIGKILL
    pid = node.calls(call)[0][1]
    eventually(lambda: not alive(pid) and not node.helpers(), what="the guard is done")
    assert node.node.records() == {}
    assert as_before(node)
    node.runc.remove("again")
    node.serves(node.restore(image))


def test_a_server_of_pages_cannot_be_in_the_way(node: GpuNode, image: str) -> None:
    """smr.pages=lazy and =criu: the pages are there when the driver copies from them."""
    for pages in ("lazy", "criu", "fill"):
        pid = node.restore(image, annotations={**FAIL, "smr.pages": pages})
        assert node.counts(pid).restores == 1
        node.serves(pid)
        node.runc.remove("again")
