"""User namespaces of podman: the restored container has the map of its own options, and its files follow."""

from __future__ import annotations

import json

import pytest

from tests.integration.podman import Podman

FAIL = {"smr.fallback": "fail"}


def users(outside: int, count: int = 65536) -> tuple[str, str]:
    """Options for a map of podman's."""
    return f"--uidmap=0:{outside}:{count}", f"--gidmap=0:{outside}:{count}"


@pytest.fixture(scope="module")
def mapped(podman: Podman) -> str:
    """An image of a container whose root is the host's 200000, with files of several ids on its root and in its /dev/shm."""
    podman.start("source", "shm", "file", options=(*users(200000), "--user=1000:1000", "--workdir=/tmp"))
    podman.ready("source")
    make = "echo root >/var/tmp/of-root; chown 33:44 /var/tmp/of-root; echo shm >/dev/shm/file; chown 5:6 /dev/shm/file"
    podman.exec("source", "sh", "-c", make, options=("--user=0",))
    podman.exec("source", "sh", "-c", "echo mine >/var/tmp/mine")
    podman.ask("source", "shm")
    podman.ask("source", "count")
    podman.checkpoint("source", "mapped:1")
    podman.remove("source")
    return "mapped:1"


def test_another_map(podman: Podman, mapped: str) -> None:
    """Processes and files have the same ids inside, the new ones outside; the process can still write to its files."""
    options = (*users(400000), "--user=1000:1000", "--workdir=/tmp")
    podman.start("again", "shm", "file", options=options, annotations={"smr.restore": mapped, **FAIL})
    assert podman.ask("again", "count")["count"] == 2
    assert podman.ask("again", "look")["uid"] == 1000
    podman.ask("again", "shm")
    with open(f"/proc/{podman.pid('again')}/uid_map") as file:
        assert file.read().split() == ["0", "400000", "65536"]
    with open(f"/proc/{podman.pid('again')}/status") as file:
        assert "Uid:\t401000" in file.read()
    look = "stat -c '%u:%g' /var/tmp/of-root /var/tmp/mine /dev/shm/file /dev/shm/workload && echo more >>/var/tmp/mine"
    assert podman.exec("again", "sh", "-c", look).stdout.split() == ["33:44", "1000:1000", "5:6", "1000:1000"]
    told = podman.exec("again", "cat", "/run/smr/restored.json").stdout  # as the user 1000
    assert json.loads(told)["container"] == podman.field("again", "{{.Id}}")


def test_a_map_that_is_too_small(podman: Podman, mapped: str) -> None:
    """A namespace without ids that the checkpoint had is refused; nothing is left of it."""
    options = (*users(400000, 1000), "--user=999", "--workdir=/tmp")
    done = podman.start("again", "shm", "file", options=options, annotations={"smr.restore": mapped, **FAIL}, check=False)
    assert done.returncode != 0
    assert "the user namespace has no user id 1000: found 0:400000:1000, needed the checkpoint's 0:200000:65536" in done.stderr


def test_no_user_namespace(podman: Podman, mapped: str) -> None:
    """Without one the restore is refused, and the hint says what to add."""
    done = podman.start(
        "again", "shm", "file", options=("--workdir=/tmp",), annotations={"smr.restore": mapped, **FAIL}, check=False
    )
    assert done.returncode != 0
    assert "user namespace differs" in done.stderr
