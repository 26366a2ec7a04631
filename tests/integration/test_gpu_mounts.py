"""Mounts and device nodes that a GPU's installation puts into a container, through real runtimes and CRIU, without a GPU.

The hooks here do what NVIDIA's do, with files of this machine in place of the driver's. Checkpoint and restore are the runtime's
own, with the CRIU options that SMR would give, so that nothing but these options stands between.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from smr.proto.checkpoint import CheckpointConfig, Host, Source
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec, parse_spec
from smr.shim import criu, network
from smr.shim.gpu import device_mounts, device_nodes
from tests.integration.command import Done, run
from tests.integration.runc import Runc
from tests.integration.sandbox import Sandbox

Edit = Callable[[dict[str, object]], None]


class Mover:
    """Checkpoints a container of a bare runtime, and restores it into another bundle that has the files of the first."""

    def __init__(self, runc: Runc, folder: Path) -> None:
        self.runc, self.folder = runc, folder
        self.images = folder / "images"
        self.work = folder / "work"
        for path in (self.images, self.work):
            path.mkdir()
        # A checkpoint that fails would be tried on images of the one before.
        self.config = folder / "criu.conf"

    def _environment(self, options: Mapping[str, str]) -> dict[str, str]:
        criu.write_options(self.config, options)
        env = self.runc.env
        return {**env, "PATH": f"{self.runc.node.criu_folder}:{env['PATH']}", "CRIU_CONFIG_FILE": str(self.config)}

    def _paths(self) -> list[str]:
        return ["--image-path", str(self.images), "--work-path", str(self.work)]

    def checkpoint(self, name: str, options: Mapping[str, str] | None = None, *, check: bool = True) -> Done:
        """And end it."""
        argv = [*self.runc.bare, "checkpoint", *self._paths(), name]
        done = run(argv, env=self._environment(options or {}), check=False)
        if check and done.returncode != 0:
            raise AssertionError(f"{done.stderr}\n{criu.quote_log(self.work / 'dump.log')}")
        return done

    def restore(self, name: str, bundle: Path, options: Mapping[str, str] | None = None, *, check: bool = True) -> str:
        """What CRIU's log says, when it did not succeed."""
        argv = [*self.runc.bare, "restore", "--detach", "--bundle", str(bundle), *self._paths(), name]
        with self.runc.output(bundle) as output:
            done = subprocess.run(
                argv, check=False, env=self._environment(options or {}), stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, timeout=60,
            )  # fmt: skip
        said = "" if done.returncode == 0 else criu.quote_log(self.work / "restore.log")
        assert not (check and said), f"{said}\n{(bundle / 'output').read_text()}"
        if not said:
            network.loopback_up(Path(f"/proc/{self.runc.pid(name)}/ns/net"))
        return said

    def bundle(self, name: str, source: str, edit: Edit) -> Path:
        """A bundle for the workload with the files that `source` had written."""
        folder = self.runc.bundle(name, "python3", "/app/workload.py", edit=edit)
        run(["cp", "-a", f"{self.runc.path / source}/upper/.", folder / "rootfs/"])
        return folder


@pytest.fixture
def mover(restoring_runc: Runc, tmp_path: Path) -> Iterator[Mover]:
    """One for each runtime."""
    folder = restoring_runc.path.parent / f"{restoring_runc.path.name}-mover"
    folder.mkdir()
    yield Mover(restoring_runc, folder)
    shutil.rmtree(folder)


def hook(runc: Runc, kind: str, script: str) -> Edit:
    """An edit of a spec: a hook that runs `script` with the container's root in $root and its state in $state."""
    path = runc.path.parent / f"{runc.path.name}-{kind}.sh"
    path.write_text(
        "#!/bin/sh\nset -e\nPATH=/usr/sbin:/usr/bin:/sbin:/bin\nstate=$(cat)\n"
        """bundle=$(printf '%s' "$state" | sed 's/.*"bundle":"\\([^"]*\\)".*/\\1/')\nroot=$bundle/rootfs\n"""
        """pid=$(printf '%s' "$state" | sed 's/.*"pid":\\([0-9]*\\).*/\\1/')\n""" + script
    )
    path.chmod(0o755)

    def edit(spec: dict[str, object]) -> None:
        spec["hooks"] = {kind: [{"path": str(path)}]}

    return edit


PARAMS = """
mkdir -p $root/run/nvidia-ctk-hook1234
mount -t tmpfs -o size=4096 tmpfs $root/run/nvidia-ctk-hook1234
echo "ModifyDeviceFiles: 0" > $root/run/nvidia-ctk-hook1234/nvct-params
mount --bind $root/run/nvidia-ctk-hook1234/nvct-params $root/proc/version
"""


