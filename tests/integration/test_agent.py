"""The node agent beside a real engine: its calls, metrics and events, its end and its return; containers feel nothing of it."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator

import pytest

from tests.integration.agent import Agent, ended
from tests.integration.command import eventually
from tests.integration.conftest import Warm
from tests.integration.podman import Podman

MIB = 1 << 20


@pytest.fixture
def agent(podman: Podman) -> Iterator[Agent]:
    """The agent of podman's node, running. Counts and events of other tests are forgotten."""
    run_dir = podman.node.run_dir
    for file in (*(run_dir / "events").glob("*"), *(run_dir / "agent").glob("*")):
        file.unlink()
    found = Agent(run_dir, podman.env, [podman.node.bin / "smr", "agent"])
    with ended(found):
        found.start()
        yield found


def kinds(events: list[dict[str, object]]) -> list[object]:
    """What happened, in order."""
    return [event["kind"] for event in events]


def test_a_life_of_an_agent(podman: Podman, agent: Agent) -> None:
    """Checkpoint, list, pin, restore, cold start and failure through an agent that is killed in between and ends in the end.

    What happened while there was none is counted by the next. Containers and clients of the runtime notice nothing.
    """
    podman.start("source")
    podman.ready("source")
    with agent.calling("Watch") as watcher:
        assert watcher.stdout is not None
        eventually(lambda: agent.one("Status")["healthy"])
        replies = agent.call("Checkpoint", container="source", image="agent:1")
        podman.ask("source", "count")
        stages, result = [reply["stage"] for reply in replies[:-1]], replies[-1]["result"]
        assert stages[:2] == ["freeze", "dump"]
        assert stages[-1] == "commit"
        assert result["image"] == "agent:1"
        assert set(result["stages_s"]) == set(stages)
        image = listed(agent, result["digest"])
        assert image["tags"] == ["agent:1"]
        assert 0 < image["cached_share"] <= 1
        read = agent.one("Prefetch", image="agent:1")
        assert read["total_bytes"] == str(int(read.get("cached_bytes", 0)) + int(read.get("read_bytes", 0)))
        assert int(str(agent.one("Pin", image="agent:1")["pid"])) in podman_pins(podman)
        assert listed(agent, result["digest"])["pinned"] is True
        assert agent.one("Unpin", image="agent:1")["unpinned"] is True
        assert agent.one("Unpin", image="agent:1").get("unpinned", False) is False
        podman.start("warm", annotations={"smr.restore": "agent:1"})
        podman.start("cold", annotations={"smr.restore": "nope"})
        podman.start("none", annotations={"smr.restore": "nope", "smr.fallback": "fail"}, check=False)
        podman.start("typo", annotations={"smr.resotre": "agent:1"}, check=False)
        podman.ready("warm")
        wanted = {"checkpointed", "restored", "started_cold", "restore_failed"}
        told: list[dict[str, object]] = []
        while {str(event["kind"]) for event in told} != wanted or len(told) < 5:
            told.append(json.loads(watcher.stdout.readline()))
    assert [event["reason_code"] for event in told if event["kind"] == "restore_failed"] == [
        "image_not_found",
        "annotation_unknown",
    ]
    (restored,) = (event for event in told if event["kind"] == "restored")
    assert restored["total_s"] > 0
    assert "create" in restored["stages_s"]
    found = {one["image"]: one for one in agent.one("Status")["containers"]}
    assert found["agent:1"]["status"] == "restored"
    assert found["agent:1"]["pid"] == podman.pid("warm")
    assert (found["nope"]["status"], found["nope"]["reason_code"]) == ("cold", "image_not_found")
    before = agent.metrics()
    assert before["smr_restores_total", "code=", "result=restored"] == 1
    assert before["smr_restores_total", "code=image_not_found", "result=cold"] == 1
    assert before["smr_restores_total", "code=annotation_unknown", "result=failed"] == 1
    assert before["smr_checkpoint_pause_seconds_count",] == 1
    assert before["smr_restore_stage_seconds_count", "stage=create"] == 1
    assert before["smr_containers", "status=restored"] == 1

    agent.end(signal.SIGKILL)
    podman.start("late", annotations={"smr.restore": "agent:1"})
    podman.ready("late")
    agent.start()
    agent.counts("smr_restores_total", "code=", "result=restored", value=2)
    assert agent.metrics()["smr_restores_total", "code=image_not_found", "result=failed"] == 1
    assert kinds(agent_replay(agent)).count("restored") == 2

    eventually(lambda: sleeps(agent), what="an agent that has nothing to do does not wake up")
    assert agent.resident_bytes() < 40 * MIB
    assert agent.end() == 0
    assert not agent.socket.exists()
    for name in ("source", "warm", "cold", "late"):
        podman.ask(name)


