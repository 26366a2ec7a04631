"""Image against container: each difference has its own error, which says what differs, what is needed and what to do."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from smr.proto.annotations import Annotations, Check
from smr.proto.checkpoint import CheckpointConfig, HeldFile, Host, Source
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
    binds = [{"destination": at, "type": "bind", "source": "/tmp", "options": ["rbind"]} for at in mounts]
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
        ({"network": ""}, {}, "found host, needed own", "leave out --network host"),
        ({"network": "/n"}, {}, "found host, needed own", "leave out --network host"),
        ({}, {"network": ""}, "found own, needed host", "--network host"),
        ({"pid": ""}, {}, "found host, needed private", "private pid"),
        ({}, {"user": ""}, "found private, needed host", "leave out --userns"),
        ({"cgroup": ""}, {}, "found host, needed private", "private cgroup"),
    ],
)
def test_kinds_of_namespaces(before: dict[str, str], now: dict[str, str], message: str, hint: str) -> None:
    """Shared with the host, private, or the engine's: it must be the same, and the hint says how."""
    error = failure(spec(namespaces=now), replace(CONFIG, spec=spec(namespaces=before)))
    assert error.code is Code.NAMESPACE_MISMATCH
    assert message in error.message
    assert hint in error.hint


@pytest.mark.parametrize(("before", "now"), [("", "/n"), ("/n", "")])
def test_who_made_a_network_namespace_is_no_matter(before: str, now: str) -> None:
    """A private one becomes the engine's, and the other way about."""
    compare(spec(namespaces={"network": now}), replace(CONFIG, spec=spec(namespaces={"network": before})))


def test_sockets_of_ipv6_need_a_kernel_that_has_it(tmp_path: Path) -> None:
    """Not a network that has it: what is bound to wildcards asks for no address."""
    (tmp_path / "net").mkdir()
    preflight.check_families(CONFIG, tmp_path)
    with pytest.raises(SmrError) as caught:
        preflight.check_families(replace(CONFIG, ipv6=True), tmp_path)
    assert caught.value.code is Code.NETWORK_FAILED
    assert "ipv6.disable=1" in caught.value.hint
    (tmp_path / "net/if_inet6").touch()
    preflight.check_families(replace(CONFIG, ipv6=True), tmp_path)


def test_missing_mount() -> None:
    """The destination is named, with both ways to give it."""
    error = failure(spec(mounts=()))
    assert error.code is Code.MOUNT_MISMATCH
    assert "/data of the checkpoint is missing" in error.message
    assert "-v SOURCE:/data" in error.hint
    assert "smr.mounts=/data=SOURCE" in error.hint


def test_mount_by_annotation(tmp_path: Path) -> None:
    """smr.mount gives it, if the source exists."""
    compare(spec(mounts=()), asked=replace(ASKED, mounts={"/data": str(tmp_path)}))
    with pytest.raises(SmrError) as caught:
        compare(spec(mounts=()), asked=replace(ASKED, mounts={"/data": str(tmp_path / "gone")}))
    assert caught.value.code is Code.MOUNT_MISMATCH
    assert str(tmp_path / "gone") in caught.value.message


def test_mount_that_the_checkpoint_does_not_have() -> None:
    """It is no obstacle: the restored container is given it."""
    compare(spec(mounts=("/data", "/models")))


@pytest.mark.parametrize("trailing", ["/data/", "//data", "/data/."])
def test_other_ways_to_write_a_destination(trailing: str) -> None:
    """Runtimes clean a path, so it is the same mount."""
    compare(spec(mounts=(trailing,)))


@pytest.mark.parametrize(("before", "now"), [("bind", "tmpfs"), ("tmpfs", "bind")])
def test_another_kind_of_mount(before: str, now: str) -> None:
    """A tmpfs is in the image and a bind mount is not: one does not do for the other."""
    old, new = spec(mounts=()), spec(mounts=())
    for document, kind in ((old, before), (new, now)):
        mounts = document["mounts"]
        assert isinstance(mounts, list)
        mounts.append({"destination": "/data", "type": kind, "source": "/tmp"})
    external = ("/data",) if before == "bind" else ()
    error = failure(new, replace(CONFIG, spec=old, external_mounts=external))
    assert error.code is Code.MOUNT_MISMATCH
    assert "/data is a" in error.message
    assert now in error.message
    assert before in error.message


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    """It is named before the runtime trips over it."""
    new = spec()
    mounts = new["mounts"]
    assert isinstance(mounts, list)
    mounts[-1]["source"] = str(tmp_path / "gone")
    error = failure(new)
    assert error.code is Code.MOUNT_MISMATCH
    assert f"its source {tmp_path}/gone does not exist" in error.message
    assert "smr.mounts=/data=" in error.hint