def test_a_hook_that_covers_a_file_of_proc(mover: Mover) -> None:
    """disable-device-node-modification: a tmpfs made by a createContainer hook, a file of it over one in /proc.

    CRIU carries both by itself: nothing need be external, and the new container's own hook does not run.
    """
    runc = mover.runc
    edit = hook(runc, "createContainer", PARAMS)
    runc.start("source", edit=edit, bare=True)
    boot = runc.ready("source")["boot"]
    assert runc.exec("source", "cat", "/proc/version").stdout == "ModifyDeviceFiles: 0\n"
    mover.checkpoint("source")
    mover.restore("again", mover.bundle("again", "source", edit))
    assert runc.ask("again")["boot"] == boot
    assert runc.exec("again", "cat", "/proc/version").stdout == "ModifyDeviceFiles: 0\n"


# In the place of a GPU's: harmless, and told apart by what they read.
NULL, ZERO = (1, 3), (1, 5)


def device(path: str, number: tuple[int, int], **more: int) -> dict[str, object]:
    """An entry of linux.devices."""
    return {"path": path, "type": "c", "major": number[0], "minor": number[1], **more}


def with_devices(*nodes: dict[str, object]) -> Edit:
    """An edit of a spec."""

    def edit(spec: dict[str, object]) -> None:
        spec["linux"]["devices"] = list(nodes)  # type: ignore[index]
        rules = [{"allow": True, "type": "c", "access": "rwm", "major": n["major"], "minor": n["minor"]} for n in nodes]
        spec["linux"]["resources"]["devices"] += rules  # type: ignore[index]

    return edit


def spec_of(bundle: Path) -> Spec:
    """A bundle's spec."""
    return parse_spec(json.loads((bundle / "config.json").read_text()))


def test_device_nodes_become_the_new_containers(mover: Mover) -> None:
    """Image: nvidia0 and a capability; spec: nvidia1, another capability. What both have stays; what is not NVIDIA's too."""
    runc = mover.runc
    uvm, fuse = device("/dev/nvidia-uvm", NULL), device("/dev/fuse", (10, 229))
    caps = "/dev/nvidia-caps/nvidia-cap"
    runc.start("source", edit=with_devices(device("/dev/nvidia0", NULL), uvm, fuse, device(f"{caps}1", NULL)), bare=True)
    boot = runc.ready("source")["boot"]
    mover.checkpoint("source")
    now = with_devices(device("/dev/nvidia1", ZERO, fileMode=0o644, uid=7, gid=8), uvm, fuse, device(f"{caps}2", ZERO))
    bundle = mover.bundle("again", "source", now)
    mover.restore("again", bundle)
    assert runc.exec("again", "ls", "/dev/nvidia0").stdout == "/dev/nvidia0\n"
    old, new = spec_of(runc.path / "source"), spec_of(bundle)
    changes = device_nodes.fix_devices(runc.pid("again"), old, new)
    assert changes.removed == (f"{caps}1", "/dev/nvidia0")
    assert sorted(changes.made) == [f"{caps}2", "/dev/nvidia1"]
    assert runc.exec("again", "sh", "-c", "ls /dev/nvidia* /dev/fuse").stdout.split() == [
        "/dev/fuse", "/dev/nvidia-uvm", "/dev/nvidia1", "/dev/nvidia-caps:", "nvidia-cap2",
    ]  # fmt: skip
    assert runc.exec("again", "stat", "-c", "%a %u %g %t %T", "/dev/nvidia1").stdout == "644 7 8 1 5\n"
    assert runc.exec("again", "sh", "-c", "head -c 3 /dev/nvidia1 | wc -c").stdout.strip() == "3"
    assert runc.ask("again")["boot"] == boot
    assert device_nodes.fix_devices(runc.pid("again"), old, new) == device_nodes.Changes()


