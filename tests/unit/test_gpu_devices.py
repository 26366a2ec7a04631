"""The GPUs of a container, from its spec: nodes, binds, privileged, the old hook, and CUDA's own choice among them."""

from __future__ import annotations

import pytest

from smr.proto.checkpoint import Gpu
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec, parse_spec
from smr.shim.gpu import devices
from smr.shim.gpu.inventory import Inventory, NodeGpu
from tests.fakes.nvml import uuid

# The bus order is not that of the minors, as on real machines.
MINORS = (2, 0, 1, 3)
NODE = Inventory(
    driver="580.159.04",
    gpus=tuple(
        NodeGpu(gpu=Gpu(uuid=uuid(index + 1), name="NVIDIA H200", memory_bytes=1, minor=minor), index=index)
        for index, minor in enumerate(MINORS)
    ),
)
HOOK = {"prestart": [{"path": "/usr/bin/nvidia-container-runtime-hook", "args": ["prestart"]}]}


def spec(
    *nodes: str,
    env: tuple[str, ...] = (),
    mounts: list[dict[str, object]] | None = None,
    hooks: dict[str, object] | None = None,
    renamed: dict[str, int] | None = None,
) -> Spec:
    """A container with device nodes by path (the minor from the name) or, in `renamed`, by path and minor."""
    found: list[dict[str, object]] = [
        {"path": path, "type": "c", "major": 195, "minor": int("".join(filter(str.isdigit, path)) or 255)} for path in nodes
    ]
    found += [{"path": path, "type": "c", "major": 195, "minor": minor} for path, minor in (renamed or {}).items()]
    return parse_spec({"process": {"env": list(env)}, "linux": {"devices": found}, "mounts": mounts or [], "hooks": hooks or {}})


def seen(container: Spec, used: tuple[str, ...] = ()) -> list[int]:
    """Indices of the container's GPUs on the node, in its order."""
    return [one.index for one in devices.gpus_of(container, NODE, used)]


def failure(container: Spec, node: Inventory = NODE) -> SmrError:
    """The error of a container that must have no list."""
    with pytest.raises(SmrError) as caught:
        devices.gpus_of(container, node)
    return caught.value


def test_nodes_in_the_order_of_the_bus() -> None:
    """Whatever order they have in the spec; control devices are no GPUs."""
    assert seen(spec("/dev/nvidiactl", "/dev/nvidia1", "/dev/nvidia-uvm", "/dev/nvidia2")) == [0, 2]


def test_no_gpu() -> None:
    """A container without nodes has none, whatever its variables say."""
    container = spec("/dev/fuse", env=("NVIDIA_VISIBLE_DEVICES=all", "CUDA_VISIBLE_DEVICES=0"))
    assert seen(container) == []
    assert not devices.has_gpus(container)


def test_a_node_by_another_name() -> None:
    """The minor number counts: CDI may give /dev/nvidia3 of the node as /dev/nvidia0."""
    container = spec(renamed={"/dev/nvidia0": 3})
    assert seen(container) == [3]
    assert devices.has_gpus(container)


def test_nvidia_visible_devices_does_not_take_from_the_nodes() -> None:
    """CDI sets it to void, so that the old hook does nothing; the nodes are there all the same."""
    assert seen(spec("/dev/nvidia0", "/dev/nvidia2", env=("NVIDIA_VISIBLE_DEVICES=void",))) == [0, 1]


def test_bind_mounted_node() -> None:
    """By the name of the file, where this node has none of it to look at."""
    mounts: list[dict[str, object]] = [
        {"destination": "/dev/nvidia3", "type": "bind", "source": "/dev/nvidia3", "options": ["bind"]}
    ]
    assert seen(spec(mounts=mounts)) == [3]


@pytest.mark.parametrize(
    "mount",
    [
        {"destination": "/dev", "type": "bind", "source": "/dev", "options": ["rbind"]},
        {"destination": "/dev/", "type": "devtmpfs", "source": "devtmpfs"},
    ],
)
def test_the_hosts_dev(mount: dict[str, object]) -> None:
    """All GPUs."""
    assert seen(spec(mounts=[mount])) == [0, 1, 2, 3]
    assert devices.has_gpus(spec(mounts=[mount]))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", []),
        ("NoDevFiles", []),
        ("-1", []),
        ("1", [2]),
        ("1,0", [2, 1]),
        ("2, 0", [3, 1]),
        ("0,7,1", [1]),
        ("0,0", []),
        (uuid(4), [3]),
        ("GPU-4,GPU-2", [3, 1]),
        (uuid(1), []),
    ],
)
def test_cuda_visible_devices(value: str, expected: list[int]) -> None:
    """CUDA's rules over the container's own GPUs: order, an end at the first that is none, nothing when one comes twice."""
    nodes = ("/dev/nvidia0", "/dev/nvidia1", "/dev/nvidia3")
    assert seen(spec(*nodes, env=("CUDA_VISIBLE_DEVICES=0", f"CUDA_VISIBLE_DEVICES={value}"))) == expected


