"""The driver's mounts in a container: those that hooks have made, by mountinfo, and where a restore takes them from."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from smr.proto.checkpoint import CheckpointConfig, Host, Source
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec, parse_spec
from smr.shim.gpu import device_mounts, device_nodes

LIBCUDA = "/usr/lib/x86_64-linux-gnu/libcuda.so.580.1"
# As /proc/PID/mountinfo shows a container of the old hook, of CDI's hook for params, and of both kinds of mounts of the spec.
MOUNTINFO = f"""\
500 499 0:60 / / rw,relatime - overlay overlay rw,lowerdir=/l,upperdir=/u,workdir=/w
501 500 0:61 / /proc rw - proc proc rw
502 500 0:62 / /dev rw - tmpfs tmpfs rw
503 500 259:1 /usr/lib/libcuda.so.580.1 {LIBCUDA} ro,nosuid master:1 - ext4 /dev/root rw
504 500 259:1 /usr/lib/libnvidia-ml.so.580.1 /usr/lib/x86_64-linux-gnu/libnvidia-ml.so.580.1 ro - ext4 /dev/root rw
505 502 0:5 /nvidia0 /dev/nvidia0 ro,nosuid shared:7 master:2 - devtmpfs udev rw
506 500 0:70 / /run/nvidia-ctk-hook12 rw - tmpfs tmpfs rw,size=4k
507 501 0:70 /nvct-params /proc/driver/nvidia/params ro - tmpfs tmpfs rw,size=4k
508 501 0:21 /driver/nvidia/gpus/0000:1b:00.0 /proc/driver/nvidia/gpus/0000:1b:00.0 ro - proc proc rw
509 500 0:60 /usr/local/cuda/compat/libcuda.so.575 /usr/lib/x86_64-linux-gnu/libcuda.so.575 ro - overlay overlay rw,lowerdir=/l
510 500 259:2 /srv /data rw - ext4 /dev/data rw
"""


def spec(*binds: tuple[str, str], devices: tuple[str, ...] = ()) -> Spec:
    """A container with bind mounts (source, destination) and device nodes."""
    return parse_spec(
        {
            "mounts": [{"source": source, "destination": at, "options": ["ro", "bind"]} for source, at in binds],
            "linux": {"devices": [{"path": path, "type": "c", "major": 195, "minor": 0} for path in devices]},
        }
    )


def config(old: Spec, *external: str) -> CheckpointConfig:
    """An image of a container with `old`."""
    return CheckpointConfig(
        created="",
        host=Host(architecture="", kernel="", criu="", runtime=""),
        source=Source(engine="", container_id=""),
        spec=old.document,
        external_mounts=external,
    )


def test_mounts_of_hooks() -> None:
    """Mounts of the spec are the runtime's; of the rest, CRIU carries what lies in a file system that it makes anew."""
    mine = spec(("/usr/lib/libnvidia-ml.so.580.1", "/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.580.1"))
    found = {mount.destination: mount for mount in device_mounts.nvidia_mounts(os.getpid(), mine, MOUNTINFO)}
    assert {at: mount.external for at, mount in found.items()} == {
        LIBCUDA: True,
        "/dev/nvidia0": True,
        "/run/nvidia-ctk-hook12": False,
        "/proc/driver/nvidia/params": False,
        "/proc/driver/nvidia/gpus/0000:1b:00.0": True,
        "/usr/lib/x86_64-linux-gnu/libcuda.so.575": False,
    }
    assert {at: mount.private for at, mount in found.items() if mount.external} == {
        LIBCUDA: False,
        "/dev/nvidia0": False,
        "/proc/driver/nvidia/gpus/0000:1b:00.0": True,
    }


def test_a_node_of_the_spec_is_no_hooks() -> None:
    """In a user namespace the runtime mounts it."""
    found = device_mounts.nvidia_mounts(os.getpid(), spec(devices=("/dev/nvidia0",)), MOUNTINFO)
    assert "/dev/nvidia0" not in {mount.destination for mount in found}


