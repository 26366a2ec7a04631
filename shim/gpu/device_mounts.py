"""Mounts of a container that are NVIDIA's: which they are, and how CRIU is told to take them from the new node.

Mounts of the spec (CDI's libraries) are the runtime's to name to CRIU. What a hook has mounted is in no spec:

    nvidia-cdi-hook disable-device-node-modification   a tmpfs, and a file of it over /proc/driver/nvidia/params:
                                                       CRIU carries both
    nvidia-container-runtime-hook (the old way)        libraries, programs, sockets and device nodes of the host, bind-mounted:
                                                       CRIU carries none, so they are external under their own path as key

The old hook's mounts are slaves of the host's, which CRIU cannot restore from a file (MOVE_MOUNT_SET_GROUP wants a mount as its
source); they are made private before a dump, which nobody can tell: below a file nothing is ever mounted.

An external mount comes back from what this node has in its place. runc's own externals win over those of CRIU's
configuration file (CRIU looks the last one up first, and reads the request after the file), so naming one twice does no harm.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from smr.proto.checkpoint import CheckpointConfig
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec, parse_spec
from smr.shim.criu import external_mounts
from smr.shim.gpu.device_nodes import nodes_of
from smr.shim.mountinfo import unescape

_HOST_LIBRARIES = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/lib/x86_64-linux-gnu",
    "/lib/aarch64-linux-gnu",
    "/lib64",
    "/run/nvidia/driver/usr/lib/x86_64-linux-gnu",
    "/run/nvidia/driver/usr/lib64",
)
_HOST_PROGRAMS = ("/usr/bin", "/usr/sbin", "/run/nvidia/driver/usr/bin")
_PROC_GPUS = "/proc/driver/nvidia/gpus/"
_NOTHING = "/dev/null"
# Nodes are kept in by the device cgroup; the rest is not given on the word of an image.
_NODES_AND_SOCKETS = ("/dev/", "/run/", "/var/run/", "/tmp/")
_CLONE_FS, _CLONE_NEWNS, _MS_PRIVATE = 0x200, 0x20000, 1 << 18
# File systems that CRIU makes anew, with their contents or from the kernel's, when their root is mounted in the container.
_CARRIED = frozenset({"tmpfs", "proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2", "overlay", "binfmt_misc", "fusectl"})

_LIBRARY = re.compile(
    r"(?:lib(?:cuda|cudadebugger|nvcuvid|nvoptix|nvidia-[\w-]+|(?:GLX|EGL|GLESv1_CM|GLESv2|vdpau)_nvidia|glxserver_nvidia)"
    r"|nvidia_drv|nvidia-drm_gbm)\.so(?:\.[\w.]+)?"
)
_PROGRAMS = frozenset(
    {
        "nvidia-smi",
        "nvidia-debugdump",
        "nvidia-persistenced",
        "nvidia-cuda-mps-control",
        "nvidia-cuda-mps-server",
        "nvidia-imex",
        "nvidia-imex-ctl",
        "nvidia-modprobe",
    }
)
_PLACES = re.compile(
    r"/dev/nvidia[\w-]*(?:/.*)?"
    r"|/proc/driver/nvidia(?:/.*)?"
    r"|(?:/usr)?/lib/firmware/nvidia/.*"
    r"|(?:/var)?/run/nvidia-(?:persistenced|fabricmanager|ctk-hook|container-devices)[\w-]*(?:/.*)?"
    r"|/tmp/nvidia-mps(?:/.*)?"
    r"|/etc/nvidia/nvidia-application-profiles-rc\.d(?:/.*)?"
    r"|/usr/share/nvidia/.*"
    r"|(?:/usr/share|/etc)/(?:glvnd|vulkan|egl|OpenCL|X11)/.*nvidia[^/]*"
)


def is_device_mount(destination: str) -> bool:
    """Whether a mount at this path in a container is NVIDIA's: a device, or what the driver's installation puts there.

    Such mounts belong to a node and its driver, not to the user: two nodes may have different ones for the same container.
    """
    if os.path.normpath(destination) != destination:
        return False  # an image may name any path, and "/dev/nvidia0/../.." is none of NVIDIA's
    name = PurePosixPath(destination).name
    return bool(_PLACES.fullmatch(destination) or _LIBRARY.fullmatch(name)) or (
        name in _PROGRAMS and PurePosixPath(destination).parent.name in {"bin", "sbin"}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HookMount:
    """An NVIDIA mount that is in no spec. `root` is its root within its file system, `device` that one's number (0:52)."""

    destination: str
    root: str
    device: str
    type: str
    private: bool
    external: bool
    read_only: bool = True


