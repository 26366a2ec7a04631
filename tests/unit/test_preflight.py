"""Image against container: each difference has its own error, which says what differs, what is needed and what to do."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import pytest

from smr.proto.annotations import Annotations, Check
from smr.proto.checkpoint import CheckpointConfig, Host, Source
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec, parse_spec
from smr.shim import preflight

FLAGS = ("avx2", "sse4_2")


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two CPU features that count."""
    monkeypatch.setattr(preflight, "cpu_flags", lambda: (*FLAGS, "constant_tsc"))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


def spec(
    *,
    args: tuple[str, ...] = ("serve",),
    terminal: bool = False,
    mounts: tuple[str, ...] = ("/data",),
    namespaces: dict[str, str] | None = None,
) -> dict[str, object]:
    """A container's spec; `namespaces` maps a kind to the path of a namespace that the engine made."""
    kinds = {"pid": "", "network": "/run/netns/n", "mount": ""} if namespaces is None else namespaces
    binds = [{"destination": at, "type": "bind", "source": "/srv", "options": ["rbind"]} for at in mounts]
    return {
        "process": {"args": list(args), "terminal": terminal},
        "mounts": [{"destination": "/proc", "type": "proc"}, *binds],
        "linux": {"namespaces": [{"type": kind, **({"path": path} if path else {})} for kind, path in kinds.items()]},
    }


CONFIG = CheckpointConfig(
    created="2025-03-01T10:00:00.000+00:00",
    host=Host(architecture="x86_64", kernel="6.8.1", criu="4.1.1", runtime="runc", cpu_model="Old CPU", cpu_flags=FLAGS),
    source=Source(engine="podman", container_id="f" * 64, image="llama:1", image_digest="sha256:" + "a" * 64),
    spec=spec(),
    external_mounts=("/data",),
)
ASKED = Annotations(restore="llama:warm")


def compare(new: dict[str, object], config: CheckpointConfig = CONFIG, asked: Annotations = ASKED) -> Spec:
    """Run the preflight."""
    found = parse_spec(new)
    preflight.compare(config, found, asked)
    return found


def failure(new: dict[str, object], config: CheckpointConfig = CONFIG, asked: Annotations = ASKED) -> SmrError:
    """The error of a preflight that must fail."""
    with pytest.raises(SmrError) as caught:
        compare(new, config, asked)
    assert caught.value.hint
    return caught.value


def test_the_same_container_fits() -> None:
    """Other paths of the engine's namespaces, other sources of mounts: still the same container."""
    compare(spec(namespaces={"pid": "", "network": "/run/netns/other", "mount": ""}))


def test_other_architecture() -> None:
    """Both are named."""
    error = failure(spec(), replace(CONFIG, host=replace(CONFIG.host, architecture="aarch64")))
    assert error.code is Code.ARCH_MISMATCH
    assert "aarch64" in error.message
    assert "x86_64" in error.message


def test_missing_cpu_features() -> None:
    """Those that libraries choose by are named, with the CPU of the checkpoint; others do not count."""
    host = replace(CONFIG.host, cpu_flags=(*FLAGS, "avx512f", "amx_tile", "nonstop_tsc"))
    error = failure(spec(), replace(CONFIG, host=host))
    assert error.code is Code.CPU_MISMATCH
    assert "amx_tile, avx512f" in error.message
    assert "Old CPU" in error.message
    assert "nonstop_tsc" not in error.message


def test_more_cpu_features_are_no_harm() -> None:
    """A restore may move to a newer CPU."""
    compare(spec(), replace(CONFIG, host=replace(CONFIG.host, cpu_flags=("sse4_2",))))


@pytest.mark.parametrize(("had", "hint"), [(True, "add -t"), (False, "leave out -t")])
def test_terminal(had: bool, hint: str) -> None:
    """A terminal cannot be taken away or given."""
    error = failure(spec(terminal=not had), replace(CONFIG, spec=spec(terminal=had)))
    assert (error.code, error.hint) == (Code.TERMINAL_MISMATCH, hint)
    assert ("with a terminal" in error.message) is had


