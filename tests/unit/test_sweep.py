"""`smr gc` and a create that finds an old record: what is left of containers goes, what is in use stays."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from smr.proto.errors import Code, SmrError
from smr.shim import cold, procs, sweep
from smr.shim.config import Config
from smr.shim.state import ContainerState, Record, Status, begin, find

_NOBODY = 1 << 23


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A node of its own; the runtime's root is a folder of it too."""
    return Config(store=tmp_path / "store", run=tmp_path / "run", runtime="/usr/bin/runc")


def record(config: Config, name: str = "c1") -> Record:
    """A record of a container whose runtime keeps its state below the node's folder."""
    return Record(id=name, root=f"{config.run}/runc", bundle="/b", image="llama:warm", store=str(config.store))


def left(config: Config, name: str = "c1", status: Status = Status.RESTORED, **values: object) -> ContainerState:
    """A record as a process that is gone has left it."""
    state = begin(config.run, record(config, name))
    state.record = replace(state.record, status=status, owner_pid=_NOBODY, **values)  # type: ignore[arg-type]
    state.save()
    return state


def undone(monkeypatch: pytest.MonkeyPatch, problems: list[str]) -> list[str]:
    """Replace the undo; returns the ids it is called with."""
    calls: list[str] = []

    def undo(state: ContainerState) -> list[str]:
        calls.append(state.record.id)
        return problems

    monkeypatch.setattr(sweep, "undo", undo)
    return calls


@pytest.mark.parametrize("status", [Status.CREATED, Status.RESTORED, Status.COLD])
def test_record_of_a_container_that_the_runtime_forgot(config: Config, monkeypatch: pytest.MonkeyPatch, status: Status) -> None:
    """Dropped, nothing undone."""
    state, calls = left(config, status=status), undone(monkeypatch, [])
    assert sweep.sweep(config).containers == ["c1"]
    assert not state.path.exists()
    assert calls == []


@pytest.mark.parametrize("status", [Status.CREATED, Status.RESTORED, Status.COLD])
def test_container_that_the_runtime_knows_stays(config: Config, status: Status) -> None:
    """Running, or ended and not yet deleted."""
    state = left(config, status=status)
    (config.run / "runc" / "c1").mkdir(parents=True)
    assert sweep.sweep(config).containers == []
    assert state.path.exists()


def test_container_that_runs_stays(config: Config) -> None:
    """Its first process is there, wherever the runtime keeps its state."""
    left(config, pid=os.getpid(), pid_started=procs.started(os.getpid()))
    assert sweep.sweep(config).containers == []
    left(config, "c2", pid=os.getpid(), pid_started=1.0)
    assert sweep.sweep(config).containers == ["c2"]


@pytest.mark.parametrize("status", [Status.RESTORING, Status.FAILED])
def test_create_that_never_ended_is_undone(config: Config, monkeypatch: pytest.MonkeyPatch, status: Status) -> None:
    """Undone, then dropped, whether the runtime knows it or not."""
    left(config, status=status)
    (config.run / "runc" / "c1").mkdir(parents=True)
    calls = undone(monkeypatch, [])
    assert sweep.sweep(config).containers == ["c1"]
    assert calls == ["c1"]
    assert find(config.run, f"{config.run}/runc", "c1") is None


def test_what_cannot_be_undone_keeps_its_record(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is what a second try needs; the problem is told."""
    state = left(config, status=Status.RESTORING)
    undone(monkeypatch, ["undoing mounts of c1: busy"])
    swept = sweep.sweep(config)
    assert (swept.containers, swept.problems) == ([], ["undoing mounts of c1: busy"])
    assert state.path.exists()


def test_create_under_way_is_left_alone(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner lives, or somebody holds its lock."""
    calls = undone(monkeypatch, [])
    begin(config.run, record(config, "mine"))
    held = left(config, "held", status=Status.RESTORING)
    with held.locked():
        assert sweep.sweep(config).containers == []
    assert calls == []
    assert sweep.sweep(config).containers == ["held"]


def test_restore_directories_without_a_record(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go, but for those of a record and those that a process has open; other folders of the store are not looked at."""
    kept = begin(config.run, record(config)).criu_dir
    open_one, orphan = kept.with_name("open"), kept.with_name("orphan")
    for folder in (kept, open_one, orphan, config.store / "blobs"):
        folder.mkdir(parents=True)
        (folder / "core-1.img").touch()
    (kept.with_name("file")).touch()
    (kept.with_name("link")).symlink_to(config.store / "blobs")
    monkeypatch.setattr(procs, "holding", lambda *folders: [1] if open_one in folders else [])
    assert sweep.sweep(config).restores == 3
    assert sorted(path.name for path in kept.parent.iterdir()) == sorted([kept.name, "open"])
    assert (config.store / "blobs" / "core-1.img").exists()


def test_sweep_of_a_node_without_anything(config: Config) -> None:
    """Nothing there, nothing made."""
    assert sweep.sweep(config) == sweep.Swept()
    assert not config.run.exists()
    assert not config.store.exists()


def test_create_takes_the_place_of_a_stale_record(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id may be used again after a kill -9, or a delete that went past us."""
    old = left(config, status=Status.RESTORING)
    old.created_marker.touch()
    calls = undone(monkeypatch, [])
    state = cold.begin_record(config, record(config))
    assert calls == ["c1"]
    assert state.owner_alive()
    assert not state.created_marker.exists()


def test_create_beside_a_living_container_is_refused(config: Config) -> None:
    """The id is in use."""
    left(config, pid=os.getpid(), pid_started=procs.started(os.getpid()))
    with pytest.raises(SmrError) as caught:
        cold.begin_record(config, record(config))
    assert caught.value.code is Code.CONTAINER_STATE
