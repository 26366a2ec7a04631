"""Volumes: what is in them, what processes have open there, how they take part in the mounts of their sources."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from smr.proto.errors import Code
from tests.integration.command import run
from tests.integration.podman import Podman
from tests.integration.sandbox import Sandbox

FAIL = {"smr.fallback": "fail"}


@pytest.fixture
def data(box: Sandbox) -> Iterator[Path]:
    """A folder of the host's with a file of three bytes."""
    folder = Path(tempfile.mkdtemp(dir=box.base))
    (folder / "in").mkdir()
    (folder / "in/held").write_text("abc")
    yield folder
    shutil.rmtree(folder)


def holding(podman: Podman, name: str, redirection: str) -> None:
    """A process of the container's own tree with an open file; one that is exec'ed is its engine's, and not dumped."""
    podman.exec(name, "sh", "-c", f"(exec sleep 1000 {redirection} </dev/null >/dev/null 2>&1 &)")


def test_files_that_processes_have_open(podman: Podman, data: Path) -> None:
    """A file in a volume that grew, went or turned into something else is named, with who has it; one open to append may grow."""
    podman.start("source", options=("-v", f"{data}:/data"))
    podman.ready("source")
    for redirection in ("3<>/data/in/held", "3>>/data/in/log"):
        holding(podman, "source", redirection)
    podman.checkpoint("source", "held:1")
    podman.remove("source")
    (data / "in/log").write_text("more than it had\n")
    wanted = {"smr.restore": "held:1", **FAIL}
    podman.start("again", options=("-v", f"{data}:/data"), annotations=wanted)
    podman.ready("again")
    podman.remove("again")
    held = data / "in/held"
    for change, said in (
        (lambda: held.write_text("abcdef"), "has 6 bytes, and had 3 at the checkpoint"),
        (held.unlink, "is missing"),
        (held.mkdir, "is a directory, and was a file at the checkpoint"),
    ):
        change()
        done = podman.start("again", options=("-v", f"{data}:/data"), annotations=wanted, check=False)
        assert done.returncode != 0
        assert f"mount /data: {held}, which sleep (pid " in done.stderr
        assert f"), descriptor 3 has open for writing, {said}" in done.stderr
        assert json.loads(podman.node.log_text().splitlines()[-1])["code"] == Code.MOUNT_MISMATCH
        podman.remove("again")


def test_volumes_in_memory(podman: Podman) -> None:
    """A named volume that is a tmpfs comes back with its contents; one that has others by then keeps those, with a warning."""
    podman("volume", "create", "-o", "type=tmpfs", "-o", "device=tmpfs", "memory")
    with contextlib.ExitStack() as stack:
        stack.callback(podman, "volume", "rm", "-f", "memory", check=False)
        stack.callback(podman.remove_all)
        options = ("-v", "memory:/memory", "--tmpfs", "/scratch:size=1m")
        podman.start("source", options=options)
        podman.ready("source")
        podman.exec(
            "source",
            "sh",
            "-c",
            "mkdir /memory/in; echo one >/memory/in/file; echo two >/dev/shm/two; echo three >/scratch/three",
        )
        holding(podman, "source", "3<>/memory/in/file")
        podman.checkpoint("source", "memory:1")
        podman.remove("source")
        wanted = {"smr.restore": "memory:1", **FAIL}
        podman.start("again", options=options, annotations=wanted)
        assert podman.exec("again", "cat", "/memory/in/file", "/dev/shm/two", "/scratch/three").stdout.split() == [
            "one",
            "two",
            "three",
        ]
        podman.exec("again", "sh", "-c", "rm /memory/in/file; echo later >/memory/in/file")
        podman.exec("again", "sh", "-c", "echo later >/dev/shm/later; echo other >/dev/shm/two")
        podman("stop", "-t", "0", "again")
        podman("start", "again")
        assert podman.exec("again", "cat", "/memory/in/file").stdout == "one\n"


def test_a_pods_shared_memory(podman: Podman) -> None:
    """Containers of a pod share /dev/shm: one that is restored finds its files there again, and others keep theirs."""
    podman(
        "run",
        "-d",
        "--name=owner",
        f"--cgroup-parent={podman.parent}",
        "--ipc=shareable",
        "localhost/smr-test:1",
        "sleep",
        "1000",
    )
    options = ("--ipc=container:owner",)
    podman.start("source", "shm", options=options)
    podman.ready("source")
    podman.ask("source", "shm")
    podman.checkpoint("source", "pod:1")
    podman.remove("source")
    podman.exec("owner", "sh", "-c", "cd /dev/shm; for file in *; do echo x >$file; done; echo mine >/dev/shm/mine")
    podman.start("again", "shm", options=options, annotations={"smr.restore": "pod:1", **FAIL})
    assert podman.ask("again", "shm")["named"] == 2
    assert podman.exec("owner", "cat", "/dev/shm/mine").stdout == "mine\n"
    podman.remove("again")
    podman.remove("owner")


