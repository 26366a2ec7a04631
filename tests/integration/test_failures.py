"""What cannot be restored: a clear reason and a cold start, or with `smr.fallback=fail` an error, and nothing left behind.

The autouse fixture `leaks` looks after every test for mounts, cgroups, processes, records, locks and files that were left.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from smr.images.image import Image
from smr.images.store import Store
from smr.proto.checkpoint import CheckpointConfig, LayerType
from tests.integration import testimage
from tests.integration.command import Done, run
from tests.integration.conftest import FEATURES, Engine, Warm, make_warm
from tests.integration.podman import Podman


def start(engine: Engine, image: str, *workload: str, fallback: str = "", **annotations: str) -> Done:
    """Start a container that asks for `image`."""
    asked = {"smr.restore": image, **({"smr.fallback": fallback} if fallback else {}), **annotations}
    return engine.start("again", *workload, annotations=asked, check=False)


def test_an_unknown_image_starts_cold(engine: Engine) -> None:
    """The default: the container starts as if there were no annotation; the reason is where users look."""
    assert start(engine, "no-such-image:1").returncode == 0
    assert engine.ready("again")["count"] == 0
    (record,) = engine.node.records().values()
    assert (record["status"], record["reason_code"]) == ("cold", "image_not_found")
    assert "no-such-image:1" in str(record["reason"])
    shown = json.loads(engine.node.smr("ps", "--json").stdout)
    (row,) = shown["containers"] if isinstance(shown, dict) else shown
    assert row["status"] == "cold"
    last = json.loads(engine.node.log_text().splitlines()[-1])
    assert (last["event"], last["code"]) == ("started_cold", "image_not_found")


def test_an_unknown_image_fails_when_asked_to(engine: Engine) -> None:
    """smr.fallback=fail: the engine prints our message and there is no container process."""
    done = start(engine, "no-such-image:1", fallback="fail")
    assert done.returncode != 0
    assert "no image no-such-image:1" in done.stderr
    assert engine.node.records() == {}


def test_a_mistyped_annotation(engine: Engine) -> None:
    """smr.resotre is refused, whatever the fallback, and the message names the right one."""
    done = engine.start("again", annotations={"smr.resotre": "warm:1"}, check=False)
    assert done.returncode != 0
    assert "smr.restore" in done.stderr


@pytest.mark.parametrize(
    "annotations",
    [
        {"smr.restore": "Not A Name"},
        {"smr.restore": "warm:1", "smr.fallback": "maybe"},
        {"smr.restore": "warm:1", "smr.criu.exec-cmd": "id"},
        {"smr.restore": "warm:1", "smr.mount.data": "/srv"},
        {"smr.fallback": "cold"},
        {"smr.restore": "warm:1", "smr.gpu.map": "0>1"},
        {"smr.restore": "warm:1", "smr.resume": "vlm"},
        {"smr.quiesce": "ftp://a/b"},
        {"smr.quiesce": "vllm", "smr.hook.timeout": "soon"},
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()),
)
def test_a_malformed_annotation(podman: Podman, annotations: dict[str, str]) -> None:
    """A value that cannot be meant is refused with the annotation's name, and the container does not start."""
    done = podman.start("again", annotations=annotations, check=False)
    assert done.returncode != 0
    assert "smr" in done.stderr
    assert podman.field("again", "{{.State.Pid}}") == "0"


