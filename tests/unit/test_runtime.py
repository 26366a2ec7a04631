"""smr-runtime's decisions between the record and the real runtime; nothing is run."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from smr.proto.annotations import Annotations
from smr.proto.errors import Code, SmrError
from smr.shim import procs, runtime
from smr.shim.config import Config
from smr.shim.oci_args import parse_call
from smr.shim.state import ContainerState, Record, Status, begin, find


class BecameError(Exception):
    """The process would have become the real runtime."""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A node; becoming the real runtime raises."""

    def become(call: object, config: object, env: object = None) -> NoReturn:
        raise BecameError

    monkeypatch.setattr(runtime, "exec_real", become)
    monkeypatch.setattr(runtime, "real_runtime", lambda _: "/usr/bin/runc")
    return Config(store=tmp_path / "store", run=tmp_path / "run", log=tmp_path / "smr.log")


def record(config: Config, **values: object) -> ContainerState:
    """A record of container c1, restored and not yet started."""
    state = begin(config.run, Record(id="c1", root="", bundle="/b", image="llama", store=str(config.store)))
    state.record = replace(state.record, **{"status": Status.CREATED, **values})  # type: ignore[arg-type]
    state.save()
    state.created_marker.touch()
    return state


def alive(config: Config) -> ContainerState:
    """The same, with a first process that exists: this one."""
    return record(config, pid=os.getpid(), pid_started=procs.started(os.getpid()))