def test_a_container_that_lays_traps_in_its_dev(mover: Mover) -> None:
    """Links where nodes are to be made lead nowhere: one in the way is replaced, one in place of a folder is an error."""
    runc = mover.runc
    runc.start("source", edit=with_devices(device("/dev/nvidia0", NULL), device("/dev/nvidia-caps/nvidia-cap1", NULL)), bare=True)
    runc.ready("source")
    runc.exec("source", "sh", "-c", "mkdir /victim; echo precious > /victim/file; ln -s /victim/file /dev/nvidia1")
    mover.checkpoint("source")
    bundle = mover.bundle("again", "source", with_devices(device("/dev/nvidia1", ZERO)))
    mover.restore("again", bundle)
    pid, old, new = runc.pid("again"), spec_of(runc.path / "source"), spec_of(bundle)
    assert device_nodes.fix_devices(pid, old, new).made == ("/dev/nvidia1",)
    assert runc.exec("again", "cat", "/victim/file").stdout == "precious\n"
    assert runc.exec("again", "stat", "-c", "%F", "/dev/nvidia1").stdout == "character special file\n"
    runc.exec("again", "sh", "-c", "rmdir /dev/nvidia-caps; ln -s /victim /dev/nvidia-caps")
    with pytest.raises(SmrError) as caught:
        device_nodes.fix_devices(pid, new, old)
    assert caught.value.code is Code.RESTORE_FAILED
    assert "/dev/nvidia-caps/nvidia-cap1" in caught.value.message
    assert runc.exec("again", "ls", "/victim").stdout == "file\n"


def test_the_hosts_dev_is_never_touched(mover: Mover) -> None:
    """A container that has it whole: the nodes of the host are not the container's to change, nor to add to."""
    runc = mover.runc
    host = {"destination": "/dev", "type": "bind", "source": "/dev", "options": ["rbind"]}

    def edit(spec: dict[str, object]) -> None:
        kept = [mount for mount in spec["mounts"] if not mount["destination"].startswith("/dev")]  # type: ignore[index]
        spec["mounts"] = [*kept, host]

    runc.start("source", edit=edit, bare=True)
    runc.ready("source")
    old = parse_spec({"linux": {"devices": [device("/dev/null", NULL)]}})
    new = parse_spec({"linux": {"devices": [device("/dev/nvidia77", ZERO)]}})
    with contextlib.suppress(SmrError):
        device_nodes.fix_devices(runc.pid("source"), old, new)
    assert not Path("/dev/nvidia77").exists()


LEGACY = """
nsenter --mount --target $pid sh -c '
touch $0/usr/lib/libcuda.so.580.1 $0/dev/nvidia0
mount --bind $1/libcuda.so.580.1 $0/usr/lib/libcuda.so.580.1
mount -o remount,bind,MODE $0/usr/lib/libcuda.so.580.1
mount --bind /dev/null $0/dev/nvidia0
mkdir -p $0/run/nvidia-persistenced
touch $0/run/nvidia-persistenced/socket
mount --bind $1/socket $0/run/nvidia-persistenced/socket
' $root FOLDER
"""


@pytest.mark.parametrize("read_only", [True, False])
def test_mounts_of_the_old_runtime_hook(mover: Mover, monkeypatch: pytest.MonkeyPatch, read_only: bool) -> None:
    """nvidia-container-runtime-hook: what it has bind-mounted is in no spec; it comes back from this node's own files.

    An image in which the driver's files are writable, as the hook never makes them, is found out.
    """
    runc = mover.runc
    script = LEGACY.replace("MODE", "ro" if read_only else "rw")
    theirs, ours = mover.folder / "old-node", mover.folder / "new-node"
    for folder, text in ((theirs, "old"), (ours, "new")):
        folder.mkdir()
        (folder / "libcuda.so.580.1").write_text(text)
        (folder / "socket").touch()
    edit = hook(runc, "prestart", script.replace("FOLDER", str(theirs)))
    runc.start("source", edit=edit, bare=True)
    boot = runc.ready("source")["boot"]
    old = spec_of(runc.path / "source")
    pid = runc.pid("source")
    found = device_mounts.hook_destinations(pid, old)
    assert sorted(found) == ["/dev/nvidia0", "/run/nvidia-persistenced/socket", "/usr/lib/libcuda.so.580.1"]
    assert mover.checkpoint("source", check=False).returncode != 0
    mover.checkpoint("source", device_mounts.dump_externals(pid, old))
    config = CheckpointConfig(
        created="",
        host=Host(architecture="", kernel="", criu="", runtime=""),
        source=Source(engine="runc", container_id="source"),
        spec=old.document,
        external_mounts=found,
    )
    bundle = mover.bundle("again", "source", hook(runc, "prestart", script.replace("FOLDER", str(ours))))
    with pytest.raises(SmrError) as caught:
        device_mounts.restore_externals(config, spec_of(bundle))
    assert caught.value.code is Code.MOUNT_MISMATCH
    assert "this node has no libcuda.so.580.1" in caught.value.message
    monkeypatch.setattr(device_mounts, "_HOST_LIBRARIES", (str(ours),))
    mover.restore("again", bundle, device_mounts.restore_externals(config, spec_of(bundle)))
    assert runc.ask("again")["boot"] == boot
    if "/usr/lib/libcuda.so.580.1" not in device_nodes.mounts_of(runc.pid("again")):
        # runc 1.1, whose own run of the hook takes the mounts away again.
        with pytest.raises(SmrError) as caught:
            device_mounts.check_restored(runc.pid("again"), config, spec_of(bundle))
        assert "1.2 or newer" in caught.value.hint
        assert "version 1.1" in runc("--version", bare=True).stdout
        return
    if read_only:
        device_mounts.check_restored(runc.pid("again"), config, spec_of(bundle))
    else:
        with pytest.raises(SmrError) as caught:
            device_mounts.check_restored(runc.pid("again"), config, spec_of(bundle))
        assert "writable: needed read-only" in caught.value.message
    assert runc.exec("again", "cat", "/usr/lib/libcuda.so.580.1").stdout == "new"
    assert runc.exec("again", "cat", "/run/nvidia-persistenced/socket").stdout == ""