def nvidia_mounts(pid: int, spec: Spec, mountinfo: str | None = None) -> list[HookMount]:
    """NVIDIA's mounts of the container of `pid` that its spec does not have. `external`: CRIU cannot carry it by itself."""
    mounts = _mounts(_mountinfo(pid) if mountinfo is None else mountinfo)
    root = Path(f"/proc/{pid}/root")
    named = {_resolved(root, mount.destination) for mount in spec.mounts} | nodes_of(spec).keys()
    return [
        replace(mount, external=not _carried(mount, mounts))
        for mount in mounts
        if is_device_mount(mount.destination) and mount.destination not in named
    ]


def hook_destinations(pid: int, spec: Spec) -> tuple[str, ...]:
    """Destinations that a dump has to name, and the image's `external_mounts` has to keep beside those of the spec."""
    return tuple(dict.fromkeys(mount.destination for mount in nvidia_mounts(pid, spec) if mount.external))


def dump_externals(pid: int, spec: Spec) -> dict[str, str]:
    """CRIU's options for a dump (`criu.write_options`): {} where hooks have left nothing that CRIU cannot carry.

    Makes those mounts private in the running container. Raises CHECKPOINT_FAILED when it cannot.
    """
    _make_private(pid, [one.destination for one in nvidia_mounts(pid, spec) if one.external and not one.private])
    return external_mounts({destination: destination for destination in hook_destinations(pid, spec)})


def restore_externals(config: CheckpointConfig, spec: Spec) -> dict[str, str]:
    """CRIU's options for a restore: sources on this node for what the image has external and the new spec does not mount.

    Raises MOUNT_MISMATCH for a file of the driver's that this node does not have.
    """
    old = parse_spec(config.spec)
    given = {mount.destination for mount in spec.mounts if mount.is_bind} | nodes_of(spec).keys()
    wanted = [path for path in (*config.external_mounts, *nodes_of(old)) if path not in given]
    return external_mounts({path: _source(path, spec) for path in wanted if is_device_mount(path) or path in nodes_of(old)})


def check_restored(pid: int, config: CheckpointConfig, spec: Spec) -> None:
    """Raise RESTORE_FAILED when a mount of the driver's did not stay in the restored container, or may be written to.

    runc 1.1 runs the old hook's mounts again while CRIU works, in a mount namespace from which their end propagates. And CRIU
    mounts with the image's flags: an image must not get the host's driver to write to.
    """
    root = Path(f"/proc/{pid}/root")
    there = {mount.destination: mount for mount in _mounts((root.parent / "mountinfo").read_text(errors="surrogateescape"))}
    writable = {mount.destination for mount in spec.mounts if "ro" not in mount.options}
    for path in config.external_mounts:
        if not is_device_mount(path):
            continue
        mount = there.get(path) or there.get(_resolved(root, path))
        if mount is None:
            raise SmrError(
                f"mount {path} of the NVIDIA driver is missing in the restored container",
                hint="use CDI in place of the old hook (nvidia-container-runtime.mode=cdi), or runc 1.2 or newer",
                code=Code.RESTORE_FAILED,
                mount=path,
            )
        if not (mount.read_only or path in writable or path.startswith(_NODES_AND_SOCKETS)):
            raise SmrError(
                f"the image has {path} of the NVIDIA driver writable: needed read-only",
                hint="make the checkpoint again from a container whose driver mounts are read-only, as CDI makes them",
                code=Code.RESTORE_FAILED,
                mount=path,
            )


def _source(destination: str, spec: Spec) -> str:
    """What this node has for a mount: the same path, the same name where the driver is installed here, or nothing."""
    found = next((path for path in _places(destination, spec) if Path(path).exists()), None)
    if found is not None:
        return found
    if destination.startswith(_NODES_AND_SOCKETS):
        return _NOTHING  # a node of a GPU that is not here, or a daemon's socket: nothing has it open
    raise SmrError(
        f"mount {destination} of the checkpoint is the NVIDIA driver's, and this node has no {PurePosixPath(destination).name}",
        hint="give the container its GPU as the checkpoint's had it (CDI), on a node with the same driver installation",
        code=Code.MOUNT_MISMATCH,
        mount=destination,
    )


