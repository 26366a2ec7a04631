"""`smr restore`: the engine's own command for the same container as the checkpoint's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from smr.proto.checkpoint import CheckpointConfig, Host, Source
from smr.proto.errors import Code, SmrError
from smr.shim import launch

CONFIG = CheckpointConfig(
    created="2025-03-01T10:00:00.000+00:00",
    host=Host(architecture="x86_64", kernel="6.8.1", criu="4.1.1", runtime="runc"),
    source=Source(engine="podman", container_id="f" * 64, image="llama:1"),
    spec={
        "process": {"args": ["serve", "--port", "80"]},
        "linux": {"namespaces": [{"type": "network", "path": "/run/netns/n"}]},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/etc/hosts", "type": "bind", "source": "/srv/hosts"},
            {"destination": "/dev/shm", "type": "bind", "source": "/var/lib/containers/storage/x/shm"},
            {"destination": "/etc/mine", "type": "bind", "source": f"/scratch/{'f' * 64}/userdata/mine"},
            {"destination": "/models", "type": "bind", "source": "/srv/models", "options": ["rbind", "ro"]},
            {"destination": "/data", "type": "bind", "source": "/srv/data", "options": ["rbind"]},
        ],
    },
)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command on every machine."""
    monkeypatch.setattr(launch.procs, "has_capability", lambda _: True)
    for name in ("SMR_PODMAN", "SMR_CTR", "CONTAINERD_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def changed(**values: object) -> CheckpointConfig:
    """The config with members of its spec replaced."""
    return replace(CONFIG, spec={**CONFIG.spec, **values})


def test_podman() -> None:
    """Runtime, annotation, the user's mounts, image and command; what podman makes by itself is left to it."""
    assert launch.command("llama:warm", CONFIG, "auto", "two", ("-p", "80:80")) == [
        *("podman", "run", "--detach", "--runtime", "smr", "--annotation", "smr.restore=llama:warm"),
        *("--name", "two", "--volume", "/srv/models:/models:ro", "--volume", "/srv/data:/data", "-p", "80:80"),
        *("llama:1", "serve", "--port", "80"),
    ]


def test_containerd() -> None:
    """The shim as runtime, mounts in ctr's form, the container's id before the command."""
    assert launch.command("llama:warm", CONFIG, "containerd", "two", ("--env", "A=1")) == [
        *("ctr", "--address", "/run/containerd/containerd.sock", "--namespace", "default"),
        *("run", "--detach", "--runtime", "io.containerd.smr.v1", "--annotation", "smr.restore=llama:warm"),
        *("--mount", "type=bind,src=/srv/models,dst=/models,options=rbind:ro"),
        *("--mount", "type=bind,src=/srv/data,dst=/data,options=rbind", "--env", "A=1"),
        *("llama:1", "two", "serve", "--port", "80"),
    ]


@pytest.mark.parametrize(
    ("engine", "document", "flag"),
    [
        ("podman", {"process": {"args": [], "terminal": True}}, ["--tty"]),
        ("podman", {"linux": {}}, ["--network", "host"]),
        ("podman", {"root": {"readonly": True}}, ["--read-only"]),
        ("containerd", {"process": {"args": [], "terminal": True}}, ["--tty"]),
        ("containerd", {"linux": {}}, ["--net-host"]),
        ("containerd", {"root": {"readonly": True}}, ["--read-only"]),
    ],
)
def test_what_the_checkpoint_had(engine: str, document: dict[str, object], flag: list[str]) -> None:
    """Terminal, the host's network, a read-only root: the flag is there, and was not for a container without."""
    words = launch.command("llama", changed(**document), engine, "c", ())
    at = words.index(flag[0])
    assert words[at : at + len(flag)] == flag
    assert flag[0] not in launch.command("llama", CONFIG, engine, "c", ())


def test_limits_where_the_capability_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """podman raises limits, which needs CAP_SYS_RESOURCE."""
    assert "--ulimit" not in launch.command("llama", CONFIG, "podman", "c", ())
    monkeypatch.setattr(launch.procs, "has_capability", lambda _: False)
    assert launch.command("llama", CONFIG, "podman", "c", ()).count("--ulimit") == 2


@pytest.mark.parametrize("engine", ["podman", "containerd"])
def test_root_directory_in_place_of_an_image(tmp_path: Path, engine: str) -> None:
    """A container of --rootfs is started from the same directory."""
    config = replace(CONFIG, source=replace(CONFIG.source, image="", rootfs=str(tmp_path)))
    words = launch.command("llama", config, engine, "c", ())
    assert words[words.index("--rootfs") + 1] == str(tmp_path)


@pytest.mark.parametrize("rootfs", ["", "/no/such/folder"])
def test_root_directory_that_is_gone(rootfs: str) -> None:
    """Neither image nor directory: nothing can be started."""
    config = replace(CONFIG, source=replace(CONFIG.source, image="", rootfs=rootfs))
    with pytest.raises(SmrError) as caught:
        launch.command("llama", config, "podman", "c", ())
    assert caught.value.code is Code.SOURCE_MISMATCH
    assert (rootfs or "(unknown)") in caught.value.message


def test_container_of_a_bare_runtime() -> None:
    """No engine started it, so none is chosen; one that is named is used."""
    config = replace(CONFIG, source=replace(CONFIG.source, engine="runc"))
    with pytest.raises(SmrError) as caught:
        launch.command("llama", config, "auto", "c", ())
    assert caught.value.code is Code.UNSUPPORTED
    assert launch.command("llama", config, "podman", "c", ())[0] == "podman"


def test_programs_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """podman with global options, another ctr, another socket."""
    monkeypatch.setenv("SMR_PODMAN", "podman --root '/a b'")
    monkeypatch.setenv("SMR_CTR", "/opt/ctr")
    monkeypatch.setenv("CONTAINERD_ADDRESS", "/s")
    assert launch.command("llama", CONFIG, "podman", "c", ())[:4] == ["podman", "--root", "/a b", "run"]
    assert launch.command("llama", CONFIG, "containerd", "c", ())[:3] == ["/opt/ctr", "--address", "/s"]