@pytest.fixture
def own_dev(box: Sandbox, tmp_path: Path) -> Iterator[None]:
    """A /dev of the sandbox's own, with two more nodes, as on a node with two GPUs."""
    del box
    run(["mount", "-t", "tmpfs", "tmpfs", tmp_path])
    run(
        [
            "sh",
            "-c",
            f"cd /dev && cp -a null zero full random urandom tty ptmx fd stdin stdout stderr {tmp_path}/ 2>/dev/null || :",
        ]
    )
    for name, minor in (("nvidia70", "3"), ("nvidia71", "5")):
        run(["mknod", "-m", "666", tmp_path / name, "c", "1", minor])
    for name in ("pts", "shm", "mqueue"):
        if (Path("/dev") / name).is_dir():
            (tmp_path / name).mkdir()
            run(["mount", "--rbind", f"/dev/{name}", tmp_path / name])
    run(["mount", "--rbind", tmp_path, "/dev"])
    yield
    run(["umount", "-l", "/dev"])
    run(["umount", "-l", tmp_path])


@pytest.mark.usefixtures("own_dev")
def test_device_nodes_in_a_user_namespace(mover: Mover) -> None:
    """There they are mounts of the host's nodes: the image's comes back, goes, and the new container's is mounted."""
    runc = mover.runc
    if runc.prefix:
        pytest.skip("the runtime runs in another mount namespace, which has the host's /dev")

    def user(edit: Edit) -> Edit:
        def both(spec: dict[str, object]) -> None:
            edit(spec)
            linux = spec["linux"]
            linux["namespaces"].append({"type": "user"})  # type: ignore[index]
            mapping = [{"containerID": 0, "hostID": 200000, "size": 65536}]
            linux["uidMappings"] = linux["gidMappings"] = mapping  # type: ignore[index]
            spec["mounts"] = [mount for mount in spec["mounts"] if mount["type"] not in {"sysfs", "cgroup"}]  # type: ignore[index]

        return both

    runc.path.parent.chmod(0o755)
    mover.folder.chmod(0o755)
    edit = user(with_devices(device("/dev/nvidia70", NULL)))
    started = runc.start("source", edit=edit, bare=True, check=False)
    if started.returncode != 0:
        pytest.skip(f"no container in a user namespace here: {started.stderr.strip()}")
    boot = runc.ready("source")["boot"]
    old = spec_of(runc.path / "source")
    mover.checkpoint("source", device_mounts.dump_externals(runc.pid("source"), old))
    mover.images.chmod(0o755)
    for file in mover.images.iterdir():
        file.chmod(0o644)
    bundle = mover.bundle("again", "source", user(with_devices(device("/dev/nvidia71", ZERO))))
    new = spec_of(bundle)
    config = CheckpointConfig(
        created="",
        host=Host(architecture="", kernel="", criu="", runtime=""),
        source=Source(engine="runc", container_id="source"),
        spec=old.document,
    )
    mover.restore("again", bundle, device_mounts.restore_externals(config, new))
    pid = runc.pid("again")
    assert device_nodes.mounts_of(pid)["/dev/nvidia70"] != ""
    changes = device_nodes.fix_devices(pid, old, new)
    assert changes == device_nodes.Changes(removed=("/dev/nvidia70",), made=("/dev/nvidia71",))
    assert runc.exec("again", "sh", "-c", "ls /dev/nvidia*").stdout.split() == ["/dev/nvidia71"]
    assert runc.exec("again", "sh", "-c", "head -c 3 /dev/nvidia71 | wc -c").stdout.strip() == "3"
    assert runc.ask("again")["boot"] == boot
    assert device_nodes.fix_devices(pid, old, new) == device_nodes.Changes()