def sleeps(agent: Agent) -> bool:
    """Whether no thread of it ran for longer than any clock of a library that looks now and then."""
    before = agent.switches()
    time.sleep(1.5)
    return agent.switches() == before


def listed(agent: Agent, digest: str) -> dict[str, object]:
    """An image of the agent's list."""
    (found,) = (image for image in agent.one("List")["images"] if image["digest"] == digest)
    return found


def podman_pins(podman: Podman) -> list[int]:
    """Processes that pin images of podman's node."""
    found = json.loads(podman.node.smr("pin", "--list", "--json").stdout)
    return [pin["pid"] for pin in found]


def agent_replay(agent: Agent) -> list[dict[str, object]]:
    """What the node remembers, up to the second restore."""
    found: list[dict[str, object]] = []
    with agent.calling("Watch", replay=True) as client:
        assert client.stdout is not None
        while kinds(found).count("restored") < 2:
            found.append(json.loads(client.stdout.readline()))
    return found


@pytest.fixture
def source(podman: Podman) -> Iterator[str]:
    """A container with enough memory for a checkpoint that can be met in the middle."""
    podman.start("source", "memory")
    podman.ready("source")
    yield "source"


def first_stage(agent: Agent, name: str, image: str) -> Iterator[None]:
    """A checkpoint that has just frozen its container."""
    with agent.calling("Checkpoint", container=name, image=image) as client:
        assert client.stdout is not None
        while json.loads(client.stdout.readline())["stage"] != "dump":
            pass
        yield


def test_a_checkpoint_outlives_its_agent(podman: Podman, agent: Agent, source: str) -> None:
    """kill -9 of the agent in the middle of a checkpoint: the image is made all the same, the container runs on.

    Checkpoints by the command are counted as well.
    """
    for _ in first_stage(agent, source, "orphan:1"):
        agent.end(signal.SIGKILL)
    eventually(lambda: "orphan:1" in podman.node.smr("images", "ls").stdout, what="the image")
    podman.ask(source)
    agent.start()
    agent.counts("smr_checkpoints_total", "code=", "result=ok", value=1)
    podman.checkpoint(source, "Not-A-Name", check=False)
    agent.counts("smr_checkpoints_total", "code=annotation_invalid", "result=failed", value=1)


def test_a_client_that_goes_takes_its_checkpoint_back(podman: Podman, agent: Agent, source: str) -> None:
    """The caller is killed in the middle: no image, and the container runs on; the agent, too."""
    for _ in first_stage(agent, source, "unwanted:1"):
        pass
    eventually(lambda: not agent.workers(), what="the work ends")
    podman.ask(source)
    assert "unwanted" not in podman.node.smr("images", "ls").stdout
    assert not list((podman.node.store / "ingest").glob("*-*"))
    assert agent.one("Status")["pid"] == agent.pid


def test_commands_that_ask_the_agent(podman: Podman, agent: Agent, podman_warm: Warm) -> None:
    """smr agent status, list and watch speak with the agent that runs, and say so where none does."""
    podman.start("again", *podman_warm.features, annotations={"smr.restore": podman_warm.image})
    podman.ready("again")
    smr = podman.node.smr
    eventually(lambda: "restored" in smr("agent", "status").stdout)
    document = json.loads(smr("agent", "status", "--json").stdout)
    assert [one["image"] for one in document["containers"]] == [podman_warm.image]
    assert podman_warm.image in [tag for image in json.loads(smr("agent", "list", "--json").stdout) for tag in image["tags"]]
    assert podman_warm.image in smr("agent", "list").stdout
    missing = smr("agent", "status", "nope", "--json", check=False)
    assert (missing.returncode, json.loads(missing.stdout)["error"]["code"]) == (3, "container_not_found")
    second = smr("agent", "--listen=", check=False)
    assert second.returncode == 6
    assert str(agent.pid) in second.stderr
    agent.end()
    gone = smr("agent", "watch", check=False)
    assert gone.returncode == 7
    assert "systemctl start smr-agent" in gone.stderr
