"""Automatic capture: what its annotations say, whether a container is ready, and under which tag its image goes."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from smr.proto.annotations import Annotations, parse
from smr.proto.capture import Capture, parse_capture
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec, parse_spec
from smr.shim import capture, capture_key, readiness
from smr.shim.asked import asked
from smr.shim.config import Config
from tests.unit.test_pod import CONTAINERD

ME = ("runc", "")


def of_pod(keys: Mapping[str, str], container: str = "server", namespace: str = "shop") -> dict[str, str]:
    names = {"io.kubernetes.cri.container-name": container, "io.kubernetes.cri.sandbox-namespace": namespace}
    return {**CONTAINERD, **names, **keys}


def spec(annotations: Mapping[str, str], *args: str) -> Spec:
    return parse_spec({"process": {"args": list(args or ("serve",))}, "annotations": dict(annotations)})


def test_what_is_asked_for() -> None:
    """All of it, with its defaults."""
    keys = {"smr.capture": "llama", "smr.capture.ready": "tcp::8000", "smr.capture.after": "2.5", "smr.capture.timeout": "60"}
    assert parse_capture(keys) == Capture(name="llama", ready="tcp::8000", after_s=2.5, timeout_s=60.0)
    assert parse_capture({"smr.capture": "llama"}) == Capture(name="llama", timeout_s=1800.0)
    assert parse_capture({"smr.restore": "llama"}) is None
    assert parse({"smr.capture": "llama"}) is None


def test_which_container_of_a_pod() -> None:
    """As named; by the only key that names one; else it has to show itself."""
    keys = {"smr.capture": "llama"}
    assert parse_capture(of_pod(keys)) == Capture(name="llama", sole=True)
    for naming in ({"smr.container": "server"}, {"smr.restore.server": "llama"}):
        assert parse_capture(of_pod({**keys, **naming})) == Capture(name="llama")
        assert parse_capture(of_pod({**keys, **naming}, "sidecar")) is None
    both = {"smr.restore.server": "llama", "smr.restore.other": "llama"}
    assert parse_capture(of_pod({**keys, **both})) == Capture(name="llama", sole=True)


def test_a_name_of_the_nodes_own() -> None:
    """By namespace and container, so that pods of one deployment share it."""
    found = parse_capture(of_pod({"smr.capture": "auto"}))
    assert found is not None
    assert found.name == "auto/shop/server"


@pytest.mark.parametrize(
    "ready", ["signal:USR1", "vllm", "http://:8000/a ; http://:8000/b", "exec:", "tcp:name:80", "tcp::99999"]
)
def test_readiness_that_is_none(ready: str) -> None:
    """One request, one port or one command; anything else fails the container."""
    with pytest.raises(SmrError, match=r"smr\.capture\.ready") as caught:
        asked(spec({"smr.capture": "llama", "smr.capture.ready": ready}))
    assert caught.value.code is Code.ANNOTATION_INVALID


@pytest.fixture
def listener() -> socket.socket:
    """A TCP socket of this process that listens."""
    made = socket.create_server(("127.0.0.1", 0))
    with made:
        yield made  # type: ignore[misc]


def test_ports_of_a_container_are_its_own(listener: socket.socket) -> None:
    """A port that somebody else in the network namespace listens on does not count."""
    port = listener.getsockname()[1]
    assert readiness.listens(os.getpid(), port)
    assert readiness.listens(os.getpid())
    listener.close()
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert not readiness.listens(os.getpid(), port)
        assert readiness.listens(os.getpid(), other.getsockname()[1])


def test_probes(listener: socket.socket) -> None:
    """Empty when it is ready, else why not."""
    port = listener.getsockname()[1]
    assert readiness.parse("", os.getpid(), ME, "c")() == ""
    assert readiness.parse(f"tcp::{port}", os.getpid(), ME, "c")() == ""
    listener.close()
    assert "refused" in readiness.parse(f"tcp::{port}", os.getpid(), ME, "c")()
    assert "refused" in readiness.parse(f"http://:{port}/health", os.getpid(), ME, "c")()


@pytest.mark.parametrize(
    ("text", "port"),
    [
        ("", 0),
        ("tcp::8000", 8000),
        ("http://:80/x", 80),
        ("GET http://[::1]:81/x", 81),
        ("exec:true", 0),
        ("unix:///a.sock:/x", 0),
    ],
)
def test_the_port_that_a_readiness_names(text: str, port: int) -> None:
    """It shows whose container is meant."""
    assert readiness.port_of(text) == port


def test_facts_of_a_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    """Command, CPU and namespace make a difference; the name of a pod and of its node do not."""
    config = Config()
    base = capture_key.facts_of(spec(of_pod({})), config)
    assert capture_key.facts_of(spec(of_pod({"io.kubernetes.cri.sandbox-name": "other"})), config) == base
    assert capture_key.facts_of(spec(of_pod({}), "other"), config) != base
    elsewhere = spec(of_pod({}, namespace="bank"))
    assert capture_key.facts_of(elsewhere, config) != base
    shared = replace(config, image_namespaces="any")
    assert capture_key.facts_of(elsewhere, shared) == capture_key.facts_of(spec(of_pod({})), shared)
    monkeypatch.setattr(capture_key.preflight, "cpu_flags", lambda: ("avx2", "sve2"))
    assert capture_key.facts_of(spec(of_pod({})), config) != base


@pytest.fixture
def tags(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tags of the store."""
    found: list[str] = []
    monkeypatch.setattr(capture_key.Store, "tags", lambda self, name: found if name == "llama" else [])
    return found


