"""What podman users do with a restored container: attach, terminals, restarts, limits, networks, volumes, podman's own verbs."""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path

import pytest

from tests.integration.command import eventually
from tests.integration.conftest import Warm, make_warm
from tests.integration.podman import Podman
from tests.integration.terminal import converse, on_socket, on_terminal

FAIL = {"smr.fallback": "fail"}


def again(podman: Podman, warm: Warm, *options: str, name: str = "again") -> None:
    """A container restored from `warm`."""
    podman.start(name, *warm.features, options=options, annotations={"smr.restore": warm.image, **FAIL})


def warm_with(podman: Podman, image: str, *options: str, workload: tuple[str, ...] = ()) -> Warm:
    """An image of a container that was started with `options`, which is gone."""
    podman.start("source", *workload, options=options)
    return make_warm(podman, image, *workload, start=False)


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "tty"])
def test_attach(podman: Podman, terminal: bool) -> None:
    """attach to a restored container speaks with its stdin and stdout, with a terminal and without."""
    options = ("-i", "-t") if terminal else ("-i",)
    warm = warm_with(podman, f"attach-{terminal}:1".lower(), *options, workload=("--stdin",))
    again(podman, warm, *options)
    speak = on_terminal if terminal else on_socket
    with speak(["podman", "attach", "--sig-proxy=false", "again"], podman.env) as fd:
        converse(fd, "hello\n", "echo: hello")
    assert podman.ask("again", "count")["boot"] == warm.boot


def test_a_terminal_must_match(podman: Podman, podman_warm: Warm) -> None:
    """A checkpoint without a terminal does not come up in a container with one; the message says so."""
    done = podman.start(
        "again", *podman_warm.features, options=["-t"], annotations={"smr.restore": podman_warm.image, **FAIL}, check=False
    )
    assert done.returncode != 0
    assert "terminal" in done.stderr


def test_stop_and_start(podman: Podman, podman_warm: Warm) -> None:
    """stop runs the handler; start after it restores from the image once more."""
    again(podman, podman_warm)
    podman.ask("again", "count")
    podman("stop", "again")
    assert podman.field("again", "{{.State.ExitCode}}") == "7"
    podman("start", "again")
    assert podman.ask("again", "count") == {"count": podman_warm.count + 1, "boot": podman_warm.boot}


def test_a_restart_policy_restores_again(podman: Podman, podman_warm: Warm) -> None:
    """When a restored container fails, its restart policy brings it back warm."""
    again(podman, podman_warm, "--restart=on-failure:3")
    first = podman.pid("again")
    podman.exec("again", "wget", "-q", "-O-", "http://127.0.0.1:8000/exit/3", check=False)
    eventually(lambda: podman.pid("again") not in {0, first} and podman.ask("again"), what="it was restarted")
    assert podman.ask("again", "count") == {"count": podman_warm.count + 1, "boot": podman_warm.boot}
    assert podman.field("again", "{{.RestartCount}}") == "1"


def test_stats_top_and_inspect(podman: Podman, podman_warm: Warm) -> None:
    """The engine sees the container as any other: memory and processes in stats, three processes in top, running in inspect."""
    again(podman, podman_warm)
    (stats,) = json.loads(podman("stats", "--no-stream", "--format", "json", "again").stdout)
    assert int(stats["pids"]) == 4
    assert not stats["mem_usage"].startswith("0B")
    assert len(podman("top", "again", "pid").stdout.split()) == 1 + 4
    inspected = podman.inspect("again")
    assert inspected["State"]["Running"] is True
    assert inspected["Config"]["Annotations"]["smr.restore"] == podman_warm.image
    assert Path(f"/proc/{inspected['State']['Pid']}/root").exists()


def test_pause_and_unpause(podman: Podman, podman_warm: Warm) -> None:
    """The freezer of the new container's cgroup holds the restored processes."""
    again(podman, podman_warm)
    podman("pause", "again")
    assert _frozen(podman.pid("again"))
    podman("unpause", "again")
    assert podman.ask("again", "count")["count"] == podman_warm.count + 1


