"""The DaemonSet's image, built by its Containerfile, on bare nodes: installed, used, upgraded, taken away.

There is no kubelet here: the image's entry point is run in the node's pid namespace with the image as its root, which is what
hostPID and privileged come to.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration import testimage
from tests.integration.bare_node import BareNode, debian_root, musl_root, running
from tests.integration.command import eventually, run
from tests.integration.node import REPOSITORY
from tests.integration.sandbox import Sandbox

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
CRC = {"crc": 646947347}
_APT = Path("/etc/apt/apt.conf.d")
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_PIP = Path("/etc/pip.conf")


@pytest.fixture(scope="module")
def base(engines: Path) -> Path:
    """A Debian 13 to build from, as an archive of its root."""
    for program in ("buildah", "mmdebstrap"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program}: run dev/provision")
    file = engines / "base-trixie.tar"
    if not file.exists():
        part = engines / "base-part.tar"
        run(["mmdebstrap", "--mode=root", "--variant=apt", "trixie", part], timeout_s=300)
        part.rename(file)
    return file


@pytest.fixture(scope="module")
def image(base: Path, box: Sandbox) -> Iterator[Path]:
    """The root of the image that deploy/kubernetes/Containerfile makes."""
    folder = box.base / "buildah"
    folder.mkdir()
    (folder / "storage.conf").write_text(f'[storage]\ndriver = "vfs"\nrunroot = "{folder}/run"\ngraphroot = "{folder}/graph"\n')
    env = {**os.environ, "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"), "TMPDIR": str(folder)}

    def buildah(*words: object) -> str:
        return run(["buildah", *words], env=env, timeout_s=590).stdout.strip()

    try:
        (folder / "base").write_text(f"FROM scratch\nADD {base.name} /\n")
        buildah("build", "--isolation=chroot", "-t", "localhost/base", "-f", folder / "base", base.parent)
        # The mirror, the certificates and the index of this machine.
        places = {_APT: _APT, _CERTIFICATES: Path("/usr/local/share/ca-certificates/node.crt"), _PIP: _PIP}
        mounts = [f"--volume={there}:{inside}:ro" for there, inside in places.items() if there.exists()]
        words = ["--isolation=chroot", "--network=host", "--build-arg=BASE=localhost/base", *mounts]
        buildah("build", *words, "-t", "localhost/smr-node", "-f", REPOSITORY / "deploy/kubernetes/Containerfile", REPOSITORY)
        container = buildah("from", "localhost/smr-node")
        mounted = Path(buildah("mount", container))
        root = box.base / "node-image"
        shutil.copytree(mounted, root, symlinks=True)
        buildah("umount", container)
    finally:
        shutil.rmtree(folder)
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module", params=["debian", "musl"])
def node(request: pytest.FixtureRequest, engines: Path, image: Path, box: Sandbox) -> Iterator[BareNode]:
    """A bare node that runs."""
    root = box.base / f"node-{request.param}"
    if request.param == "debian":
        debian_root(engines / "node-debian.tar", root)
    else:
        debian = box.base / "of-debian"
        debian_root(engines / "node-debian.tar", debian)
        musl_root(debian, root, engines / "debs-musl")
        shutil.rmtree(debian)
    shutil.copy(shutil.which("true") or "/bin/true", root / "usr/local/bin/before")
    try:
        with running(root, box.token) as found:
            yield found
    finally:
        shutil.rmtree(root)


def test_the_image_is_the_bundle_and_nothing_else(image: Path) -> None:
    """No other userland, and no program of it that is anybody's but the bundle's."""
    assert {path.name for path in image.iterdir()} - {"proc", "dev", "sys", "run", "etc"} == {"smr-bundle"}
    assert (image / "smr-bundle/runc/sbin/runc").exists()
    assert not (image / "smr-bundle/wheels").exists()


def test_a_pod_without_the_nodes_processes_is_refused(node: BareNode, image: Path) -> None:
    """It would install into itself."""
    done = node.pod(image, "install", check=False, host_pid=False)
    assert done.returncode == 1
    assert "hostPID" in done.stderr


def test_a_bare_node_is_installed_used_and_left_as_it_was(node: BareNode, image: Path, engines: Path) -> None:
    """Of the node nothing is needed but kernel, containerd and runc, and nothing of it is changed but containerd's configuration.

    A container is checkpointed and restored there; a second install changes nothing; one with other options does; after the
    uninstall the disk is what it was.
    """
    before = node.tree()
    said = node.pod(image, "install").stdout
    assert "create /opt/smr/venv/" in said
    assert "containerd: CRI runtime smr" in said
    assert not (node.root / "opt/.smr-bundle").exists()
    assert node.pod(image, "install").stdout.splitlines()[-1] == "nothing to change"
    changed = {path for path, what in node.tree().items() if before.get(path) != what}
    assert {path.split("/")[0] for path in changed} <= {"opt", "etc", "usr", "var"}
    folders = {"opt", "etc", "etc/containerd", "usr/local", "usr/local/bin", "usr/local/sbin", "var", "var/log", "var/lib"}
    assert {path for path in changed if path in before} <= {"etc/containerd/config.toml", *folders}
    dumped = node("containerd", "config", "dump").stdout
    assert "/opt/smr/bin/containerd-shim-smr-v1" in dumped
    with node.containerd() as containerd:
        containerd.load(testimage.archive(engines))
        containerd.start("source")
        first = eventually(lambda: containerd.ask("source"), what="it answers")
        assert containerd.ask("source", "memory") == CRC
        node("smr", "checkpoint", "source", "-n", "bare:1", "--engine", "containerd")
        containerd.remove("source")
        containerd.start("again", "--annotation", "smr.restore=bare:1", "--annotation", "smr.fallback=fail")
        assert containerd.ask("again") == {"count": 2, "boot": first["boot"]}
        assert containerd.ask("again", "memory") == CRC
        (found,) = json.loads(node("smr", "ps", "--json").stdout)
        assert found["status"] == "restored"
        refused = node.pod(image, "uninstall", check=False)
        assert refused.returncode == 1 and "containers run that need SMR" in refused.stderr
        containerd.remove("again")
    assert node.pod(image, "install", options="--setting cache_share=0.25 --default-runtime").returncode == 0
    assert "cache_share = 0.25" in (node.root / "etc/smr/smr.toml").read_text()
    assert 'default_runtime_name = "smr"' in node("containerd", "config", "dump").stdout.replace("'", '"')
    wrong = node.pod(image, "install", options="--setting cache_shear=0.25", check=False)
    assert wrong.returncode == 1 and "cache_share" in wrong.stderr
    node.pod(image, "uninstall", options="--purge")
    after = node.tree()
    assert {path for path in {*before, *after} if before.get(path) != after.get(path)} == set()


def test_a_read_only_usr_is_no_obstacle(node: BareNode, image: Path) -> None:
    """As on Flatcar: the programs are not linked there, which is said; the engine finds them by their own paths."""
    node("mount", "--bind", "/usr", "/usr")
    node("mount", "-o", "remount,ro,bind", "/usr")
    try:
        said = node.pod(image, "install").stdout
        assert "/usr/local/bin/smr is not linked" in said
        assert node("/opt/smr/bin/smr", "--version").stdout.startswith("smr")
        node.pod(image, "uninstall", options="--purge")
    finally:
        node("umount", "-l", "/usr")
    assert not (node.root / "opt/smr").exists()