def resolve(restore: str, keys: Mapping[str, str] | None = None) -> str:
    annotations = Annotations(restore=restore)
    return capture_key.resolve(annotations, spec(keys or {}), Path("/b"), "c", Config())


def test_a_name_resolves_to_this_nodes_image(tags: list[str]) -> None:
    """Images of other facts are passed by; a tag of the user's own is left alone, and so is a name that has none of ours."""
    mine = capture_key.facts_of(spec({}), Config())
    assert resolve("llama") == "llama"
    tags += ["latest", "k000000000000-111111111111"]
    assert resolve("llama") == "llama"
    tags.append(f"k{mine}-111111111111")
    assert resolve("llama") == f"llama:k{mine}-111111111111"
    assert resolve("auto", {"smr.capture": "llama"}) == f"llama:k{mine}-111111111111"
    assert resolve("llama:latest") == "llama:latest"
    assert resolve("sha256:123456") == "sha256:123456"


def test_the_engine_is_asked_where_several_container_images_have_the_facts(
    tags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only there, because it takes time."""
    mine = capture_key.facts_of(spec({}), Config())
    tags += [f"k{mine}-111111111111", f"k{mine}-222222222222"]
    digest = "sha256:222222222222" + "f" * 52
    monkeypatch.setattr(capture_key, "image_of", lambda bundle, container: digest)
    assert resolve("llama") == f"llama:k{mine}-222222222222"
    assert capture_key.tag(mine, digest) == f"k{mine}-222222222222"
    assert capture_key.tag(mine, "") == f"k{mine}-000000000000"


def test_failures_are_counted_in_the_lock(tmp_path: Path) -> None:
    """So that a container that cannot be captured is not paused for every replica."""
    with (tmp_path / "lock").open("w+b") as file:
        count = capture._Count(file.fileno())
        assert count() == 0
        assert count(1) == 1
        assert count(1) == 2
        assert capture._Count(file.fileno())() == 2


def test_not_captured_yet_is_no_failure() -> None:
    """For a container that asks to fail rather than to start cold."""
    missing = SmrError("no image", code=Code.IMAGE_NOT_FOUND)
    assert capture.wanted_despite(missing, {"smr.capture": "llama"})
    assert not capture.wanted_despite(missing, {})
    assert not capture.wanted_despite(SmrError("x", code=Code.CPU_MISMATCH), {"smr.capture": "llama"})
