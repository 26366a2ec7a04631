"""Keys that name a container which a pod does not have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from smr.proto.oci import parse_spec
from smr.shim import podnames
from smr.shim.config import Config
from tests.unit.test_pod import CONTAINERD


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A node of its own, which waits for nothing."""
    made = Config(run=tmp_path / "run", log=tmp_path / "smr.log", pod_names_wait_s=0)
    monkeypatch.setattr(podnames.settings, "load", lambda: made)
    (tmp_path / "bundles/s1").mkdir(parents=True)
    return made


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Mapping[str, str]]]:
    """Waiting processes that would have been started."""
    found: list[tuple[Path, Mapping[str, str]]] = []
    monkeypatch.setattr(podnames, "_start", lambda path, pod, annotations: found.append((path, annotations)))
    return found


def create(config: Config, container: str, keys: Mapping[str, str]) -> None:
    spec = parse_spec({"annotations": {**CONTAINERD, "io.kubernetes.cri.container-name": container, **keys}})
    podnames.note(spec, config.run.parent / "bundles/c1", config)


def journal(config: Config) -> list[dict[str, object]]:
    file = config.run / "events/journal"
    return [entry for line in file.read_text().splitlines() if "event" in (entry := json.loads(line))] if file.exists() else []


def wait(started: list[tuple[Path, Mapping[str, str]]]) -> None:
    path, annotations = started[0]
    podnames.main([str(path), json.dumps(dict(annotations))])


def test_a_pod_whose_names_are_all_there(config: Config, started: list[tuple[Path, Mapping[str, str]]]) -> None:
    """Nobody waits where the first container is the one; else until it comes."""
    create(config, "server", {"smr.restore.server": "app"})
    assert started == []
    keys = {"smr.restore.server": "app", "smr.restore.second": "app", "io.kubernetes.cri.sandbox-uid": "u-2"}
    create(config, "server", keys)
    create(config, "second", keys)
    assert len(started) == 1
    wait(started)
    assert journal(config) == []


@pytest.mark.parametrize("key", ["smr.restore.serverr", "smr.container"])
def test_a_name_that_never_comes(config: Config, started: list[tuple[Path, Mapping[str, str]]], key: str) -> None:
    """One event, which names the key and the containers that there are."""
    keys = {key: "app" if key != "smr.container" else "serverr", "smr.restore": "app"}
    create(config, "server", keys)
    create(config, "sidecar", keys)
    assert len(started) == 1
    wait(started)
    (event,) = journal(config)
    assert (event["event"], event["code"]) == ("restore_failed", "annotation_invalid")
    assert f"annotation {key}: pod web-0 had no container serverr within 0 s, but server, sidecar" in str(event["reason"])


def test_a_pod_that_is_gone_is_not_told(config: Config, started: list[tuple[Path, Mapping[str, str]]]) -> None:
    """It may have been removed before its second container came."""
    create(config, "server", {"smr.restore.other": "app"})
    (config.run.parent / "bundles/s1").rmdir()
    wait(started)
    assert journal(config) == []


def test_pods_without_such_keys_leave_nothing(config: Config, started: list[tuple[Path, Mapping[str, str]]]) -> None:
    """No file, no process."""
    create(config, "server", {"smr.restore": "app"})
    assert not (config.run / "pods").exists()
    assert started == []
