"""Archives of real engines: imported, restored by annotation, exported, and restored by podman itself."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.containerd import Containerd
from tests.integration.podman import Podman

CHANGE = "rm -rf /data /etc/marker; mkdir /data; echo new >/data/new; echo shm >/dev/shm/kept; echo more >>/etc/hosts.own"


def changed(engine: Podman | Containerd, name: str) -> str:
    """What the container sees of the changes that CHANGE made."""
    return engine.exec(name, "sh", "-c", "cat /data/new /etc/hosts.own; ls /data; ls /etc/marker 2>&1 | grep -c 'No such'").stdout


@contextlib.contextmanager
def criu_on_path(engine: Podman | Containerd, criu: Path) -> Iterator[None]:
    """A plain runc looks for CRIU on the engine's PATH."""
    link = engine.node.bin / "criu"
    link.symlink_to(criu)
    try:
        yield
    finally:
        link.unlink()


def checkpointed(podman: Podman, criu: Path, file: Path, *options: str) -> dict[str, object]:
    """A warm container on plain runc, checkpointed into `file` by podman alone, and removed; what it last answered."""
    podman.start("src", options=["--runtime=runc"])
    podman.ready("src")
    podman.exec("src", "sh", "-c", CHANGE)
    for _ in range(3):
        last = podman.ask("src", "count")
    with criu_on_path(podman, criu):
        podman("container", "checkpoint", *options, "--export", file, "src")
    podman.remove("src")
    return last


@pytest.mark.parametrize("compress", ["none", "gzip", "zstd"])
def test_podman_archive_to_image_and_back(podman: Podman, criu: Path, tmp_path: Path, compress: str) -> None:
    """podman's archive imports in each compression; its export is restored by podman itself, with memory, files and /dev/shm."""
    last = checkpointed(podman, criu, tmp_path / "a.tar", f"--compress={compress}")
    document = json.loads(podman.node.smr("import", tmp_path / "a.tar", "-n", "round:trip", "--json").stdout)
    assert (document["engine"], document["container"]) == ("podman", "src")
    podman.node.smr("export", "round:trip", "-o", tmp_path / "b.tar.gz")
    podman.node.smr("images", "rm", "round:trip")
    with criu_on_path(podman, criu):
        podman("container", "restore", "--import", tmp_path / "b.tar.gz")
    assert podman.ready("src") | {"features": []} == last | {"features": [], "uid": 0}
    assert podman.ask("src", "count")["count"] == last["count"] + 1  # type: ignore[operator]
    assert changed(podman, "src") == "new\nmore\nnew\n1\n"
    assert podman.exec("src", "cat", "/dev/shm/kept").stdout == "shm\n"


def test_podman_archive_restores_by_annotation(podman: Podman, criu: Path, tmp_path: Path) -> None:
    """An archive that podman alone has made restores a new container by annotation."""
    last = checkpointed(podman, criu, tmp_path / "a.tar")
    podman.node.smr("import", tmp_path / "a.tar", "-n", "by:annotation")
    podman.start("again", annotations={"smr.restore": "by:annotation", "smr.fallback": "fail"})
    assert podman.ready("again")["boot"] == last["boot"]
    assert podman.ask("again", "count")["count"] == last["count"] + 1  # type: ignore[operator]
    assert changed(podman, "again") == "new\nmore\nnew\n1\n"
    assert podman.exec("again", "cat", "/dev/shm/kept").stdout == "shm\n"
    podman.remove("again")
    podman.node.smr("images", "rm", "by:annotation")


def test_containerd_checkpoint_restores_by_annotation(containerd: Containerd, criu: Path, tmp_path: Path) -> None:
    """A checkpoint image that `ctr` has made and exported imports, and restores a new container by annotation."""
    containerd.start("src", runtime="io.containerd.runc.v2")
    containerd.ready("src")
    containerd.exec("src", "sh", "-c", CHANGE.replace("echo shm >/dev/shm/kept;", ""))
    last = containerd.ask("src", "count")
    with criu_on_path(containerd, criu):
        containerd("containers", "checkpoint", "--task", "--rw", "--image", "src", "ck:1")
    containerd("images", "export", "--skip-manifest-json", tmp_path / "ck.tar", "ck:1")
    containerd("images", "rm", "ck:1")
    containerd.remove("src")
    document = json.loads(containerd.node.smr("import", tmp_path / "ck.tar", "-n", "ctd:1", "--json").stdout)
    assert (document["engine"], document["source_image"]) == ("containerd", "localhost/smr-test:1")
    containerd.start("again", annotations={"smr.restore": "ctd:1", "smr.fallback": "fail"})
    assert containerd.ready("again")["boot"] == last["boot"]
    assert containerd.ask("again", "count")["count"] == last["count"] + 1  # type: ignore[operator]
    assert changed(containerd, "again") == "new\nmore\nnew\n1\n"
    containerd.remove("again")
    containerd.node.smr("images", "rm", "ctd:1")


def test_our_own_checkpoint_restores_with_stock_podman(podman: Podman, criu: Path, tmp_path: Path) -> None:
    """`smr checkpoint`, `smr export`, then podman and plain runc alone."""
    podman.start("src")
    podman.ready("src")
    podman.exec("src", "sh", "-c", CHANGE)
    last = podman.ask("src", "count")
    podman.node.smr("checkpoint", "src", "-n", "own:1", "--engine", "podman", "--stop", env=podman.env)
    podman.node.smr("export", "own:1", "-o", tmp_path / "own.tar.gz")
    podman.remove("src")
    podman.node.smr("images", "rm", "own:1")
    with criu_on_path(podman, criu):
        podman("container", "restore", "--import", tmp_path / "own.tar.gz")
    name = podman("ps", "--format", "{{.Names}}").stdout.split()[0]
    assert podman.ready(name)["boot"] == last["boot"]
    assert podman.ask(name, "count")["count"] == last["count"] + 1  # type: ignore[operator]
    assert changed(podman, name) == "new\nmore\nnew\n1\n"
