"""The node agent without an engine: kill -9 in the middle of its calls, health, events of pods, memory under load."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from smr.images.image import Image
from smr.images.pin import pins, unpin
from smr.images.store import Store
from smr.proto.checkpoint import LayerType
from smr.proto.errors import Code, SmrError
from smr.shim.config import Config
from smr.shim.events import emit_failure, note
from tests.integration.agent import Agent, ended
from tests.integration.api_server import ApiServer
from tests.integration.command import eventually, run
from tests.integration.sandbox import Sandbox
from tests.store_support import commit

MIB = 1 << 20
CRIU = """#!/bin/sh
case $1 in
    --version) echo "Version: 4.2" ;;
    check) [ ! -e "$(dirname "$0")/broken" ] || { echo "Error: no such system call" >&2; exit 1; } ;;
esac
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A node with a CRIU that says that all is well, until there is a file `broken` beside it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/criu").write_text(CRIU)
    (tmp_path / "bin/criu").chmod(0o755)
    store = Store(tmp_path / "store")
    commit(store, "llama:1", pages={"pages-1.img": os.urandom(4 * MIB)})
    return Config(run=tmp_path / "run", store=store.root, log=tmp_path / "smr.log", criu=str(tmp_path / "bin/criu"))


@pytest.fixture
def image(config: Config) -> Image:
    """The node's image."""
    return Store(config.store).resolve("llama:1")


@pytest.fixture
def agent(config: Config) -> Iterator[Agent]:
    """An agent, not started."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SMR_", "KUBERNETES_"))}
    env |= {"SMR_RUN": str(config.run), "SMR_STORE": str(config.store), "SMR_LOG": str(config.log), "SMR_CRIU": config.criu}
    found = Agent(config.run, env, [sys.executable, "-I", "-m", "smr.shim.agent.main"])
    with ended(found):
        yield found
    for pid in found.workers():
        os.kill(pid, signal.SIGKILL)
    for pin in pins(config.run):
        unpin(config.run, pin.digest)


@contextmanager
def held_up(image: Image) -> Iterator[None]:
    """Whoever reads the image ahead has to wait, as for another who does: a call that is met in the middle."""
    (layer,) = image.layers_of(LayerType.PAGES)
    fd = os.open(layer.path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(fd)


@pytest.mark.parametrize(("call", "how"), [("Prefetch", signal.SIGTERM), ("Pin", signal.SIGKILL)])
def test_work_outlives_its_agent(agent: Agent, config: Config, image: Image, call: str, how: signal.Signals) -> None:
    """An agent that ends, or is killed, in the middle of a call: the client is told, the work goes on, and ends by itself."""
    agent.start()
    with held_up(image), agent.calling(call, image="llama:1") as client:
        eventually(agent.workers, what="the work has begun")
        assert agent.end(how) == (0 if how is signal.SIGTERM else -how)
        assert client.stdout is not None
        assert json.loads(client.stdout.readline())["status"] in {"UNAVAILABLE", "CANCELLED"}
        assert agent.workers()
    eventually(lambda: not agent.workers(), what="the work is done")
    assert [pin.digest for pin in pins(config.run)] == ([image.digest] if call == "Pin" else [])
    agent.start()
    (listed,) = agent.one("List")["images"]
    assert listed.get("pinned", False) is (call == "Pin")


def test_a_client_that_goes_ends_its_work(agent: Agent, config: Config, image: Image) -> None:
    """Nothing of it is left; the agent goes on."""
    agent.start()
    with held_up(image), agent.calling("Pin", image="llama:1"):
        eventually(agent.workers, what="the work has begun")
    with held_up(image):
        eventually(lambda: not agent.workers(), what="the work ends")
        assert not pins(config.run)
    assert agent.one("Status")["healthy"] is True


def test_the_work_of_a_pods_agent_is_not_the_pods(agent: Agent, box: Sandbox, image: Image) -> None:
    """An agent in a pod's cgroup and cgroup namespace, with the node's files: its work has left the pod's cgroup."""
    pods = [path / box.token / "pod" for path in cgroup_tops()]
    for pod in pods:
        pod.mkdir(parents=True)
    inside = f"/{box.token}/pod"
    enter = "".join(f"echo 0 >{pod}/cgroup.procs && " for pod in pods)
    # A node of its own: its process 1 stays outside of the pod.
    node = ["unshare", "--pid", "--fork", "--mount", "--mount-proc", "--kill-child=KILL", "sh", "-c"]
    agent.program = [*node, f'({enter}exec unshare --cgroup "$@") & wait', "sh", *agent.program]
    try:
        agent.start()
        assert any(pod_has_processes(pod) for pod in pods)
        with held_up(image), agent.calling("Prefetch", image="llama:1"):
            (worker,) = eventually(agent.workers, what="the work has begun")
            eventually(lambda: inside not in Path(f"/proc/{worker}/cgroup").read_text(), what="the work has left")
    finally:
        agent.end(signal.SIGKILL)
        for pod in pods:
            eventually(lambda pod=pod: not pod_has_processes(pod), what="the pod has ended")
            pod.rmdir()