def test_nothing_to_say_for_a_container_without() -> None:
    """This process has no such mounts: no options."""
    assert device_mounts.dump_externals(os.getpid(), spec()) == {}
    assert device_mounts.restore_externals(config(spec(), "/data", "/etc/hosts"), spec()) == {}


def test_sources_of_a_restore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the new spec mounts is left to the runtime; else its own copy elsewhere, the node's, or nothing for a node."""
    elsewhere, node = tmp_path / "cdi", tmp_path / "node"
    for folder in (elsewhere, node):
        folder.mkdir()
    (elsewhere / "libcuda.so.580.1").touch()
    (elsewhere / "libnvidia-ptxjitcompiler.so.580.1").touch()
    (node / "libnvidia-ml.so.580.1").touch()
    monkeypatch.setattr(device_mounts, "_HOST_LIBRARIES", (str(node),))
    image = config(
        spec(devices=("/dev/nvidia91", "/dev/nvidiactl")),
        LIBCUDA,
        "/usr/lib/libnvidia-ml.so.580.1",
        "/usr/lib/libnvidia-ptxjitcompiler.so.580.1",
        "/usr/lib/libnvidia-opencl.so.580.1",
        "/data",
        "/run/nvidia-persistenced/no-such-socket",
    )
    new = spec(
        (str(elsewhere / "libcuda.so.580.1"), "/usr/lib64/libcuda.so.580.1"),
        ("/somewhere", "/usr/lib/libnvidia-opencl.so.580.1"),
        devices=("/dev/nvidiactl",),
    )
    assert device_mounts.restore_externals(image, new)["external"].split("\n") == [
        f"mnt[{LIBCUDA}]:{elsewhere}/libcuda.so.580.1",
        f"mnt[/usr/lib/libnvidia-ml.so.580.1]:{node}/libnvidia-ml.so.580.1",
        f"mnt[/usr/lib/libnvidia-ptxjitcompiler.so.580.1]:{elsewhere}/libnvidia-ptxjitcompiler.so.580.1",
        "mnt[/run/nvidia-persistenced/no-such-socket]:/dev/null",
        "mnt[/dev/nvidia91]:/dev/null",
    ]


def test_a_library_that_this_node_does_not_have() -> None:
    """An error before anything is done: a process has it mapped."""
    with pytest.raises(SmrError) as caught:
        device_mounts.restore_externals(config(spec(), "/usr/lib/libcuda.so.0.0"), spec())
    assert caught.value.code is Code.MOUNT_MISMATCH
    assert "no libcuda.so.0.0" in caught.value.message


@pytest.mark.parametrize(
    "path",
    [
        "/dev/nvidia0/../../etc/shadow",
        "/run/nvidia-persistenced/../../etc",
        "/lib/firmware/nvidia/../../../etc/shadow",
        "//dev/nvidia0",
        "/etc/shadow",
    ],
)
def test_an_image_cannot_ask_for_any_file_of_the_node(path: str) -> None:
    """Only the driver's own, by paths that lead nowhere else."""
    assert device_mounts.restore_externals(config(spec(), path), spec()) == {}


def test_an_image_does_not_get_what_the_container_was_not_given() -> None:
    """A daemon's socket that is on this node, or a capability of the driver."""
    found = device_mounts.restore_externals(config(spec(), "/run/nvidia-persistenced"), spec())
    assert found == {"external": "mnt[/run/nvidia-persistenced]:/dev/null"}
    with pytest.raises(SmrError):
        device_mounts.restore_externals(config(spec(), "/proc/driver/nvidia/capabilities/mig/config"), spec())


