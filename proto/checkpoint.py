"""The config blob of a checkpoint image: the facts that a preflight and a restore need, versioned.

It is JSON, media type `CONFIG_TYPE`. `version` is `FORMAT_VERSION`; a reader refuses a newer one (IMAGE_VERSION) and ignores
fields it does not know within the same version. The layer media types of an image stand here too. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import TypeVar

from smr.proto.errors import Code, SmrError
from smr.proto.oci import as_list, as_object

FORMAT_VERSION = 1

ARTIFACT_TYPE = "application/vnd.smr.checkpoint.v1"
CONFIG_TYPE = "application/vnd.smr.checkpoint.config.v1+json"


class LayerType(StrEnum):
    """Media types of layers.

    CRIU      tar of CRIU's small images (all but pages-*.img), with `descriptors.json` of the runtime; flat, regular files only
    PAGES     one pages-N.img as CRIU reads it; the name is in the annotation org.opencontainers.image.title
    SEGMENT   pages that SMR delivers itself, cut into chunks; the first SEGMENT layer is segment 0
    PAGETABLE which chunk belongs at which address of which process (smr.images.pagetable); there is one where there are segments
    ROOTFS    tar of the writable layer, OCI layer semantics (`.wh.` whiteouts, `.wh..wh..opq`)
    TMPFS     tar of an external tmpfs (/dev/shm); the destination is in the annotation `MOUNT_ANNOTATION`
    ENGINE    JSON that the source engine keeps about the container (podman's config.dump...); the title names the file
    """

    CRIU = "application/vnd.smr.criu.v1.tar"
    PAGES = "application/vnd.smr.criu.pages.v1"
    SEGMENT = "application/vnd.smr.segment.v1"
    PAGETABLE = "application/vnd.smr.pagetable.v1"
    ROOTFS = "application/vnd.smr.rootfs.diff.v1.tar"
    TMPFS = "application/vnd.smr.tmpfs.v1.tar"
    ENGINE = "application/vnd.smr.engine.v1+json"


TITLE_ANNOTATION = "org.opencontainers.image.title"
MOUNT_ANNOTATION = "vnd.smr.mount"


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The machine of the checkpoint. `cpu_flags` are those of /proc/cpuinfo, sorted."""

    architecture: str
    kernel: str
    criu: str
    runtime: str
    cpu_model: str = ""
    cpu_flags: tuple[str, ...] = ()
    cgroup: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The container that was checkpointed. Digest is empty where the root was no image (`--rootfs`).

    `image_layers` is the OCI chain id of the image's layers, where the engine knows it.
    """

    engine: str
    container_id: str
    container_name: str = ""
    image: str = ""
    image_digest: str = ""
    image_layers: str = ""
    rootfs: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One process of the tree, by its pid in the container's pid namespace. `stopped` tasks stay stopped after a restore."""

    pid: int
    ppid: int
    command: str
    threads: int = 1
    stopped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldFile:
    """A file on an external mount that a process had open: `path` below the mount's destination, "" for the mount itself.

    `mode` is st_mode. `size_bytes` is -1 where any size will do. `holder` says in words who has it, and how. `file` is its id
    among CRIU's files.
    """

    mount: str
    path: str
    mode: int
    size_bytes: int = -1
    writable: bool = False
    holder: str = ""
    file: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stdio:
    """A descriptor of the first process that is what the runtime gave: a `pipe`, `null`, or a file or FIFO `outside`.

    `file` is its id among CRIU's files.
    """

    fd: int
    kind: str
    file: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """An interface of the container's network namespace, by the kernel's number; addresses with their prefix: "10.88.0.5/16"."""

    name: str
    index: int = 0
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU that the container had, in the order in which its processes see them. `uuid` as NVML writes it: GPU-xxxxxxxx-..."""

    uuid: str
    name: str
    memory_bytes: int
    minor: int = -1
    compute_capability: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaTask:
    """A process with CUDA, by its pid in the container. `vram_bytes` maps a GPU's uuid to what the process had there.

    `areas` are the addresses, [start, end), of memory that the driver made in it at the checkpoint for that.
    """

    pid: int
    vram_bytes: Mapping[str, int] = field(default_factory=dict)
    areas: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuState:
    """What a checkpoint has of GPUs: those of the container, the driver (such as 580.159.04) and the processes that used it."""

    driver: str
    cuda: int = 0
    gpus: tuple[Gpu, ...] = ()
    tasks: tuple[CudaTask, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """The quiesce and resume hooks of a checkpoint, as the annotations write them; empty for none."""

    quiesce: str = ""
    resume: str = ""
    timeout_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Connections:
    """TCP sockets that were connected (smr.images.connections): with another end that is in the image too, or was closed
    (`inner`), and others (`outer`), of which `saved` can be restored, where the container has the `addresses`.
    """

    inner: int = 0
    outer: int = 0
    saved: int = 0
    addresses: tuple[str, ...] = ()


_Record = TypeVar("_Record", Host, Source, Task, HeldFile, Interface, Stdio, Gpu, CudaTask, Hooks, Connections)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """All that is known of a checkpoint before a byte of its layers is read.

    `spec` is the OCI spec the container ran with. `external_mounts` are destinations that CRIU expects from outside.
    `bound_addresses` are addresses other than wildcard and loopback that sockets of the tree were bound to (link-local ones with
    their interface, "fe80::1%eth0"), `bound_devices` the interfaces that sockets were tied to, `peers` those outside of
    UDP and raw sockets ("10.88.0.1:53"); `ipv6`: some were of IPv6.
    `interfaces` are those of the network namespace, the host's too; `addresses` are what a container's own one had in all.
    `criu_options` are flags that the restore needs, because of what was in the tree; `criu_dump` are the options of the dump,
    with their values; `criu_why` gives reasons of both. `clocks_s` are the clocks as the container saw them. `held_files` are not
    in the image, and must be what they were. `connections` is None where CRIU has dumped them. Times are RFC 3339 UTC, sizes
    bytes.
    """

    created: str
    host: Host
    source: Source
    spec: Mapping[str, object]
    version: int = FORMAT_VERSION
    external_mounts: tuple[str, ...] = ()
    tasks: tuple[Task, ...] = ()
    addresses: tuple[str, ...] = ()
    bound_addresses: tuple[str, ...] = ()
    bound_devices: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    ipv6: bool = False
    interfaces: tuple[Interface, ...] = ()
    tcp: str = "close"
    connections: Connections | None = None
    criu_options: tuple[str, ...] = ()
    criu_dump: Mapping[str, str] = field(default_factory=dict)
    criu_why: Mapping[str, str] = field(default_factory=dict)
    clocks_s: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: int = 0
    pause_s: float = 0.0
    stages_s: Mapping[str, float] = field(default_factory=dict)
    gpu: GpuState | None = None
    hooks: Hooks = field(default_factory=Hooks)
    held_files: tuple[HeldFile, ...] = ()
    stdio: tuple[Stdio, ...] = ()

    def to_json(self) -> bytes:
        """Canonical JSON: sorted keys, no white space, UTF-8."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()


def parse_config(blob: bytes) -> CheckpointConfig:
    """Read a config blob. Raises IMAGE_VERSION for a newer format, IMAGE_CORRUPT when it is not a config."""
    try:
        document = as_object(json.loads(blob), "config")
    except (ValueError, SmrError) as error:
        raise SmrError(f"checkpoint config is not JSON: {error}", code=Code.IMAGE_CORRUPT) from error
    version = document.get("version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise SmrError(
            f"checkpoint has format version {version}, this SMR reads up to {FORMAT_VERSION}",
            hint="install a newer SMR on this node",
            code=Code.IMAGE_VERSION,
        )
    try:
        return _parse(document)
    except (TypeError, ValueError, KeyError, SmrError) as error:
        raise SmrError(f"checkpoint config cannot be read: {error}", code=Code.IMAGE_CORRUPT) from error


def _parse(document: Mapping[str, object]) -> CheckpointConfig:
    known = {key: document[key] for key in (f.name for f in fields(CheckpointConfig)) if key in document}
    known["host"] = _record(Host, document["host"], "host")
    known["source"] = _record(Source, document["source"], "source")
    known["tasks"] = tuple(_record(Task, task, "tasks[]") for task in as_list(document.get("tasks"), "tasks"))
    known["interfaces"] = tuple(
        _record(Interface, item, "interfaces[]") for item in as_list(document.get("interfaces"), "interfaces")
    )
    for name in ("external_mounts", "addresses", "bound_addresses", "bound_devices", "peers", "criu_options"):
        known[name] = tuple(str(item) for item in as_list(document.get(name), name))
    for name in ("criu_dump", "criu_why"):
        known[name] = {key: str(value) for key, value in as_object(document.get(name), name).items()}
    held = as_list(document.get("held_files"), "held_files")
    known["held_files"] = tuple(_record(HeldFile, item, "held_files[]") for item in held)
    known["clocks_s"] = {key: float(str(value)) for key, value in as_object(document.get("clocks_s"), "clocks_s").items()}
    known["stdio"] = tuple(_record(Stdio, item, "stdio[]") for item in as_list(document.get("stdio"), "stdio"))
    known["gpu"] = _gpu(document["gpu"]) if document.get("gpu") else None
    known["connections"] = _record(Connections, document["connections"], "connections") if document.get("connections") else None
    known["hooks"] = _record(Hooks, document.get("hooks") or {}, "hooks")
    return CheckpointConfig(**known)  # type: ignore[arg-type]  # checked by name above, by value where it is used


def _gpu(value: object) -> GpuState:
    found = as_object(value, "gpu")
    return GpuState(
        driver=str(found["driver"]),
        cuda=int(str(found.get("cuda", 0))),
        gpus=tuple(_record(Gpu, item, "gpu.gpus[]") for item in as_list(found.get("gpus"), "gpu.gpus")),
        tasks=tuple(_cuda_task(item) for item in as_list(found.get("tasks"), "gpu.tasks")),
    )


def _cuda_task(item: object) -> CudaTask:
    task = _record(CudaTask, item, "gpu.tasks[]")
    return replace(task, areas=tuple((int(start), int(end)) for start, end in task.areas))


def _record(kind: type[_Record], value: object, what: str) -> _Record:
    names = {f.name for f in fields(kind)}
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in as_object(value, what).items() if k in names}
    return kind(**known)  # type: ignore[arg-type]  # TypeError is IMAGE_CORRUPT in parse_config