def test_other_command_and_its_force() -> None:
    """Found and needed are shown; smr.command=force starts anyway."""
    error = failure(spec(args=("serve", "--other")))
    assert error.code is Code.COMMAND_MISMATCH
    assert "found 'serve --other'" in error.message
    assert "needed 'serve'" in error.message
    assert "smr.command=force" in error.hint
    compare(spec(args=("serve", "--other")), asked=replace(ASKED, command=Check.FORCE))


def test_long_command_is_cut_in_the_message() -> None:
    """An engine prints errors on one line."""
    assert len(failure(spec(args=("x" * 5000,))).message) < 400


@pytest.mark.parametrize(
    ("before", "now", "message", "hint"),
    [
        ({"network": ""}, {}, "found host, needed private", "ctr run"),
        ({"network": "/n"}, {}, "found host, needed engine's", "bridge"),
        ({}, {"network": ""}, "found private, needed host", "--network host"),
        ({"network": ""}, {"network": "/n"}, "found engine's, needed private", "ctr run"),
        ({"pid": ""}, {}, "found host, needed private", "private pid"),
        ({}, {"user": ""}, "found private, needed host", "host user"),
        ({"cgroup": ""}, {}, "found host, needed private", "private cgroup"),
    ],
)
def test_kinds_of_namespaces(before: dict[str, str], now: dict[str, str], message: str, hint: str) -> None:
    """Shared with the host, private, or the engine's: it must be the same, and the hint says how."""
    error = failure(spec(namespaces=now), replace(CONFIG, spec=spec(namespaces=before)))
    assert error.code is Code.NAMESPACE_MISMATCH
    assert message in error.message
    assert hint in error.hint


def test_missing_mount() -> None:
    """The destination is named, with both ways to give it."""
    error = failure(spec(mounts=()))
    assert error.code is Code.MOUNT_MISMATCH
    assert "/data of the checkpoint is missing" in error.message
    assert "-v SOURCE:/data" in error.hint
    assert "smr.mount./data=SOURCE" in error.hint


def test_mount_by_annotation(tmp_path: Path) -> None:
    """smr.mount gives it, if the source exists."""
    compare(spec(mounts=()), asked=replace(ASKED, mounts={"/data": str(tmp_path)}))
    with pytest.raises(SmrError) as caught:
        compare(spec(mounts=()), asked=replace(ASKED, mounts={"/data": str(tmp_path / "gone")}))
    assert caught.value.code is Code.MOUNT_MISMATCH
    assert str(tmp_path / "gone") in caught.value.message


def test_mount_that_the_checkpoint_does_not_have() -> None:
    """A restored process cannot be given a new one."""
    error = failure(spec(mounts=("/data", "/models")))
    assert error.code is Code.MOUNT_MISMATCH
    assert "/models is not in the checkpoint" in error.message


@pytest.mark.parametrize(("known", "found"), [("", "sha256:b"), ("sha256:a", ""), ("sha256:a", "sha256:a")])
def test_source_that_is_the_same_or_unknown(known: str, found: str) -> None:
    """Where one side has no digest there is nothing to compare."""
    preflight.check_source(replace(CONFIG, source=replace(CONFIG.source, image_digest=known)), "llama:1", found)


def test_other_source_image() -> None:
    """Both images are named with the beginnings of their digests."""
    with pytest.raises(SmrError) as caught:
        preflight.check_source(CONFIG, "llama:2", "sha256:" + "b" * 64)
    assert caught.value.code is Code.SOURCE_MISMATCH
    assert "llama:2 is sha256:bbbbbbbbbbbb," in caught.value.message
    assert "llama:1 sha256:aaaaaaaaaaaa" in caught.value.message
    assert "smr.rootfs=force" in caught.value.hint


def test_first_difference_is_the_gravest() -> None:
    """A checkpoint of another architecture is not said to have a wrong command."""
    config = replace(CONFIG, host=replace(CONFIG.host, architecture="s390x"))
    assert failure(spec(args=("other",), mounts=()), config).code is Code.ARCH_MISMATCH