def _places(destination: str, spec: Spec) -> Iterable[str]:
    name = PurePosixPath(destination).name
    sources = [mount.source for mount in spec.mounts if mount.is_bind and is_device_mount(mount.destination)]
    yield from (source for source in sources if PurePosixPath(source).name == name)
    if destination.startswith(_NODES_AND_SOCKETS[1:]):
        return  # what the new container was not given, the image does not get
    if not destination.startswith("/proc/"):
        yield destination
    elif destination.startswith(_PROC_GPUS) and Path(_PROC_GPUS).is_dir():
        # The old GPU's place on the bus; what is read there is for people.
        yield from sorted(str(path) for path in Path(_PROC_GPUS).iterdir())
    if _LIBRARY.fullmatch(name):
        yield from (f"{folder}/{name}" for folder in dict.fromkeys(str(PurePosixPath(source).parent) for source in sources))
        yield from (f"{folder}/{name}" for folder in _HOST_LIBRARIES)
    elif name in _PROGRAMS:
        yield from (f"{folder}/{name}" for folder in _HOST_PROGRAMS)


def _mountinfo(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape")
    except OSError as error:
        raise SmrError(
            f"the mounts of process {pid} cannot be read: {error.strerror}",
            hint="see whether the container has ended",
            code=Code.CONTAINER_STATE,
        ) from error


def _mounts(text: str) -> list[HookMount]:
    """Every mount of a mountinfo, `external` still open."""
    found = []
    for line in text.split("\n"):
        before, _, after = line.partition(" - ")
        words = before.split(" ")
        if after:
            found.append(
                HookMount(
                    destination=unescape(words[4]),
                    root=unescape(words[3]),
                    device=words[2],
                    type=after.split(" ")[0],
                    private=not any(word.startswith(("shared:", "master:")) for word in words[6:]),
                    external=False,
                    read_only="ro" in words[5].split(","),
                )
            )
    return found


def _carried(mount: HookMount, mounts: Iterable[HookMount]) -> bool:
    """Whether the file system's own root, or the container's root that it lies in, is mounted in the container too."""
    return any(
        (other.root == "/" if mount.type in _CARRIED else other.destination == "/") and _same_file_system(mount, other)
        for other in mounts
    )


def _same_file_system(mount: HookMount, other: HookMount) -> bool:
    return other.device == mount.device and f"{mount.root}/".startswith(f"{other.root.rstrip('/')}/")


def _make_private(pid: int, destinations: Sequence[str]) -> None:
    """In the mount namespace of `pid`, by a thread that has a root of its own and ends there."""
    failure: list[str] = []

    def work() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if libc.unshare(_CLONE_FS) != 0 or libc.setns(fd, _CLONE_NEWNS) != 0:
                failure.append(os.strerror(ctypes.get_errno()))
                return
            for path in destinations:
                if libc.mount(None, os.fsencode(path), None, _MS_PRIVATE, None) != 0:
                    failure.append(f"{path}: {os.strerror(ctypes.get_errno())}")
        finally:
            os.close(fd)

    if destinations:
        thread = threading.Thread(target=work, name="smr-mounts")
        thread.start()
        thread.join()
    if failure:
        raise SmrError(
            f"a mount of the NVIDIA runtime's hook cannot be made private: {failure[0]}",
            hint="use CDI in place of the old hook: nvidia-ctk config --in-place --set nvidia-container-runtime.mode=cdi",
            code=Code.CHECKPOINT_FAILED,
        )


def _resolved(root: Path, destination: str, depth: int = 0) -> str:
    """A path of the container with its symbolic links followed within `root`: the kernel names mounts so."""
    done = "/"
    for part in PurePosixPath(destination).parts[1:]:
        step = os.path.normpath(f"{done.rstrip('/')}/{part}")
        try:
            target = (root / step.lstrip("/")).readlink() if depth < 40 else None
        except OSError:
            target = None
        done = (
            step
            if target is None
            else _resolved(root, f"{done}/{target}" if not target.is_absolute() else str(target), depth + 1)
        )
    return done