@pytest.mark.parametrize("old", [True, False])
def test_a_mount_that_maps_ids(old: bool) -> None:
    """CRIU would bring it back without its map."""
    mapped = spec()
    mounts = mapped["mounts"]
    assert isinstance(mounts, list)
    mounts[-1]["options"] = ["rbind", "idmap"]
    error = failure(spec() if old else mapped, replace(CONFIG, spec=mapped if old else spec()))
    assert error.code is Code.UNSUPPORTED
    assert "/data is ID-mapped" in error.message


HELD = HeldFile(mount="/data", path="log/one", mode=0o100640, size_bytes=3, writable=True, holder="python3 (pid 7), descriptor 5")


@pytest.fixture
def held(tmp_path: Path) -> tuple[dict[str, object], CheckpointConfig, Path]:
    """A container with a volume, a checkpoint that has a file of it open, and the file as it was."""
    (tmp_path / "log").mkdir()
    file = tmp_path / "log/one"
    file.write_text("abc")
    file.chmod(0o640)
    new = spec()
    mounts = new["mounts"]
    assert isinstance(mounts, list)
    mounts[-1]["source"] = str(tmp_path)
    return new, replace(CONFIG, held_files=(HELD,)), file


def test_an_open_file_that_is_what_it_was(held: tuple[dict[str, object], CheckpointConfig, Path]) -> None:
    """Its content may be another."""
    new, config, file = held
    compare(new, config)
    file.write_text("xyz")
    compare(new, config)
    file.write_text("more")
    compare(new, replace(config, held_files=(replace(HELD, size_bytes=-1),)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file.write_text("abcd"), "has 4 bytes, and had 3 at the checkpoint"),
        (lambda file: file.unlink(), "is missing"),
        (lambda file: (file.unlink(), file.parent.rmdir()), "is missing"),
        (lambda file: (file.unlink(), file.mkdir()), "is a directory, and was a file at the checkpoint"),
        (lambda file: file.chmod(0o600), "has mode 0600, and had 0640 at the checkpoint"),
    ],
)
def test_an_open_file_that_is_not(
    held: tuple[dict[str, object], CheckpointConfig, Path], change: Callable[[Path], object], said: str
) -> None:
    """The file, the process that has it and the difference are named."""
    new, config, file = held
    change(file)
    error = failure(new, config)
    assert error.code is Code.MOUNT_MISMATCH
    assert f"{file}, which python3 (pid 7), descriptor 5 has open for writing, {said}" in error.message


def test_permissions_that_are_not_to_count(held: tuple[dict[str, object], CheckpointConfig, Path]) -> None:
    """smr.criu.skip-file-rwx-check is CRIU's and ours."""
    new, config, file = held
    file.chmod(0o600)
    compare(new, config, replace(ASKED, criu={"skip-file-rwx-check": ""}))


def test_an_open_file_behind_a_link(held: tuple[dict[str, object], CheckpointConfig, Path]) -> None:
    """Where a link leads in the container is not seen from here: CRIU judges."""
    new, config, file = held
    file.unlink()
    file.symlink_to("/etc/passwd")
    file.parent.rename(file.parent.with_name("other"))
    file.parent.symlink_to("/etc")
    compare(new, config)


@pytest.mark.parametrize(("known", "found"), [("", "sha256:b"), ("sha256:a", ""), ("sha256:a", "sha256:a")])
def test_source_that_is_the_same_or_unknown(known: str, found: str) -> None:
    """Where one side has no digest there is nothing to compare."""
    preflight.check_source(replace(CONFIG, source=replace(CONFIG.source, image_digest=known)), "llama:1", found)


@pytest.mark.parametrize(
    ("digest", "layers", "refused"),
    [
        ("sha256:" + "b" * 64, "sha256:" + "c" * 64, False),
        ("sha256:" + "a" * 64, "sha256:" + "d" * 64, True),
        ("sha256:" + "a" * 64, "", False),
        ("sha256:" + "b" * 64, "", True),
    ],
)
def test_layers_decide_where_they_are_known(digest: str, layers: str, refused: bool) -> None:
    """A name that has moved neither lets another image through nor keeps the same one out."""
    config = replace(CONFIG, source=replace(CONFIG.source, image_layers="sha256:" + "c" * 64))
    with pytest.raises(SmrError) if refused else contextlib.nullcontext() as caught:
        preflight.check_source(config, "llama:1", digest, layers)
    if caught is not None:
        assert caught.value.code is Code.SOURCE_MISMATCH


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