@pytest.mark.parametrize("path", ["/dev/nvidia0 x", "/dev/nvidia]", "/tmp/nvidia-mps/a#b", "/dev/nvidia0\n/etc"])
def test_paths_that_would_change_the_configuration_file(path: str) -> None:
    """An image may say anything: no path may become another option, or another mount."""
    try:
        found = device_mounts.restore_externals(config(spec(), path), spec())
    except SmrError as error:
        assert error.code is Code.UNSUPPORTED
    else:
        assert found == {}


def test_links_of_the_container_are_followed_in_its_root(tmp_path: Path) -> None:
    """A spec says /var/run, the kernel /run."""
    for folder in ("run", "var", "usr/lib"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "var/run").symlink_to("/run")
    (tmp_path / "lib").symlink_to("usr/lib")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "usr/up").symlink_to("../../../../run")
    resolve = device_mounts._resolved
    assert resolve(tmp_path, "/var/run/nvidia-persistenced/socket") == "/run/nvidia-persistenced/socket"
    assert resolve(tmp_path, "/lib/firmware/nvidia/x") == "/usr/lib/firmware/nvidia/x"
    assert resolve(tmp_path, "/usr/up/x") == "/run/x"
    assert resolve(tmp_path, "/loop/x").endswith("/x")


def test_a_mount_that_did_not_stay() -> None:
    """This process lacks what the image has."""
    with pytest.raises(SmrError) as caught:
        device_mounts.check_restored(os.getpid(), config(spec(), LIBCUDA), spec())
    assert caught.value.code is Code.RESTORE_FAILED
    device_mounts.check_restored(os.getpid(), config(spec(), "/data"), spec())


def test_nodes_of_a_spec() -> None:
    """GPU nodes only; a mode with the bits of a device's type, as CDI may write it, keeps its permissions alone."""
    document = {
        "linux": {
            "devices": [
                {
                    "path": "/dev/nvidia0",
                    "type": "c",
                    "major": 195,
                    "minor": 0,
                    "fileMode": stat.S_IFCHR | 0o640,
                    "uid": 3,
                    "gid": 4,
                },
                {"path": "/dev/nvidia-caps/nvidia-cap1", "type": "c", "major": 236, "minor": 1},
                {"path": "/dev/dri/renderD128", "type": "u", "major": 226, "minor": 128},
                {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
                {"path": "/dev/nvidia-caps/..", "type": "c", "major": 8, "minor": 0},
                {"path": "/dev/nvidia-caps/../sda", "type": "c", "major": 8, "minor": 0},
                {"path": "/dev/nvidia1", "type": "b", "major": 8, "minor": 0},
            ]
        }
    }
    found = device_nodes.nodes_of(parse_spec(document))
    assert set(found) == {"/dev/nvidia0", "/dev/nvidia-caps/nvidia-cap1", "/dev/dri/renderD128"}
    first = found["/dev/nvidia0"]
    assert (first.device, first.mode, first.uid, first.gid) == (os.makedev(195, 0), 0o640, 3, 4)
    assert found["/dev/nvidia-caps/nvidia-cap1"].mode == 0o666


@pytest.mark.parametrize("number", [-1, "195", 1.5, 1 << 32])
def test_nodes_without_sense(number: object) -> None:
    """SPEC_INVALID, with the node's path."""
    with pytest.raises(SmrError) as caught:
        device_nodes.nodes_of(parse_spec({"linux": {"devices": [{"path": "/dev/nvidia0", "type": "c", "minor": number}]}}))
    assert caught.value.code is Code.SPEC_INVALID
    assert "/dev/nvidia0" in caught.value.message


def test_majors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of character devices only."""
    (tmp_path / "devices").write_text(
        "Character devices:\n  1 mem\n195 nvidia\n236 nvidia-caps\n511 nvidia-uvm\n\nBlock devices:\n259 nvidia-x\n"
    )
    monkeypatch.setattr(device_nodes, "_DEVICES", tmp_path / "devices")
    assert device_nodes.majors() == {195, 236, 511}