def answers(monkeypatch: pytest.MonkeyPatch, document: object, status: int = 0) -> list[list[str]]:
    """What the real runtime prints; returns the command lines it was called with."""
    calls: list[list[str]] = []

    def run(argv: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        calls.append(argv)
        return subprocess.CompletedProcess(argv, status, json.dumps(document).encode(), b"")

    monkeypatch.setattr(runtime.subprocess, "run", run)
    return calls


def dispatch(config: Config, line: str) -> int:
    """One call."""
    return runtime.dispatch(parse_call(line.split()), config)


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a b", "é", "../c1", "a~1", ""])
@pytest.mark.parametrize("verb", ["start", "state", "kill", "delete"])
def test_what_is_no_id_is_the_real_runtime_s_to_refuse(config: Config, verb: str, name: str) -> None:
    """An id is a folder's name here: "delete .." must not take every record with it."""
    kept = alive(config)
    call = parse_call([verb, name])
    with pytest.raises(BecameError):
        runtime.dispatch(call, config)
    assert kept.path.exists()


@pytest.mark.parametrize("name", ["c1", "a.b", "a_b-c+d", "..a", "-"])
def test_ids(name: str) -> None:
    """As runc allows them."""
    assert runtime._ID.fullmatch(name)


@pytest.mark.parametrize("verb", ["start", "kill", "delete"])
def test_unknown_container_is_the_real_runtime_s(config: Config, verb: str) -> None:
    """Without a record nothing is ours."""
    with pytest.raises(BecameError):
        dispatch(config, f"{verb} c1")


def test_state_of_a_created_container(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real runtime calls it running; until start it is created. Another process is not renamed."""
    alive(config)
    for pid, status in ((os.getpid(), "created"), (1, "running")):
        answers(monkeypatch, {"id": "c1", "status": "running", "pid": pid})
        assert dispatch(config, "state c1") == 0
        assert json.loads(capsys.readouterr().out)["status"] == status


def test_state_that_fails_keeps_its_status(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its output."""
    alive(config)
    answers(monkeypatch, "no JSON object", status=1)
    assert dispatch(config, "state c1") == 1


@pytest.mark.parametrize("signal", ["", "TERM", "SIGTERM", "15", "term", "INT", "HUP", "QUIT"])
def test_signal_that_ends_ends_a_created_container(config: Config, monkeypatch: pytest.MonkeyPatch, signal: str) -> None:
    """It is stopped, so that only KILL reaches it; it has run nothing that could handle another."""
    alive(config)
    calls = answers(monkeypatch, {})
    assert dispatch(config, f"--root /r kill --all c1 {signal}".replace("--root /r ", "")) == 0
    assert calls == [["/usr/bin/runc", "kill", "--all", "c1", "KILL"]]


@pytest.mark.parametrize("marker", [True, False])
def test_signal_to_a_container_that_has_just_started(config: Config, marker: bool) -> None:
    """start drops the marker and writes the record: from the first of them on the container handles its signals itself."""
    started = alive(config)
    if marker:
        started.record.status = Status.RESTORED
        started.save()
    else:
        started.created_marker.unlink()
    with pytest.raises(BecameError):
        dispatch(config, "kill c1 TERM")


@pytest.mark.parametrize("signal", ["KILL", "9", "USR1", "CONT", "SIGRTMIN+3"])
def test_other_signals_are_passed_on(config: Config, signal: str) -> None:
    """Untouched."""
    alive(config)
    with pytest.raises(BecameError):
        dispatch(config, f"kill c1 {signal}")


def test_start_of_another_container_of_the_same_id(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours was deleted past us, and one that is not ours has its id: the old record goes, the call is passed on."""
    kept = record(config, pid=1 << 23, pid_started=1.0)
    answers(monkeypatch, {"status": "created", "pid": 4711})
    with pytest.raises(BecameError):
        dispatch(config, "start c1")
    assert not kept.path.exists()


@pytest.mark.parametrize("document", [{"status": "stopped", "pid": 0}, {"status": "stopped", "pid": 1 << 23}, {}, []])
def test_start_of_a_tree_that_ended_before(config: Config, monkeypatch: pytest.MonkeyPatch, document: object) -> None:
    """RESTORE_FAILED; the record stays for delete."""
    kept = record(config, pid=1 << 23, pid_started=1.0)
    answers(monkeypatch, document)
    with pytest.raises(SmrError) as caught:
        dispatch(config, "start c1")
    assert caught.value.code is Code.RESTORE_FAILED
    assert kept.path.exists()


def test_second_start_is_the_real_runtime_s_to_refuse(config: Config) -> None:
    """A container that runs is not resumed again."""
    record(config, status=Status.RESTORED, pid=os.getpid(), pid_started=procs.started(os.getpid()))
    with pytest.raises(BecameError):
        dispatch(config, "start c1")


@pytest.mark.parametrize("status", [Status.CREATED, Status.RESTORED, Status.COLD])
def test_delete_drops_the_record_with_the_container(config: Config, monkeypatch: pytest.MonkeyPatch, status: Status) -> None:
    """And CRIU's directory, where start did not do it. A delete that fails for a container that runs keeps both."""
    kept = record(config, status=status, pid=os.getpid(), pid_started=procs.started(os.getpid()))
    kept.criu_dir.mkdir(parents=True)
    calls = answers(monkeypatch, {}, status=1)
    assert dispatch(config, "delete c1") == 1
    assert kept.path.exists()
    calls = answers(monkeypatch, {})
    assert dispatch(config, "delete --force c1") == 0
    assert calls == [["/usr/bin/runc", "delete", "--force", "c1"]]
    assert not kept.path.exists()
    assert not kept.criu_dir.exists()


def test_delete_of_a_container_that_the_runtime_has_forgotten(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real runtime's error and status, and no record."""
    kept = record(config, root=f"{config.run}/runc", owner_pid=1 << 23, pid=1 << 23)
    answers(monkeypatch, {}, status=1)
    assert dispatch(config, "delete c1") == 1
    assert not kept.path.exists()


@pytest.mark.parametrize("status", [Status.RESTORING, Status.FAILED])
@pytest.mark.parametrize("problems", [[], ["busy"]])
def test_delete_undoes_what_never_ended(
    config: Config, monkeypatch: pytest.MonkeyPatch, status: Status, problems: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The record goes if that worked; else it stays, and the problem is told."""
    kept = record(config, status=status)
    monkeypatch.setattr("smr.shim.undo.undo", lambda _: problems)
    answers(monkeypatch, {})
    dispatch(config, "delete --force c1")
    assert kept.path.exists() == bool(problems)
    assert ("busy" in capsys.readouterr().err) == bool(problems)


def test_record_that_goes_meanwhile(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever lost the race hands the call on."""
    kept = alive(config)
    original = runtime.find

    def find_and_drop(*words: object) -> ContainerState | None:
        found = original(*words)  # type: ignore[arg-type]
        kept.remove()
        return found

    monkeypatch.setattr(runtime, "find", find_and_drop)
    for verb in ("start", "delete"):
        with pytest.raises(BecameError):
            dispatch(config, f"{verb} c1")


def test_failure_that_can_be_taken_back(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error goes back to who decides on a cold start; nothing is kept."""
    kept, error = record(config, status=Status.RESTORING), SmrError("no", code=Code.CRIU_FAILED)
    monkeypatch.setattr("smr.shim.undo.undo", lambda _: [])
    assert runtime._failed(kept, config, error) is error
    assert not kept.path.exists()


def test_failure_that_cannot_be_taken_back_forbids_a_cold_start(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-restored root must not run: the error is raised, and the record is kept for another try."""
    kept, error = record(config, status=Status.RESTORING), SmrError("CRIU failed", code=Code.CRIU_FAILED)
    monkeypatch.setattr("smr.shim.undo.undo", lambda _: ["undoing root filesystem of c1: Input/output error"])
    with pytest.raises(SmrError) as caught:
        runtime._failed(kept, config, error)
    assert caught.value.code is Code.CRIU_FAILED
    assert "CRIU failed" in caught.value.message
    assert "Input/output error" in caught.value.message
    found = find(config.run, "", "c1")
    assert found is not None
    assert (found.record.status, found.record.reason) == (Status.FAILED, "CRIU failed")


def test_cold_start_says_why_in_every_place(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The runtime's log, stderr, the container's annotations, the record and our log."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    spec = {"ociVersion": "1.0.2", "annotations": {"smr.restore": "llama"}, "process": {"args": ["sh"]}, "zz": 1}
    (bundle / "config.json").write_text(json.dumps(spec))
    (bundle / "config.json").chmod(0o644)
    call = parse_call(["--log", str(tmp_path / "log"), "--log-format", "json", "create", "--bundle", str(bundle), "c1"])
    error = SmrError("no image llama", hint="smr images ls", code=Code.IMAGE_NOT_FOUND)
    runtime.start_cold(call, config, Annotations(restore="llama"), error)
    assert "no image llama (smr images ls)" in json.loads((tmp_path / "log").read_text())["msg"]
    assert "no image llama" in capsys.readouterr().err
    changed = json.loads((bundle / "config.json").read_text())
    status = {"smr.status": "cold", "smr.status.code": "image_not_found", "smr.status.reason": "no image llama (smr images ls)"}
    assert changed == {**spec, "annotations": {"smr.restore": "llama", **status}}
    assert (bundle / "config.json").stat().st_mode & 0o777 == 0o644
    found = find(config.run, "", "c1")
    assert found is not None
    assert (found.record.status, found.record.reason_code) == (Status.COLD, "image_not_found")
    assert json.loads(config.log.read_text())["event"] == "started_cold"