def test_gpus_in_use_that_the_variable_hides() -> None:
    """A process may have set the variable itself: what it uses is not lost."""
    container = spec("/dev/nvidia0", "/dev/nvidia1", env=("CUDA_VISIBLE_DEVICES=0",))
    assert seen(container, (uuid(3), uuid(2), uuid(1))) == [1, 2]


@pytest.mark.parametrize(
    ("value", "expected"),
    [("all", [0, 1, 2, 3]), ("3,0", [0, 3]), (uuid(2), [1]), ("GPU-3", [2]), ("void", []), ("none", []), ("", [])],
)
def test_the_old_hook(value: str, expected: list[int]) -> None:
    """No nodes in the spec: NVIDIA_VISIBLE_DEVICES says which; its numbers are nvidia-smi's, its order does not count."""
    container = spec(env=(f"NVIDIA_VISIBLE_DEVICES={value}",), hooks=HOOK)
    assert devices.is_legacy(container)
    assert seen(container) == expected
    assert devices.has_gpus(container) is bool(expected)


def test_the_old_hook_asked_by_mounts() -> None:
    """The device plugin's other way."""
    mounts: list[dict[str, object]] = [
        {"destination": f"/var/run/nvidia-container-devices/{uuid(3)}", "source": "/dev/null", "options": ["bind"]}
    ]
    assert seen(spec(env=("NVIDIA_VISIBLE_DEVICES=/var/run/nvidia-container-devices",), mounts=mounts, hooks=HOOK)) == [2]


def test_other_hooks_are_not_the_old_one() -> None:
    """nvidia-cdi-hook leaves devices in the spec."""
    hooks: dict[str, object] = {"createContainer": [{"path": "/usr/bin/nvidia-cdi-hook", "args": ["x", "update-ldcache"]}]}
    assert not devices.is_legacy(spec(hooks=hooks))


def test_the_old_hook_with_a_gpu_that_is_not_there() -> None:
    """Named."""
    error = failure(spec(env=("NVIDIA_VISIBLE_DEVICES=9",), hooks=HOOK))
    assert error.code is Code.GPU_MISSING
    assert "names 9" in error.message


@pytest.mark.parametrize("word", ["MIG-0a1b", "0:1"])
def test_mig_devices_are_refused(word: str) -> None:
    """By the variable's name."""
    error = failure(spec(env=(f"NVIDIA_VISIBLE_DEVICES={word}",), hooks=HOOK))
    assert error.code is Code.GPU_UNSUPPORTED
    assert word in error.message


def test_a_node_without_a_gpu() -> None:
    """A stale CDI spec is told from a GPU that is lost."""
    assert failure(spec("/dev/nvidia7")).code is Code.GPU_MISSING
    lost = NodeGpu(gpu=Gpu(uuid="", name="", memory_bytes=0), index=4, fault="GPU is lost")
    error = failure(spec("/dev/nvidia7"), Inventory(driver="580.159.04", gpus=(*NODE.gpus, lost)))
    assert error.code is Code.GPU_BUSY
    assert "GPU 4: GPU is lost" in error.message


@pytest.mark.parametrize(
    "path",
    [
        "/dev/nvidia0",
        "/dev/nvidia-uvm",
        "/dev/nvidia-caps/nvidia-cap1",
        "/usr/lib/x86_64-linux-gnu/libcuda.so.580.159.04",
        "/usr/lib64/libnvidia-ml.so.580.159.04",
        "/usr/lib/x86_64-linux-gnu/libcudadebugger.so.580.159.04",
        "/usr/lib/x86_64-linux-gnu/libnvidia-ptxjitcompiler.so.580.159.04",
        "/usr/lib/x86_64-linux-gnu/libEGL_nvidia.so.580.159.04",
        "/usr/lib/x86_64-linux-gnu/libnvidia-egl-gbm.so.1.1.2",
        "/usr/lib/x86_64-linux-gnu/vdpau/libvdpau_nvidia.so.580.159.04",
        "/usr/bin/nvidia-smi",
        "/usr/sbin/nvidia-persistenced",
        "/lib/firmware/nvidia/580.159.04/gsp_ga10x.bin",
        "/run/nvidia-persistenced/socket",
        "/var/run/nvidia-fabricmanager/socket",
        "/proc/driver/nvidia/params",
        "/run/nvidia-ctk-hook7c1d",
        "/tmp/nvidia-mps",
        "/usr/share/glvnd/egl_vendor.d/10_nvidia.json",
        "/etc/vulkan/icd.d/nvidia_icd.json",
    ],
)
def test_mounts_of_the_driver(path: str) -> None:
    """Devices, libraries, programs, firmware, sockets: a node's, not the user's."""
    assert devices.is_device_mount(path)


@pytest.mark.parametrize(
    "path",
    [
        "/data",
        "/models/nvidia",
        "/home/me/nvidia-smi",
        "/dev/fuse",
        "/dev/shm",
        "/usr/lib/libcudart.so.12",
        "/usr/local/cuda/lib64/libcublas.so.12",
        "/usr/share/nvidia",
        "/etc/nvidia/other",
        "/run/nvidia.sock",
        "/data/libcuda.so.txt/models",
        "/etc/hosts",
    ],
)
def test_mounts_of_the_user(path: str) -> None:
    """What only looks like it is the user's."""
    assert not devices.is_device_mount(path)
