"""Roots that are not the kernel's overlay: what a container changed arrives in a new one."""

from __future__ import annotations

import contextlib
import json
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from smr.images.store import Store
from smr.images.tar_reader import FileStream, TarReader
from smr.proto.checkpoint import LayerType
from tests.integration import testimage
from tests.integration.command import run
from tests.integration.conftest import Machine, _started, make_warm
from tests.integration.containerd import RUNTIME, Containerd
from tests.integration.node import Node
from tests.integration.podman import Podman
from tests.integration.root_changes import CHANGE, LOOK
from tests.integration.runc import Runc

FAIL = {"smr.fallback": "fail"}


@contextlib.contextmanager
def btrfs(folder: Path) -> Iterator[None]:
    """A btrfs of its own, mounted at `folder`."""
    if shutil.which("mkfs.btrfs") is None:
        pytest.skip("no mkfs.btrfs: install btrfs-progs")
    image = folder.with_name(f"{folder.name}.img")
    with image.open("wb") as file:
        file.truncate(2 << 30)
    folder.mkdir()
    try:
        run(["mkfs.btrfs", "-q", image])
        try:
            run(["mount", "-o", "loop", image, folder])
        except AssertionError as error:
            pytest.skip(f"btrfs cannot be mounted here: {error}")
        try:
            yield
        finally:
            run(["umount", "-R", folder])
    finally:
        image.unlink()
        folder.rmdir()


@pytest.fixture(scope="module", params=["vfs", "btrfs", "fuse-overlayfs"])
def other_podman(request: pytest.FixtureRequest, machine: Machine) -> Iterator[Podman]:
    """podman with another storage, in front of the distribution's runc."""
    kind = request.param
    base = machine.box.base / f"podman-{kind}"
    options = ""
    with contextlib.ExitStack() as stack:
        if kind == "fuse-overlayfs":
            program = shutil.which("fuse-overlayfs")
            if program is None or not Path("/dev/fuse").exists():
                pytest.skip("no fuse-overlayfs, or no /dev/fuse")
            options = f'mount_program = "{program}"'
        if kind == "btrfs":
            stack.enter_context(btrfs(base))
        node = machine.node(f"podman-{kind}", machine.runtime("runc"))
        driver = "overlay" if options else kind
        instance = Podman(base, node, machine.box, driver=driver, options=options)
        instance.network = ("--network=none",)
        if options:
            # Unpacking through FUSE takes long; the kernel's overlay writes the same layers.
            conf = base / "storage.conf"
            text = conf.read_text()
            conf.write_text(text.replace(options, ""))
            instance.load(machine.engines)
            conf.write_text(text)
        else:
            instance.load(machine.engines)
        # In the background: a server of FUSE keeps conmon's pipe open, for which podman would wait.
        words = ("--name=probe", "--runtime=runc", *instance.network, testimage.NAME, "true")
        probe = instance("run", "-d", *words, check=False)
        instance.remove("probe")
        if probe.returncode != 0:
            pytest.skip(f"podman cannot run a container on {kind} here: {probe.stderr.strip()}")
        _started.append(instance)
        yield instance
        instance.remove_all()
        _started.remove(instance)
        for point in (base / "storage/overlay", base / "storage/btrfs", base / "storage/vfs"):
            run(["umount", "-l", point], check=False)


View = dict[str, list[Any]]


def look(engine: Podman | Containerd | Runc, name: str) -> View:
    """All that can be seen of the root, from inside: by path the mode, owner, group, time, content and attributes."""
    return json.loads(engine.exec(name, "python3", "-c", LOOK).stdout)


def without_times(view: View, *, directories: bool = False) -> View:
    """The view without times, or without those of `directories`."""
    kept = {path for path, facts in view.items() if directories and path != "hard links" and not stat.S_ISDIR(facts[0])}
    return {path: facts if path in kept or path == "hard links" else [*facts[:3], *facts[4:]] for path, facts in view.items()}


def differing(before: View, after: View) -> dict[str, tuple[Any, Any]]:
    """What is not the same in two views."""
    paths = before.keys() | after.keys()
    return {path: (before.get(path), after.get(path)) for path in paths if before.get(path) != after.get(path)}