def test_the_reason_is_in_the_containers_annotations(podman: Podman) -> None:
    """`podman inspect` shows status, code and reason of a cold start, and so does the user's terminal."""
    done = start(podman, "no-such-image:1")
    annotations = podman.inspect("again")["Config"]["Annotations"]
    assert annotations["smr.status"] == "cold"
    assert annotations["smr.status.code"] == "image_not_found"
    assert "no-such-image" in annotations["smr.status.reason"]
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("code", "workload", "options"),
    [
        ("command_mismatch", ("workers",), ()),
        ("mount_mismatch", ("workers", "shm"), ("--annotation=smr.mounts=/data=/nowhere",)),
        ("terminal_mismatch", ("workers", "shm"), ("-t",)),
        ("namespace_mismatch", ("workers", "shm"), ("--network=host",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_container_that_differs(
    podman: Podman, podman_warm: Warm, code: str, workload: tuple[str, ...], options: tuple[str, ...]
) -> None:
    """Command, mounts, terminal or namespaces other than the checkpoint's: a cold start with its own reason."""
    done = podman.start("again", *workload, options=options, annotations={"smr.restore": podman_warm.image})
    assert done.returncode == 0
    (record,) = podman.node.records().values()
    assert (record["status"], record["reason_code"]) == ("cold", code)
    assert podman.ready("again")["boot"] != podman_warm.boot


def test_another_container_image(podman: Podman, podman_warm: Warm) -> None:
    """A container from another image than the checkpoint's starts cold, or is restored when it says so."""
    podman.start("base")
    podman.exec("base", "sh", "-c", "echo other >/etc/other")
    podman("commit", "-q", "base", "localhost/smr-other:1")
    podman.remove("base")
    try:
        words = [f"--cgroup-parent={podman.parent}", *podman.network, f"--annotation=smr.restore={podman_warm.image}"]
        command = ["localhost/smr-other:1", "python3", "/app/workload.py", *podman_warm.features]
        podman("run", "-d", "--name=again", *words, *command)
        (record,) = podman.node.records().values()
        assert (record["status"], record["reason_code"]) == ("cold", "source_mismatch")
        podman.remove("again")
        podman("run", "-d", "--name=again", *words, "--annotation=smr.rootfs=force", "--annotation=smr.fallback=fail", *command)
        assert podman.ask("again", "count") == {"count": podman_warm.count + 1, "boot": podman_warm.boot}
    finally:
        podman.remove_all()
        podman("rmi", "-f", "localhost/smr-other:1")


def changed(podman: Podman, image: str, name: str, edit: Callable[[CheckpointConfig], CheckpointConfig]) -> None:
    """Commit a copy of an image with another configuration."""
    store = Store(podman.node.store)
    source: Image = store.resolve(image)
    with store.ingest() as ingest:
        for number, layer in enumerate(source.layers):
            copy = ingest.path / str(number)
            shutil.copyfile(layer.path, copy)
            ingest.add(copy, layer.kind, title=layer.title, annotations=layer.annotations)
        ingest.commit(name, edit(source.config))


@pytest.mark.parametrize(
    ("code", "edit"),
    [
        ("arch_mismatch", lambda config: replace(config, host=replace(config.host, architecture="s390x"))),
        (
            "cpu_mismatch",
            lambda config: replace(config, host=replace(config.host, cpu_flags=(*config.host.cpu_flags, "avx9000"))),
        ),
        ("image_version", lambda config: replace(config, version=99)),
    ],
    ids=["architecture", "cpu", "format"],
)
def test_an_image_for_another_machine(
    podman: Podman, podman_warm: Warm, code: str, edit: Callable[[CheckpointConfig], CheckpointConfig]
) -> None:
    """Another architecture, missing CPU features, a newer format: a cold start with the reason."""
    changed(podman, podman_warm.image, "odd:1", edit)
    try:
        start(podman, "odd:1", *podman_warm.features)
        (record,) = podman.node.records().values()
        assert (record["status"], record["reason_code"]) == ("cold", code)
        assert podman.ready("again")["boot"] != podman_warm.boot
    finally:
        podman.remove_all()
        podman.node.smr("images", "rm", "odd:1")


@contextlib.contextmanager
def settings(podman: Podman, **changes: Path) -> Iterator[None]:
    """Other settings for podman's SMR."""
    file = podman.node.path / "smr.toml"
    before = file.read_text()
    lines = {line.partition(" = ")[0]: line for line in before.splitlines()}
    file.write_text("\n".join((lines | {key: f'{key} = "{value}"' for key, value in changes.items()}).values()) + "\n")
    try:
        yield
    finally:
        file.write_text(before)


@pytest.fixture
def fragile(podman: Podman) -> Iterator[Image]:
    """An image to be damaged, in a store of its own: blobs are shared between images."""
    folder = podman.node.path / "fragile"
    with settings(podman, store=folder):
        make_warm(podman, "fragile:1", "workers", "shm", name="fragile")
        yield Store(folder).resolve("fragile:1")
        podman.remove_all()
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", [LayerType.PAGES, LayerType.CRIU])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_image(podman: Podman, fragile: Image, kind: LayerType, damage: str) -> None:
    """A truncated, altered or missing blob never starts a half-restored container; verify names it too."""
    (layer, *_) = fragile.layers_of(kind)
    layer.path.chmod(0o644)
    if damage == "missing":
        layer.path.unlink()
    else:
        data = bytearray(layer.path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        layer.path.write_bytes(data if damage == "altered" else data[: len(data) // 2])
    done = start(podman, "fragile:1", "workers", "shm")
    assert done.returncode == 0
    (record,) = podman.node.records().values()
    assert (record["status"], record["reason_code"]) == ("cold", "image_corrupt")
    assert podman.ready("again")["count"] == 0
    assert podman.node.smr("images", "verify", "fragile:1", check=False).returncode != 0


@pytest.fixture
def odd_criu(podman: Podman) -> Iterator[Path]:
    """Where podman's SMR looks for CRIU; nothing is there."""
    folder = podman.node.path / "odd-criu"
    folder.mkdir()
    with settings(podman, criu=folder / "criu"):
        yield folder / "criu"
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("codes", "program"),
    [
        ({"criu_missing"}, ""),
        ({"criu_too_old"}, "#!/bin/sh\necho 'Version: 3.17.1'\n"),
        ({"criu_missing", "criu_failed"}, "#!/bin/sh\nexit 127\n"),
    ],
    ids=["missing", "too-old", "broken"],
)
def test_no_usable_criu(podman: Podman, podman_warm: Warm, odd_criu: Path, codes: set[str], program: str) -> None:
    """CRIU missing, too old or broken: a cold start that says so, a checkpoint that fails, and `smr check` that explains."""
    if program:
        odd_criu.write_text(program)
        odd_criu.chmod(0o755)
    start(podman, podman_warm.image, *podman_warm.features)
    (record,) = podman.node.records().values()
    assert record["status"] == "cold"
    assert record["reason_code"] in codes
    failed = podman.checkpoint("again", "never:1", check=False)
    assert failed.returncode != 0
    assert "criu" in failed.stderr.lower()
    checked = podman.node.smr("check", "--json", env=podman.env, check=False)
    assert checked.returncode == 1
    assert not json.loads(checked.stdout)["ok"]


def test_a_full_disk_during_a_checkpoint(podman: Podman) -> None:
    """The checkpoint fails and says why, the container runs on, and the store holds nothing of it."""
    podman.start("source", "memory")
    boot = podman.ready("source")["boot"]
    store = podman.node.path / "small"
    store.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=16m", "small", store])
    try:
        done = podman.node.smr(
            "checkpoint", "source", "-n", "full:1", "--engine", "podman", env={**podman.env, "SMR_STORE": str(store)}, check=False
        )
        assert done.returncode != 0
        assert "space" in done.stderr
        assert podman.ask("source", "count") == {"count": 1, "boot": boot}
        assert [path for path in store.rglob("*") if path.is_file() and path.stat().st_size > 4096] == []
        assert list((store / "ingest").glob("*/*")) == []
    finally:
        run(["umount", store])
        store.rmdir()


def test_a_checkpoint_of_nothing(podman: Podman) -> None:
    """An unknown container, and one that has ended, are errors of their own."""
    unknown = podman.checkpoint("nobody", "x:1", check=False)
    assert unknown.returncode != 0
    assert "nobody" in unknown.stderr
    podman("run", "-d", "--name=ended", f"--cgroup-parent={podman.parent}", *podman.network, testimage.NAME, "true")
    podman.wait("ended")
    ended = podman.checkpoint("ended", "x:1", check=False)
    assert ended.returncode != 0
    assert "not running" in ended.stderr


def test_what_a_restore_changed_is_undone(podman: Podman, odd_criu: Path) -> None:
    """The checkpoint's files were already in the root when CRIU failed: a cold start does not see them."""
    odd_criu.symlink_to(podman.node.criu)
    podman.start("source", "workers")
    podman.ready("source")
    podman.exec("source", "sh", "-c", "echo changed >/etc/marker; echo new >/data/new")
    podman.checkpoint("source", "undo:1")
    podman.remove("source")
    odd_criu.unlink()
    odd_criu.write_text(f'#!/bin/sh\n[ "$1" != swrk ] || exit 1\nexec {podman.node.criu} "$@"\n')
    odd_criu.chmod(0o755)
    start(podman, "undo:1", "workers")
    (record,) = podman.node.records().values()
    assert (record["status"], record["reason_code"]) == ("cold", "criu_failed")
    assert podman.ready("again")["count"] == 0
    assert podman.exec("again", "cat", "/etc/marker").stdout == "from the image\n"
    assert podman.exec("again", "ls", "/data").stdout == ""


def test_a_cold_start_has_every_feature(engine: Engine) -> None:
    """What starts cold is a normal container: it can be used, checkpointed and restored."""
    start(engine, "no-such-image:1", *FEATURES)
    warm = make_warm(engine, "from-cold:1", *FEATURES, name="again", start=False)
    engine.start("later", *FEATURES, annotations={"smr.restore": warm.image, "smr.fallback": "fail"})
    assert engine.ask("later", "count") == {"count": warm.count + 1, "boot": warm.boot}


def test_leftovers_would_be_noticed(podman: Podman, tmp_path: Path) -> None:
    """The leak check itself: a mount, a process and a file of ours are all seen."""
    from tests.integration.conftest import boxes

    (box,) = boxes()
    before = box.snapshot()
    folder = box.base / "tmp/left"
    folder.mkdir()
    run(["mount", "-t", "tmpfs", "left", folder])
    seen = box.snapshot().left_since(before)
    run(["umount", folder])
    folder.rmdir()
    assert [line.split()[0] for line in seen] == ["mount", "file"]
    assert box.snapshot().left_since(before) == []
