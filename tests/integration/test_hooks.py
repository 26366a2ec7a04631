"""smr-hook as podman and CRI-O call it: JSON on stdin, the protocol on stdout, never a container that fails for it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from smr.hooks import main as hooks
from smr.proto.annotations import OWN_STATUS
from smr.shim.config import Config
from smr.shim.state import ContainerState, Record, Status, begin, find

Hook = Callable[..., subprocess.CompletedProcess[bytes]]
STAGES = ["precreate", "prestart", "createRuntime", "poststop"]


@pytest.fixture
def hook(tmp_path: Path) -> Hook:
    """The installed program, with a state directory and a store of its own."""
    env = {
        "PATH": os.environ["PATH"],
        "SMR_RUN": str(tmp_path / "run"),
        "SMR_STORE": str(tmp_path / "store"),
        "SMR_CONFIG": str(tmp_path / "smr.toml"),
    }

    def run(*words: str, stdin: bytes = b"{}") -> subprocess.CompletedProcess[bytes]:
        argv = [sys.executable, "-I", "-m", "smr.hooks.main", *words]
        return subprocess.run(argv, env=env, input=stdin, capture_output=True, check=False, timeout=60)

    return run


def spec(**annotations: str) -> bytes:
    """A spec as an engine prints it: with white space and members that nobody here knows."""
    names = {key.replace("__", "."): value for key, value in annotations.items()}
    return json.dumps({"ociVersion": "1.1.0", "zz": [1, None, "é"], "annotations": names}, indent=3).encode() + b"\n"


def kept(tmp_path: Path, status: Status) -> ContainerState:
    """A record of container c1 in bundle /b."""
    state = begin(tmp_path / "run", Record(id="c1", root="/run/runc", bundle="/b", image="llama"))
    state.record = replace(state.record, status=status)
    state.save()
    return state


@pytest.mark.parametrize(
    "text",
    [
        spec(),
        spec(other="1"),
        spec(smr__restore="llama:warm"),
        spec(smr__resotre="llama"),
        spec(smr__restore="Not A Name"),
        spec(**dict.fromkeys(OWN_STATUS, "cold")),
        b"{}",
        b"[]",
        b"not JSON",
        b'{"a":"\xff\x00"}\r\n',
        b"",
        b'{"annotations": []}',
        b'{"annotations": {"smr.restore": 3}}',
        b'{"process": 1, "annotations": {"smr.restore": "llama"}}',
    ],
)
def test_precreate_passes_the_spec_through(hook: Hook, text: bytes) -> None:
    """Byte for byte, whatever it is: the engine takes what comes out for the container's spec."""
    done = hook("precreate", stdin=text)
    assert (done.returncode, done.stdout) == (0, text)


@pytest.mark.parametrize(("text", "word"), [(spec(smr__resotre="a"), b"smr.restore?"), (b"not JSON", b"smr-hook precreate: ")])
def test_what_is_wrong_is_said_on_stderr(hook: Hook, text: bytes, word: bytes) -> None:
    """One line that the engine logs."""
    done = hook("precreate", stdin=text)
    assert word in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_bad_settings_fail_no_container(hook: Hook, tmp_path: Path) -> None:
    """They are said."""
    (tmp_path / "smr.toml").write_text("[smr")
    for stage in STAGES:
        done = hook(stage)
        assert done.returncode == 0
        assert b"smr.toml" in done.stderr


def test_prefetch_of_the_annotated_image_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """precreate reads ahead what smr.restore names, and nothing for other containers."""
    started: list[str] = []
    monkeypatch.setattr("smr.shim.containerd_shim.start_prefetch_of", lambda _, reference: started.append(reference))
    for text in (spec(), spec(smr__restore="llama:warm"), spec(smr__restore="llama", io__kubernetes__cri__x="y")):
        hooks.precreate(json.loads(text), Config())
    assert started == ["llama:warm", "llama"]


@pytest.mark.parametrize("stage", ["prestart", "createRuntime"])
@pytest.mark.parametrize("state", [b"{}", b'{"pid": 0}', b'{"pid": -1}', b'{"pid": "1"}', b'{"pid": 8388608}', b'{"pid": null}'])
def test_start_stages_with_a_process_that_is_not_there(hook: Hook, stage: str, state: bytes) -> None:
    """Nothing to do, and no reason to fail."""
    done = hook(stage, stdin=state)
    assert (done.returncode, done.stdout) == (0, b"")


def test_start_stage_leaves_the_network_of_the_host_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container of --network host: its namespace is ours."""
    touched: list[Path] = []
    monkeypatch.setattr("smr.shim.network.loopback_up", touched.append)
    hooks.create_runtime({"pid": os.getpid()}, Config())
    assert touched == []


def test_start_stage_sets_lo_up(hook: Hook) -> None:
    """In a network namespace that is new, as CRIU makes it; a second time it is up already."""
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"no network namespace of our own: {probe.stderr.strip()}")
    process = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert not _lo_is_up(process.pid)
        for _ in range(2):
            done = hook("createRuntime", stdin=json.dumps({"pid": process.pid}).encode())
            assert (done.returncode, done.stderr) == (0, b"")
            assert _lo_is_up(process.pid)
    finally:
        process.communicate(timeout=30)


def _lo_is_up(pid: int) -> bool:
    """A local route to 127.0.0.1 is there once `lo` is up."""
    return "127.0.0.1" in Path(f"/proc/{pid}/net/fib_trie").read_text()


@pytest.mark.parametrize("status", [Status.CREATED, Status.RESTORED, Status.COLD])
def test_poststop_drops_the_record(hook: Hook, tmp_path: Path, status: Status) -> None:
    """Of this container in this bundle, not of another with its id."""
    kept(tmp_path, status)
    for other in ({"id": "c2", "bundle": "/b"}, {"id": "c1", "bundle": "/other"}, {}):
        assert hook("poststop", stdin=json.dumps(other).encode()).returncode == 0
        assert find(tmp_path / "run", "/run/runc", "c1") is not None
    assert hook("poststop", stdin=b'{"id": "c1", "bundle": "/b"}').returncode == 0
    assert find(tmp_path / "run", "/run/runc", "c1") is None
    assert list((tmp_path / "run/containers").iterdir()) == []


@pytest.mark.parametrize("status", [Status.RESTORING, Status.FAILED])
def test_poststop_leaves_what_is_to_be_undone(hook: Hook, tmp_path: Path, status: Status) -> None:
    """The undo of a create deletes at the real runtime, which runs this hook, and needs its record still."""
    kept(tmp_path, status)
    assert hook("poststop", stdin=b'{"id": "c1", "bundle": "/b"}').returncode == 0
    assert find(tmp_path / "run", "/run/runc", "c1") is not None


def test_poststop_never_waits_for_the_delete_that_runs_it(hook: Hook, tmp_path: Path) -> None:
    """smr-runtime delete holds the record's lock while the real runtime runs the hook: it drops the record itself."""
    state = kept(tmp_path, Status.RESTORED)
    with (state.path / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert hook("poststop", stdin=b'{"id": "c1", "bundle": "/b"}').returncode == 0
    assert find(tmp_path / "run", "/run/runc", "c1") is not None


@pytest.mark.parametrize("words", [[], ["no-such-stage"], ["precreate", "x"], ["--help"]])
def test_wrong_call_says_how(hook: Hook, words: list[str]) -> None:
    """The one thing that fails: a hook that was configured wrongly."""
    done = hook(*words)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"usage: smr-hook precreate|")