def test_podmans_other_storage(other_podman: Podman) -> None:
    """vfs, btrfs and fuse-overlayfs: every kind of change arrives, with removals, and nothing else is in the layer."""
    podman = other_podman
    # CRIU cannot dump a file that is deleted and open on fuse-overlayfs, which goes on counting a name for it.
    fuse = "fuse" in podman.node.path.name
    features = ("workers",) if fuse else ("workers", "file")
    podman.start("source", *features)
    podman.ready("source")
    podman.exec("source", "python3", "-c", CHANGE)
    podman.checkpoint("source", "other:1")
    before, count = look(podman, "source"), podman.ask("source", "count")
    before.pop("/data/disk", None)  # a device which the container may make and not use
    podman.remove("source")
    podman.start("again", *features, annotations={"smr.restore": "other:1", **FAIL})
    assert podman.ask("again", "count")["boot"] == count["boot"]
    after = look(podman, "again")
    if fuse:  # its client believes its own clock for files that it has written; the server's is what is on disk
        before, after = without_times(before), without_times(after)
    assert differing(before, after) == {}
    if "file" in features:
        assert podman.ask("again", "file")["deleted"] == "gone"
    names = layer_of(podman.node, "other:1")
    assert len(names) < 400, "only what was changed"
    assert "usr/lib/python3.11/.wh.webbrowser.py" in names


def layer_of(node: Node, image: str) -> list[str]:
    """Names in an image's layer."""
    (layer,) = Store(node.store).resolve(image).layers_of(LayerType.ROOTFS)
    with layer.path.open("rb") as tar:
        return [entry.name for entry in TarReader(FileStream(tar.fileno()))]


def test_containerds_native_snapshotter(containerd_2: Containerd) -> None:
    """The root is a copy of the parent snapshot: what differs from it arrives, with removals; no snapshot of ours is left."""
    engine, native = containerd_2, ("--snapshotter", "native")
    engine.start("source", "workers", "file", options=native)
    engine.ready("source")
    engine.exec("source", "python3", "-c", CHANGE)
    engine.checkpoint("source", "native:1")
    # containerd's copies do not keep the times of directories.
    before, count = without_times(look(engine, "source"), directories=True), engine.ask("source", "count")
    before.pop("/data/disk", None)
    assert "smr-base" not in engine("snapshots", *native, "ls").stdout
    engine.remove("source")
    engine.start("again", "workers", "file", options=native, annotations={"smr.restore": "native:1", **FAIL})
    assert engine.ask("again", "count")["boot"] == count["boot"]
    assert differing(before, without_times(look(engine, "again"), directories=True)) == {}
    assert len(layer_of(engine.node, "native:1")) < 400, "only what was changed"
    # The same image on an overlay: a layer does not depend on what it was taken from.
    engine.remove("again")
    engine.start("again", "workers", "file", annotations={"smr.restore": "native:1", **FAIL})
    assert differing(before, without_times(look(engine, "again"), directories=True)) == {}


@pytest.fixture
def directories(machine: Machine, lower: Path) -> Iterator[Runc]:
    """runc on copies of the test image, as unpacked trees."""
    node = machine.node("plain", machine.runtime("runc"))
    instance = Runc(machine.box.base / "bundles-plain", node, machine.box, lower)
    _started.append(instance)
    yield instance
    instance.remove_all()
    _started.remove(instance)


def test_a_plain_directory(directories: Runc) -> None:
    """What was made and changed since the container was created arrives on a copy; removals cannot, and a warning says so."""
    runc = directories
    features = ("workers", "file")
    copy(runc, "source", *features)
    runc.ready("source")
    runc.exec("source", "python3", "-c", CHANGE)
    done = runc.checkpoint("source", "plain:1", "--json")
    warnings = " ".join(json.loads(done.stdout)["warnings"])
    assert "nobody knows what the root" in warnings
    assert "device nodes that the container may not use are not in the image: 1 " in warnings
    before, count = look(runc, "source"), runc.ask("source", "count")
    assert (before["/data/null"][4], before.pop("/data/disk")[4]) == ([1, 3], [8, 0])
    runc.remove("source")
    copy(runc, "again", *features, annotations={"smr.restore": "plain:1", **FAIL})
    assert runc.ask("again", "count")["boot"] == count["boot"]
    after = look(runc, "again")
    assert {path for path in after if path not in before} >= {"/etc/group", "/usr/lib/python3.11/webbrowser.py"}
    assert differing(before, {path: facts for path, facts in after.items() if path in before}) == {}
    assert len(layer_of(runc.node, "plain:1")) < 400, "only what was changed"
    # A checkpoint of the restored container: its own restore had changed files before the runtime knew of it.
    runc.checkpoint("again", "plain:2")
    assert "data/many/299" in layer_of(runc.node, "plain:2")


