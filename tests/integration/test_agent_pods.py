"""The node agent beside containerd's CRI: pods learn why they were not restored, and are checkpointed by a call."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.agent import Agent, ended
from tests.integration.api_server import ApiServer
from tests.integration.command import eventually
from tests.integration.cri import Cri, CriError


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiServer]:
    """The cluster's API server; its secrets are where SMR_SERVICEACCOUNT says."""
    with ApiServer(tmp_path / "serviceaccount").serving() as server:
        yield server


@pytest.fixture
def agent(cri_2: Cri, api: ApiServer) -> Iterator[Agent]:
    """The agent of containerd's node, as a pod runs it."""
    run_dir = cri_2.node.run_dir
    for file in (*(run_dir / "events").glob("*"), *(run_dir / "agent").glob("*")):
        file.unlink()
    cluster = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(api.port), "NODE_NAME": "node-1"}
    env = {**cri_2.env, **cluster, "SMR_SERVICEACCOUNT": str(api.secrets)}
    found = Agent(run_dir, env, [cri_2.node.bin / "smr", "agent"])
    with ended(found):
        found.start()
        yield found


def test_a_pods_way_through_an_agent(cri_2: Cri, agent: Agent, api: ApiServer) -> None:
    """A pod without an image is told so; a call makes its container one; what is restored without an agent, the next counts."""
    pod = cri_2.run_pod("llama-0", {"smr.restore": "pods-agent:1"}, namespace="shop")
    container = cri_2.run_container(pod, "server", "workers")
    (event,) = eventually(lambda: list(api.events.values()), what="the event")
    regarding = {"apiVersion": "v1", "kind": "Pod", "namespace": "shop", "name": "llama-0", "uid": pod.uid}
    assert event["regarding"] == {**regarding, "fieldPath": "spec.containers{server}"}
    assert (event["reason"], event["reportingInstance"]) == ("SmrStartedCold", "node-1")
    assert "no image pods-agent:1" in str(event["note"])
    assert str(event["note"]).endswith("[image_not_found]")
    told = {"namespace": "shop", "name": "llama-0", "uid": pod.uid, "container": "server"}
    assert [one["pod"] for one in agent.one("Status", container=container)["containers"]] == [told]
    cri_2.answers(pod)
    count = int(str(cri_2.query(pod, "server", "count")["count"]))
    made = agent.call("Checkpoint", container=container, image="pods-agent:1")[-1]["result"]
    assert (made["image"], made["container"]) == ("pods-agent:1", container)
    wrong = cri_2.run_pod("typo", {"smr.resotre": "pods-agent:1"}, namespace="shop")
    with pytest.raises(CriError):
        cri_2.run_container(wrong, "server", "workers")
    eventually(lambda: [one["reason"] for one in api.events.values()] == ["SmrStartedCold", "SmrRestoreFailed"], what="both")
    agent.end(signal.SIGKILL)
    again = cri_2.run_pod("llama-1", {"smr.restore": "pods-agent:1", "smr.fallback": "fail"}, namespace="shop")
    cri_2.run_container(again, "server", "workers")
    assert cri_2.query(again, "server", "count")["count"] == count + 1
    agent.start()
    agent.counts("smr_restores_total", "code=", "result=restored", value=1)
    assert agent.metrics()["smr_restores_total", "code=image_not_found", "result=cold"] == 1
    assert len(api.events) == 2