def pod_has_processes(pod: Path) -> bool:
    """Whether any process is in a cgroup."""
    return bool((pod / "cgroup.procs").read_text())


def cgroup_tops() -> list[Path]:
    """The hierarchies in which it matters where a process is: v2's; or v1's for memory, and the one that runc kills by."""
    top = Path("/sys/fs/cgroup")
    return [top] if (top / "cgroup.controllers").exists() else [top / name for name in ("memory", "devices")]


def test_a_call_that_fails_says_all_of_the_error(agent: Agent) -> None:
    """Status, message, and code and hint in the metadata."""
    agent.start()
    missing = agent.one("Prefetch", image="lama:1")
    assert (missing["status"], missing["error"]["code"]) == ("NOT_FOUND", "image_not_found")
    assert "llama:1" in missing["error"]["hint"]
    assert agent.one("Checkpoint", container="c", image="a", engine="runc")["error"]["code"] == "container_not_found"


def test_the_socket_is_roots_and_an_old_one_is_replaced(agent: Agent) -> None:
    """After kill -9 its socket is in the way of nobody."""
    agent.start()
    assert agent.socket.stat().st_mode & 0o777 == 0o600
    agent.end(signal.SIGKILL)
    assert agent.socket.exists()
    agent.start()
    assert agent.one("Status")["pid"] == agent.pid


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--listen=nowhere"], 2, "needed HOST:PORT"),
        (["--listen=192.0.2.1:1"], 1, "cannot listen on 192.0.2.1:1"),
        (["--events=perhaps"], 2, "needed auto or off"),
        (["--socket=/proc/agent.sock"], 1, "cannot listen on /proc/agent.sock"),
    ],
)
def test_an_agent_that_cannot_start_says_why(agent: Agent, flags: list[str], status: int, said: str) -> None:
    """One line, and the exit status of its code; nothing is left that the next would trip over."""
    done = run([*agent.program, "--listen=", *flags], env=agent.env, check=False)
    assert done.returncode == status
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    agent.start()


def test_health(agent: Agent, config: Config, tmp_path: Path) -> None:
    """503 and the reason when CRIU fails its check or the store is full; Status says the same; metrics are there all the same."""
    full = tmp_path / "full"
    full.mkdir()
    agent.env["SMR_STORE"] = str(full)
    agent.start()
    assert agent.get("/healthz") == (200, "ok\n")
    (tmp_path / "bin/broken").touch()
    (tmp_path / "bin/criu").write_text(f"{CRIU}# another\n")
    status, why = agent.get("/healthz")
    assert (status, why) == (503, f"{config.criu} check failed: Error: no such system call\n")
    assert agent.one("Status")["health_reason"] == why.strip()
    (tmp_path / "bin/broken").unlink()
    (tmp_path / "bin/criu").write_text(CRIU)
    mounted = run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", full], check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted: {mounted.stderr}")
    try:
        assert agent.get("/healthz") == (503, f"the store {full} has 32 MiB left: needed 64 MiB\n")
        run(["mount", "-o", "remount,ro", full])
        assert agent.get("/healthz") == (503, f"the store {full} cannot be written\n")
        assert agent.metrics()["smr_images",] == 0
    finally:
        run(["umount", full])
    assert agent.get("/healthz") == (200, "ok\n")


def test_memory_under_load(agent: Agent, config: Config) -> None:
    """Fifty scrapes and five hundred events later it is still small."""
    for number in range(10):
        commit(Store(config.store), f"image:{number}", pages={"pages-1.img": os.urandom(5000)})
    agent.start()
    for number in range(500):
        note(config, "restored", {"container": f"c{number}", "busy_s": 0.1, "stages_s": {"create": 0.1, "fill": 0.05}})
    agent.counts("smr_restores_total", "code=", "result=restored", value=500)
    for _ in range(50):
        agent.get("/metrics")
    assert len(agent.one("List")["images"]) == 11
    assert agent.resident_bytes() < 40 * MIB