def copy(runc: Runc, name: str, *workload: str, annotations: Mapping[str, str] | None = None) -> None:
    """Start a workload on a copy of the test image."""

    def plain(spec: dict[str, object]) -> None:
        process = spec["process"]
        assert isinstance(process, dict)
        kinds = ("bounding", "effective", "permitted", "inheritable")
        rights = [f"CAP_{name}" for name in ("CHOWN", "FOWNER", "FSETID", "SETFCAP", "DAC_OVERRIDE", "KILL", "MKNOD")]
        process["capabilities"] = dict.fromkeys(kinds, rights)
        folder = runc.path / name
        run(["umount", folder / "rootfs"])
        (folder / "rootfs").rmdir()
        run(["cp", "-a", runc.lower, folder / "rootfs"])

    runc.start(name, *workload, annotations=annotations, edit=plain)


def test_a_name_that_has_moved(containerd_2: Containerd, machine: Machine, tmp_path: Path) -> None:
    """The image is known by the layers under the container's root, not by a tag that others may move."""
    engine, other, kept = containerd_2, "localhost/smr-other:1", "localhost/smr-kept:1"
    warm = make_warm(engine, "moved:1", "workers")
    assert Store(engine.node.store).resolve("moved:1").config.source.image_layers.startswith("sha256:")
    engine("images", "import", with_one_file_more(machine.engines, tmp_path, other))
    words = ("--runtime", RUNTIME, "--annotation", "smr.restore=moved:1", "--annotation", "smr.fallback=fail")
    command = ("python3", "/app/workload.py", "workers")
    start = ("tasks", "start", "-d", "--log-uri", f"file://{engine.path}/logs/again.log", "again")
    engine("images", "tag", testimage.NAME, kept)
    try:
        # Of the checkpoint's image, by a name that is another's when the restore asks.
        engine("containers", "create", *words, testimage.NAME, "again", *command)
        engine("images", "tag", "--force", other, testimage.NAME)
        engine(*start)
        assert engine.ask("again", "count") == {"count": warm.count + 1, "boot": warm.boot}
        engine.remove("again")
        # Of another image, by a name that is the checkpoint's by then.
        engine("containers", "create", *words, testimage.NAME, "again", *command)
        engine("images", "tag", "--force", kept, testimage.NAME)
        failed = engine(*start, check=False)
        assert failed.returncode != 0
        assert "has the layers" in failed.stderr
    finally:
        engine.remove("again")
        engine("images", "tag", "--force", kept, testimage.NAME)
        engine("images", "rm", other, kept)


def with_one_file_more(engines: Path, folder: Path, name: str) -> Path:
    """An archive of an image that has the test image's files and another."""
    (folder / "tree").mkdir()
    tree = testimage.rootfs(engines, folder / "tree")
    (tree / "data/other").touch()
    diff_id = testimage._pack(tree, folder / "layer.tar.gz")
    testimage._write_oci(folder / "image.tar", folder / "layer.tar.gz", diff_id, name)
    return folder / "image.tar"


def test_podmans_rootfs_option(podman: Podman, lower: Path) -> None:
    """`podman run --rootfs DIRECTORY`: what was changed since the container was created, also in an earlier run of it."""
    made = []

    def start(name: str, *options: str) -> None:
        folder = podman.path / f"root-{name}"
        run(["cp", "-a", lower, folder])
        made.append(folder)
        words = (f"--name={name}", f"--cgroup-parent={podman.parent}", *podman.network, *options, "--rootfs", folder)
        podman("run", "-d", *words, "python3", "/app/workload.py", "workers")

    try:
        start("source", "--env=PATH=/usr/bin:/bin")
        podman.ready("source")
        podman.exec("source", "touch", "/data/early")
        podman("restart", "-t", "0", "source")
        podman.ready("source")
        podman.exec("source", "touch", "/data/late")
        boot = podman.ask("source", "count")["boot"]
        podman.checkpoint("source", "option:1")
        podman.remove("source")
        start("again", "--env=PATH=/usr/bin:/bin", "--annotation=smr.restore=option:1", "--annotation=smr.fallback=fail")
        assert podman.ask("again", "count") == {"count": 2, "boot": boot}
        assert {path.name for path in (made[1] / "data").iterdir()} == {"early", "late"}
        assert not {"app/workload.py", "usr/bin/python3.11"} & set(layer_of(podman.node, "option:1"))
    finally:
        podman.remove_all()
        for folder in made:
            shutil.rmtree(folder)
