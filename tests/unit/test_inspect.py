"""What `smr ps` and `smr inspect` say of the containers SMR knows."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from smr.proto.errors import Code, SmrError
from smr.shim import inspect, procs
from smr.shim.config import Config
from smr.shim.state import ContainerState, Record, Stage, Status, begin

_NOBODY = 1 << 23


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A node without podman."""
    monkeypatch.setenv("PATH", "/nonexistent")
    return Config(run=tmp_path / "run")


def kept(config: Config, name: str = "c1", **values: object) -> ContainerState:
    """A record whose owner is gone."""
    state = begin(config.run, Record(id=name, root="", bundle="/b", image="llama:warm"))
    state.record = replace(state.record, **{"owner_pid": _NOBODY, **values})  # type: ignore[arg-type]
    state.save()
    return state


ALIVE = {"pid": os.getpid(), "pid_started": procs.started(os.getpid())}
GONE = {"pid": _NOBODY, "pid_started": 1.0}


@pytest.mark.parametrize(
    ("values", "marker", "status"),
    [
        ({"status": Status.RESTORING}, False, "broken"),
        ({"status": Status.RESTORING, "owner_pid": os.getpid()}, False, "restoring"),
        ({"status": Status.CREATED, **ALIVE}, True, "created"),
        ({"status": Status.CREATED, **ALIVE}, False, "restored"),
        ({"status": Status.CREATED, **GONE}, True, "exited"),
        ({"status": Status.RESTORED, **ALIVE}, False, "restored"),
        ({"status": Status.RESTORED, **GONE}, False, "exited"),
        ({"status": Status.COLD}, False, "cold"),
        ({"status": Status.FAILED}, False, "failed"),
    ],
)
def test_status(config: Config, values: dict[str, object], marker: bool, status: str) -> None:
    """The record's, unless the processes say otherwise."""
    state = kept(config, **values)
    if marker:
        state.created_marker.touch()
    assert inspect.summary_of(state).status == status


def test_summaries_of_all(config: Config) -> None:
    """Each container once, with its reason and the time that SMR's stages took."""
    stages = [Stage(name="locate", start_s=0.0, end_s=0.25), Stage(name="start", start_s=9.0, end_s=9.25)]
    kept(config, "c1", status=Status.COLD, reason="no image", reason_code="image_not_found", stages=stages)
    kept(config, "c2", status=Status.RESTORED, **ALIVE)
    first, second = inspect.summaries(config)
    assert (first.id, first.reason, first.reason_code, first.total_s) == ("c1", "no image", "image_not_found", 0.5)
    assert (second.id, second.pid) == ("c2", os.getpid())
    assert first.as_json().keys() >= {"id", "status", "image", "reason", "total_s"}


def test_found_by_id_or_its_beginning(config: Config) -> None:
    """An exact id wins over longer ones."""
    for name in ("abc", "abcd", "xyz"):
        kept(config, name)
    assert inspect.find(config, "abc").record.id == "abc"
    assert inspect.find(config, "x").record.id == "xyz"


@pytest.mark.parametrize(("name", "message"), [("ab", "names 2 containers"), ("q", "knows no container q")])
def test_not_found_or_ambiguous(config: Config, name: str, message: str) -> None:
    """CONTAINER_NOT_FOUND, and what to type instead."""
    for known in ("abc", "abd"):
        kept(config, known)
    with pytest.raises(SmrError) as caught:
        inspect.find(config, name)
    assert caught.value.code is Code.CONTAINER_NOT_FOUND
    assert message in caught.value.message
    assert caught.value.hint
