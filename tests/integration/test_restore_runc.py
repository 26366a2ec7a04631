"""Restores through the OCI runtime command line by hand: runc old and new, crun; user namespaces; states between the verbs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.integration.command import eventually, run
from tests.integration.conftest import Warm, make_warm
from tests.integration.runc import Runc

FAIL = {"smr.fallback": "fail"}
COMMAND = ("python3", "/app/workload.py")
_images: dict[Path, Warm] = {}


@pytest.fixture
def image(restoring_runc: Runc) -> Warm:
    """An image for the tests here, made once for each runtime."""
    runc = restoring_runc
    if runc.path not in _images:
        _images[runc.path] = make_warm(runc, "runc-warm:1", "workers", "shm", "threads", "file")
    return _images[runc.path]


def bundle(runc: Runc, image: Warm, name: str = "again", **annotations: str) -> Path:
    """A bundle that asks for a restore of `image`."""
    return runc.bundle(name, *COMMAND, *image.features, annotations={"smr.restore": image.image, **FAIL, **annotations})


def test_create_then_start(restoring_runc: Runc, image: Warm) -> None:
    """After create the state is created and nothing runs; start lets the tree run, with its state."""
    runc = restoring_runc
    folder = bundle(runc, image)
    runc.create("again", folder, "--pid-file", str(folder / "pid"))
    state = runc.state("again")
    assert state["status"] == "created"
    assert int((folder / "pid").read_text()) == state["pid"]
    assert Path(f"/proc/{state['pid']}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    runc("start", "again")
    assert runc.state("again")["status"] == "running"
    assert runc.ask("again", "count") == {"count": image.count + 1, "boot": image.boot}
    assert runc.ask("again", "shm")["named"] == 3
    assert runc.ask("again", "threads") == {"values": [3, 3, 3, 3]}


def test_delete_of_a_created_container(restoring_runc: Runc, image: Warm) -> None:
    """A created container that is never started goes with delete --force, and the root is clean of mounts."""
    runc = restoring_runc
    folder = bundle(runc, image)
    runc.create("again", folder)
    runc("delete", "--force", "again")
    assert runc("state", "again", check=False).returncode != 0
    mounts = Path("/proc/self/mountinfo").read_text()
    assert f"{folder}/rootfs/" not in mounts


@pytest.mark.parametrize("signal", ["TERM", "KILL", "15", "SIGINT"])
def test_kill_of_a_created_container(restoring_runc: Runc, image: Warm, signal: str) -> None:
    """A created container has nothing that could handle a signal; one that asks it to end, ends it."""
    runc = restoring_runc
    runc.create("again", bundle(runc, image))
    runc("kill", "again", signal)
    eventually(lambda: runc.state("again")["status"] == "stopped", what="it is stopped")
    runc("delete", "again")


def test_run_detached(restoring_runc: Runc, image: Warm) -> None:
    """`run --detach` is create and start."""
    runc = restoring_runc
    folder = bundle(runc, image)
    with runc.output(folder) as output:
        argv = [*runc.smr, "run", "--detach", "--bundle", str(folder), "again"]
        subprocess.run(argv, env=runc.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=True, timeout=60)
    assert runc.ask("again", "count") == {"count": image.count + 1, "boot": image.boot}


def test_run_in_the_foreground(restoring_runc: Runc, image: Warm) -> None:
    """`run` waits for the restored tree, ends with its exit code, and deletes the container."""
    runc = restoring_runc
    folder = bundle(runc, image)
    with runc.output(folder) as output:
        argv = [*runc.smr, "run", "--bundle", str(folder), "again"]
        with subprocess.Popen(argv, env=runc.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as process:
            assert runc.ready("again")["boot"] == image.boot
            runc("kill", "again", "TERM")
            assert process.wait(20) == 7
    assert runc("state", "again", check=False).returncode != 0


def test_another_root_directory(restoring_runc: Runc, image: Warm, tmp_path: Path) -> None:
    """--root, --log and --log-format stand before the verb, as engines call it."""
    runc = restoring_runc
    options = ["--root", str(tmp_path / "root"), "--log", str(tmp_path / "log"), "--log-format", "json"]
    folder = bundle(runc, image)
    runc.create("again", folder, global_options=options)
    runc(*options, "start", "again")
    state = json.loads(runc(*options, "state", "again").stdout)
    assert state["status"] == "running"
    answer = runc(*options, "exec", "again", "wget", "-q", "-O-", "http://127.0.0.1:8000/count").stdout
    assert json.loads(answer) == {"count": image.count + 1, "boot": image.boot}
    runc(*options, "delete", "--force", "again")


def test_an_error_is_in_the_log_the_engine_gave(restoring_runc: Runc, tmp_path: Path) -> None:
    """A failed create exits 1 with one JSON line of level error in --log, and the message on stderr."""
    runc = restoring_runc
    folder = runc.bundle("again", *COMMAND, annotations={"smr.restore": "no-such:1", **FAIL})
    options = ["--log", str(tmp_path / "log"), "--log-format", "json"]
    done = runc.create("again", folder, global_options=options, check=False)
    assert done.returncode == 1
    assert "no-such:1" in done.stderr
    (line,) = (json.loads(line) for line in (tmp_path / "log").read_text().splitlines())
    assert line["level"] == "error"
    assert "no-such:1" in line["msg"]
    assert runc("state", "again", check=False).returncode != 0


def test_a_user_in_a_user_namespace(restoring_runc: Runc) -> None:
    """A server that is not root inside, in a user namespace."""
    runc = restoring_runc

    def edit(spec: dict[str, object]) -> None:
        linux, process = spec["linux"], spec["process"]
        assert isinstance(linux, dict)
        assert isinstance(process, dict)
        linux["namespaces"].append({"type": "user"})
        mapping = [{"containerID": 0, "hostID": 200000, "size": 65536}]
        linux["uidMappings"] = linux["gidMappings"] = mapping
        process["user"] = {"uid": 1000, "gid": 1000}
        # A user namespace may not mount sysfs of a network namespace that it does not own; nor need this test.
        spec["mounts"] = [mount for mount in spec["mounts"] if mount["type"] not in {"sysfs", "cgroup"}]

    (runc.path / "probe").parent.chmod(0o755)
    started = runc.start("source", "workers", "shm", edit=edit, check=False)
    if started.returncode != 0:
        runc.remove("source")
        pytest.skip(f"no container in a user namespace here: {started.stderr.strip()}")
    if "crun" in Path(runc.bare[-1]).name:
        pytest.skip("crun binds the host's device nodes into a user namespace: CRIU finds no root mount of them")
    warm = make_warm(runc, "userns:1", "workers", "shm", start=False)
    runc.start("again", "workers", "shm", annotations={"smr.restore": warm.image, **FAIL}, edit=edit)
    assert runc.ask("again")["uid"] == 1000
    assert os.stat(f"/proc/{runc.pid('again')}").st_uid == 201000
    assert runc.ask("again", "count") == {"count": warm.count + 1, "boot": warm.boot}
    assert runc.ask("again", "shm")["named"] == 3


def test_limits_are_the_new_containers(restoring_runc: Runc, image: Warm) -> None:
    """The cgroup limits of the new bundle are in force, and all restored processes are in its cgroup."""
    runc = restoring_runc
    memory, unified = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup/cgroup.controllers")
    if runc.prefix or not (memory.exists() or "memory" in unified.read_text().split()):
        pytest.skip("no memory controller in this hierarchy")

    def edit(spec: dict[str, object]) -> None:
        linux = spec["linux"]
        assert isinstance(linux, dict)
        linux["resources"] = {**linux.get("resources", {}), "memory": {"limit": 200 << 20}, "pids": {"limit": 66}}

    annotations = {"smr.restore": image.image, **FAIL}
    runc.start("again", *image.features, annotations=annotations, edit=edit)
    place = f"{runc.box.token}/again"
    files = (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "/sys/fs/cgroup/pids")
        if memory.exists()
        else ("/sys/fs/cgroup", "memory.max", "/sys/fs/cgroup")
    )
    assert Path(files[0], place, files[1]).read_text().strip() == str(200 << 20)
    assert Path(files[2], place, "pids.max").read_text().strip() == "66"
    inside = set(Path(files[0], place, "cgroup.procs").read_text().split())
    assert str(runc.pid("again")) in inside
    assert len(inside) == 4


def test_a_read_only_root(restoring_runc: Runc) -> None:
    """A read-only root with a tmpfs in it: both come back as they were."""
    runc = restoring_runc

    def edit(spec: dict[str, object]) -> None:
        root, mounts = spec["root"], spec["mounts"]
        assert isinstance(root, dict)
        assert isinstance(mounts, list)
        root["readonly"] = True
        mounts.append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "size=16m", "mode=1777"]})

    runc.start("source", "file", "unix", edit=edit)
    warm = make_warm(runc, "readonly:1", "file", "unix", start=False)
    runc.start("again", "file", "unix", annotations={"smr.restore": warm.image, **FAIL}, edit=edit)
    assert runc.ask("again", "file") == {"offset": 4, "next": "45", "deleted": "gone"}
    assert runc.ask("again", "unix") == {"value": 3}
    assert runc.exec("again", "touch", "/data/x", check=False).returncode != 0


def test_a_mount_by_annotation(restoring_runc: Runc, tmp_path: Path) -> None:
    """`smr.mount./data` names the source for a bind mount that the new bundle lacks."""
    runc = restoring_runc
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "name").write_text(folder.name)

    def edit(spec: dict[str, object]) -> None:
        mounts = spec["mounts"]
        assert isinstance(mounts, list)
        mounts.append({"destination": "/data", "type": "bind", "source": str(old), "options": ["rbind"]})

    runc.start("source", edit=edit)
    warm = make_warm(runc, "mount:1", start=False)
    runc.start("again", annotations={"smr.restore": warm.image, "smr.mount./data": str(new), **FAIL})
    assert runc.exec("again", "cat", "/data/name").stdout == "new"
    assert runc.ask("again", "count") == {"count": warm.count + 1, "boot": warm.boot}


def test_the_runtimes_own_verbs(restoring_runc: Runc, tmp_path: Path) -> None:
    """`checkpoint` and `restore` of the runtime go through SMR's CRIU."""
    runc = restoring_runc
    runc.start("source", "workers")
    boot = runc.ready("source")["boot"]
    runc.ask("source", "count")
    words = ["--image-path", str(tmp_path / "images"), "--work-path", str(tmp_path)]
    runc("checkpoint", *words, "source")
    eventually(lambda: runc("state", "source", check=False).returncode != 0 or runc.state("source")["status"] == "stopped")
    runc("delete", "--force", "source", check=False)
    folder = runc.path / "source"
    with runc.output(folder) as output:
        argv = [*runc.smr, "restore", "--detach", "--bundle", str(folder), *words, "source"]
        subprocess.run(argv, env=runc.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=True, timeout=60)
    # The runtime gives a restored network namespace no working loopback: whoever calls restore by hand wires it.
    run(["nsenter", "-t", runc.pid("source"), "-n", "ip", "link", "set", "lo", "up"])
    assert runc.ask("source", "count") == {"count": 2, "boot": boot}