def _frozen(pid: int) -> bool:
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        state = Path(f"/sys/fs/cgroup/freezer{path}/freezer.state")
        if controllers == "freezer":
            return state.read_text() == "FROZEN\n"
        events = Path(f"/sys/fs/cgroup{path}/cgroup.events")
        if not controllers and events.exists():
            return "frozen 1" in events.read_text()
    raise AssertionError(f"process {pid} is in no cgroup with a freezer")


def test_a_read_only_root(podman: Podman) -> None:
    """--read-only: the root stays read-only, and the tmpfs mounts over it come back with what was in them."""
    warm = warm_with(podman, "readonly:1", "--read-only", workload=("file", "unix"))
    again(podman, warm, "--read-only")
    assert podman.ask("again", "file") == {"offset": 4, "next": "45", "deleted": "gone"}
    assert podman.exec("again", "cat", "/tmp/kept").stdout == "0123456789"
    assert podman.exec("again", "touch", "/data/x", check=False).returncode != 0


def test_seccomp_is_on(podman: Podman, podman_warm: Warm) -> None:
    """The restored processes are under the filter that they had."""
    again(podman, podman_warm)
    status = Path(f"/proc/{podman.pid('again')}/status").read_text()
    assert "Seccomp:\t2" in status
    inside = podman.exec("again", "cat", "/proc/1/status").stdout
    assert "Seccomp:\t2" in inside


def test_another_user(podman: Podman) -> None:
    """A server that is not root inside. Without CAP_SYS_RESOURCE CRIU can only do that in a user namespace."""
    options = ("--user=1000:1000", *(() if _may_raise_limits() else ("--uidmap=0:200000:65536", "--gidmap=0:200000:65536")))
    warm = warm_with(podman, "user:1", *options, workload=("workers", "unix", "shm"))
    again(podman, warm, *options)
    assert podman.ask("again")["uid"] == 1000
    assert podman.ask("again", "count") == {"count": warm.count + 1, "boot": warm.boot}
    assert podman.ask("again", "shm")["named"] == 3


def _may_raise_limits() -> bool:
    cap_sys_resource = 24
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff")]
    return bool(int(line.split()[1], 16) >> cap_sys_resource & 1)