CRI = {
    "io.kubernetes.cri.container-type": "container",
    "io.kubernetes.cri.sandbox-namespace": "shop",
    "io.kubernetes.cri.sandbox-name": "llama-0",
    "io.kubernetes.cri.container-name": "server",
}
NO_IMAGE = SmrError("no image llama:2", hint="smr images ls", code=Code.IMAGE_NOT_FOUND)


@pytest.fixture
def api(box: Sandbox, agent: Agent) -> Iterator[ApiServer]:
    """An API server, and the agent's environment as in a pod of its cluster. /var/run is the sandbox's."""
    server = ApiServer(Path("/var/run/secrets/kubernetes.io/serviceaccount"))
    server.pods["shop/llama-0"] = "0f1e"
    with server.serving():
        agent.env |= {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(server.port), "NODE_NAME": "node-1"}
        yield server
    for file in server.secrets.iterdir():
        file.unlink()


def told(agent: Agent, result: str, value: float) -> None:
    """Wait until so many events have come to that end."""
    agent.counts("smr_kubernetes_events_total", f"result={result}", value=value)


def test_pods_are_told(agent: Agent, api: ApiServer, config: Config) -> None:
    """A failure that happened before the agent, and one beside it while the server stumbles; once each, kill -9 or not."""
    emit_failure(config, "started_cold", "c1", CRI, NO_IMAGE, "llama:2")
    emit_failure(config, "started_cold", "not-a-pods", {}, NO_IMAGE, "llama:2")
    agent.start()
    told(agent, "posted", 1)
    (event,) = api.events.values()
    assert (
        event["note"]
        == "Container server was not restored from llama:2 and starts cold: no image llama:2 (smr images ls) [image_not_found]"
    )
    assert event["regarding"]["uid"] == "0f1e"
    assert event["reportingInstance"] == "node-1"
    api.failures += [500]
    emit_failure(config, "restore_failed", "c2", {**CRI, "io.kubernetes.cri.sandbox-uid": "0f1e"}, NO_IMAGE, "llama:2")
    told(agent, "posted", 2)
    assert [event["reason"] for event in api.events.values()] == ["SmrStartedCold", "SmrRestoreFailed"]
    agent.end(signal.SIGKILL)
    (config.run / "agent/totals.json").unlink()  # it was killed before it had noted what it posted
    agent.start()
    told(agent, "posted", 2)
    assert len(api.events) == 2
    assert [status for _, _, status in api.requests].count(409) == 2


def test_a_server_that_says_no_or_nothing_holds_nobody_up(agent: Agent, api: ApiServer, config: Config) -> None:
    """Missing rights and pods that have gone are counted; a server that does not answer keeps nobody waiting."""
    agent.start()
    api.may_create = False
    emit_failure(config, "started_cold", "c1", CRI, NO_IMAGE, "llama:2")
    told(agent, "denied", 1)
    api.may_create = True
    emit_failure(config, "started_cold", "c2", {**CRI, "io.kubernetes.cri.sandbox-name": "gone"}, NO_IMAGE, "llama:2")
    told(agent, "dropped", 1)
    api.token = "renewed"
    emit_failure(config, "started_cold", "c3", CRI, NO_IMAGE, "llama:2")
    told(agent, "denied", 2)
    (api.secrets / "token").write_text("renewed")
    emit_failure(config, "started_cold", "c4", CRI, NO_IMAGE, "llama:2")
    told(agent, "posted", 1)
    api.answering.clear()
    for number in range(150):
        emit_failure(config, "started_cold", f"s{number}", CRI, NO_IMAGE, "llama:2")
    agent.counts("smr_restores_total", "code=image_not_found", "result=cold", value=154)
    told(agent, "dropped", 1 + 150 - 101)
    assert agent.one("Status")["healthy"] is True
    assert agent.end() == 0


def test_events_can_be_left_out(agent: Agent, api: ApiServer, config: Config) -> None:
    """--events=off: nothing is sent."""
    agent.start("--events=off")
    emit_failure(config, "started_cold", "c1", CRI, NO_IMAGE, "llama:2")
    agent.counts("smr_restores_total", "code=image_not_found", "result=cold", value=1)
    assert not api.requests


def test_the_unit_is_one_that_systemd_takes() -> None:
    """Known directives only, and none that would kill what an agent has begun."""
    unit = Path(__file__).parents[2] / "deploy/smr-agent.service"
    text = unit.read_text()
    assert "KillMode=process" in text
    assert "Type=notify" in text
    try:
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("systemd-analyze is not here")
    problems = [line for line in done.stderr.splitlines() if unit.name in line and "not executable" not in line]
    assert not problems