def test_what_is_mounted_below_a_volume(podman: Podman, data: Path) -> None:
    """It comes along, what the new source has more does too, and what is mounted there later where the spec wants it so."""
    with contextlib.ExitStack() as stack:

        def memory(name: str) -> None:
            (data / name).mkdir()
            run(["mount", "-t", "tmpfs", "tmpfs", data / name])
            stack.callback(run, ["umount", data / name])
            (data / name / "file").write_text(f"{name}\n")

        stack.callback(podman.remove_all)
        memory("sub")
        podman.start("source", options=("-v", f"{data}:/data:rslave"))
        podman.ready("source")
        podman.checkpoint("source", "below:1")
        podman.remove("source")
        memory("more")
        wanted = {"smr.restore": "below:1", **FAIL}
        podman.start("again", options=("-v", f"{data}:/data:rslave"), annotations=wanted)
        memory("late")
        read = podman.exec("again", "cat", "/data/sub/file", "/data/more/file", "/data/late/file")
        assert read.stdout.split() == ["sub", "more", "late"]
        assert [name for name in ("sub", "more", "late") if (data / name).is_mount()] == ["sub", "more", "late"]
        podman.remove("again")
        podman.start("again", options=("-v", f"{data}:/data:rprivate"), annotations=wanted)
        memory("later")
        assert podman.exec("again", "ls", "/data/late", "/data/later").stdout.split() == ["/data/late:", "file", "/data/later:"]
        podman.remove("again")
        other = data / "in"
        done = podman.start("again", options=("-v", f"{other}:/data:rslave"), annotations=wanted, check=False)
        assert f"mount /data/sub: its source {other}/sub does not exist on this node" in done.stderr


def test_a_projected_volume(podman: Podman, data: Path) -> None:
    """Versions of a config map are folders that a link names: a file that is open in one is found in another container's."""

    def version(folder: str, content: str) -> None:
        (data / folder).mkdir()
        (data / folder / "key").write_text(content)
        (data / "..tmp").symlink_to(folder)
        (data / "..tmp").rename(data / "..data")

    (data / "key").symlink_to("..data/key")
    version("..2024_05_01", "one")
    podman.start("source", options=("-v", f"{data}:/config:ro"))
    podman.ready("source")
    holding(podman, "source", "3</config/key")
    podman.checkpoint("source", "projected:1")
    podman.remove("source")
    version("..2025_06_02", "two")
    shutil.rmtree(data / "..2024_05_01")
    wanted = {"smr.restore": "projected:1", **FAIL}
    podman.start("again", options=("-v", f"{data}:/config:ro"), annotations=wanted)
    read = podman.exec("again", "sh", "-c", "for pid in /proc/[0-9]*; do readlink $pid/fd/3; done", check=False)
    assert "/config/..2025_06_02/key" in read.stdout.split()
    podman.remove("again")
    version("..2025_07_03", "longer")
    shutil.rmtree(data / "..2025_06_02")
    done = podman.start("again", options=("-v", f"{data}:/config:ro"), annotations=wanted, check=False)
    assert "has 6 bytes, and had 3 at the checkpoint" in done.stderr


def test_a_new_mount_in_a_user_namespace(podman: Podman, data: Path) -> None:
    """It is given there too; a tmpfs belongs to the container's root, and has what the root had there."""
    users = ("--uidmap=0:200000:65536", "--gidmap=0:200000:65536")
    data.chmod(0o755)
    podman.start("source", options=users)
    podman.ready("source")
    podman.checkpoint("source", "users:1")
    podman.remove("source")
    options = (*users, "-v", f"{data}:/new/data:ro", "--tmpfs", "/etc:mode=750")
    podman.start("again", options=options, annotations={"smr.restore": "users:1", **FAIL})
    assert podman.exec("again", "cat", "/new/data/in/held", "/etc/marker").stdout == "abcfrom the image\n"
    assert podman.exec("again", "stat", "-c", "%u %g %a", "/etc").stdout == "0 0 750\n"
    assert "ead-only" in podman.exec("again", "touch", "/new/data/x", check=False).stderr