def test_limits_are_the_new_containers(podman: Podman, podman_warm: Warm) -> None:
    """Memory and process limits of the new container are in force in its cgroup, and the processes are in it."""
    again(podman, podman_warm, "--memory=200m", "--pids-limit=77")
    found = {}
    for line in Path(f"/proc/{podman.pid('again')}/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        for name, file in (("memory", "memory.limit_in_bytes"), ("pids", "pids.max"), ("", "memory.max"), ("", "pids.max")):
            limit = Path("/sys/fs/cgroup", name, path.lstrip("/"), file)
            if name in names.split(",") and podman.parent in path and limit.exists():
                found[file] = limit.read_text().strip()
    assert found.get("memory.limit_in_bytes", found.get("memory.max")) == str(200 << 20)
    assert found["pids.max"] == "77"


def test_a_new_address_on_the_bridge(bridge: Podman) -> None:
    """The restored server answers at the new container's address, from outside, beside the source at the old one."""
    warm = make_warm(bridge, "bridge:1", "workers", remove=False)
    again(bridge, warm)
    old, new = bridge.address("source"), bridge.address("again")
    assert old != new
    assert _get(f"http://{new}:8000/count") == {"count": warm.count + 1, "boot": warm.boot}
    assert _get(f"http://{old}:8000/count") == {"count": warm.count + 1, "boot": warm.boot}


def test_a_published_port(bridge: Podman, podman_warm: Warm) -> None:
    """A port that podman publishes leads to the restored server."""
    again(bridge, podman_warm, "-p", "18999:8000")
    assert _get(f"http://{_own_address()}:18999/count")["count"] == podman_warm.count + 1


def _own_address() -> str:
    """An address of this machine other than loopback; the gateway of the bridge will do."""
    return f"10.213.{os.getpid() % 250}.1"


def test_the_sources_network_is_gone(bridge: Podman) -> None:
    """The network of the source was removed; the restore is on another one."""
    third = (os.getpid() + 1) % 250
    bridge("network", "create", f"--subnet=10.214.{third}.0/24", "gone")
    bridge.start("source", options=["--network=gone"])
    warm = make_warm(bridge, "gone:1", start=False)
    bridge("network", "rm", "gone")
    again(bridge, warm)
    assert _get(f"http://{bridge.address('again')}:8000/count") == {"count": warm.count + 1, "boot": warm.boot}


def test_the_hosts_network(podman: Podman) -> None:
    """With --network=host the server listens on the host again."""
    warm = _host_warm(podman)
    podman.start("again", "--port", "18998", options=["--network=host"], annotations={"smr.restore": warm.image, **FAIL})
    assert _get("http://127.0.0.1:18998/count") == {"count": 1, "boot": warm.boot}


def _host_warm(podman: Podman) -> Warm:
    podman.start("source", "--port", "18998", options=["--network=host"])
    boot = str(podman.ready("source", port=18998)["boot"])
    podman.checkpoint("source", "host:1")
    podman.remove("source")
    return Warm("host:1", (), 0, boot)


def _get(url: str) -> dict[str, object]:
    def ask() -> dict[str, object]:
        with urllib.request.urlopen(url, timeout=5) as response:
            return json.load(response)

    return eventually(ask, what=url)


def test_volumes_are_the_new_containers(podman: Podman, tmp_path: Path) -> None:
    """A volume at the same place with another content: the restored processes see the new one."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    warm = warm_with(podman, "volume:1", "-v", f"{old}:/data")
    again(podman, warm, "-v", f"{new}:/data")
    assert podman.exec("again", "cat", "/data/name").stdout == "new"
    assert Path(f"/proc/{podman.pid('again')}/root/data/name").read_text() == "new"


def test_smr_restore_runs_the_engines_command(podman: Podman, podman_warm: Warm) -> None:
    """`smr restore IMAGE` starts a container with podman, as the checkpoint's was."""
    words = ("--engine", "podman", "--name", "by-smr", "--", f"--cgroup-parent={podman.parent}")
    podman.node.smr("restore", podman_warm.image, *words, env=podman.env)
    assert podman.ready("by-smr")["boot"] == podman_warm.boot


def test_podmans_own_verbs(podman: Podman) -> None:
    """`podman container checkpoint` and `restore` work on our runtime."""
    podman.start("source", "workers", "shm")
    boot = podman.ready("source")["boot"]
    podman.ask("source", "count")
    podman.with_criu("container", "checkpoint", "source")
    assert not podman.running("source")
    podman.with_criu("container", "restore", "source")
    assert podman.ask("source", "count") == {"count": 2, "boot": boot}
    assert podman.ask("source", "shm")["named"] == 1


def test_an_archive_of_podman_restores_by_annotation(podman: Podman, tmp_path: Path) -> None:
    """`podman container checkpoint --export`, `smr import`, then a container with the annotation."""
    podman.start("source", "workers", "shm")
    boot = podman.ready("source")["boot"]
    podman.ask("source", "count")
    podman.exec("source", "sh", "-c", "echo made >/data/made")
    podman.with_criu("container", "checkpoint", "--export", tmp_path / "archive.tar.gz", "source")
    podman.remove("source")
    podman.node.smr("import", tmp_path / "archive.tar.gz", "-n", "imported:1")
    podman.start("again", "workers", "shm", annotations={"smr.restore": "imported:1", **FAIL})
    assert podman.ask("again", "count") == {"count": 2, "boot": boot}
    assert podman.exec("again", "cat", "/data/made").stdout == "made\n"


def test_an_exported_image_restores_with_podman(podman: Podman, podman_warm: Warm, tmp_path: Path) -> None:
    """`smr export`, then `podman container restore --import`, without any annotation."""
    podman.node.smr("export", podman_warm.image, "-o", tmp_path / "export.tar.gz")
    options = ("--name", "again", "--ignore-static-ip", "--ignore-static-mac")
    podman.with_criu("container", "restore", "--import", tmp_path / "export.tar.gz", *options)
    assert podman.ask("again", "count") == {"count": podman_warm.count + 1, "boot": podman_warm.boot}
