"""From what an archive says of its checkpoint to a CheckpointConfig; unknown facts stay empty, none is invented.

CRIU's images say the architecture, the processes and the memory; the engine's documents say the rest. The two CRIU fields that
are needed before protobuf is worth loading are read from the wire (https://protobuf.dev/programming-guides/encoding/).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from smr.proto.checkpoint import CheckpointConfig, Host, Source, Task
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec, as_list, as_object, parse_spec

if TYPE_CHECKING:
    from smr.images.criu_needs import Needs
    from smr.images.socket_move import SocketFacts

_CRIU_HEADER_BYTES = 8
# enum of CoreEntry.mtype in CRIU's core.proto, named as `uname -m` names them
_ARCHITECTURES = {1: "x86_64", 2: "armv7l", 3: "aarch64", 4: "ppc64le", 5: "s390x", 6: "mips64", 7: "loongarch64", 8: "riscv64"}
# Go's names, in the annotations of checkpoint images
_GO_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64", "arm": "armv7l"}
_ANNOTATION_FAMILIES = (
    "org.criu.checkpoint.",
    "io.podman.annotations.checkpoint.",
    "io.kubernetes.cri-o.annotations.checkpoint.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known beside CRIU's images. `annotations` are those of an OCI checkpoint image, of any family."""

    source: Source
    spec: Mapping[str, object]
    created: str = ""
    addresses: tuple[str, ...] = ()
    runtime: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)


def make_config(facts: Facts, checkpoint: Path) -> CheckpointConfig:
    """The config of the checkpoint whose CRIU images are in the directory `checkpoint`. ARCHIVE_INVALID when they are none."""
    try:
        spec = parse_spec(facts.spec)
    except SmrError as error:
        raise SmrError(f"the archive's spec cannot be read: {error.message}", code=Code.ARCHIVE_INVALID) from error
    inventory = checkpoint / "inventory.img"
    if not inventory.is_file() or not (checkpoint / "pstree.img").is_file():
        raise SmrError(
            "the archive holds no complete CRIU checkpoint: inventory.img or pstree.img is missing",
            code=Code.ARCHIVE_INVALID,
        )
    tasks, needed = _tasks(checkpoint), _needs(checkpoint)
    connected = any(checkpoint.glob("tcp-stream-*.img"))
    sockets = _sockets(checkpoint)
    return CheckpointConfig(
        created=facts.created or _rfc3339(inventory.stat().st_mtime),
        host=_host(facts, checkpoint, tasks),
        source=facts.source,
        spec=facts.spec,
        external_mounts=external_mounts(spec),
        tasks=tasks,
        addresses=facts.addresses or sockets.addresses,
        bound_addresses=sockets.addresses,
        bound_devices=sockets.devices,
        peers=sockets.peers,
        ipv6=sockets.ipv6,
        tcp="established" if connected else "close",
        criu_options=(*needed.restore, *(("tcp-established",) if connected else ())),
        criu_why={**needed.dump, **needed.restore},
        memory_bytes=sum(path.stat().st_size for path in checkpoint.glob("pages-*.img")),
        pause_s=pause_s(checkpoint.parent / "stats-dump"),
    )


def external_mounts(spec: Spec) -> tuple[str, ...]:
    """Destinations of the bind mounts of a spec: what CRIU was told lies outside."""
    return tuple(mount.destination for mount in spec.mounts if mount.is_bind)


def annotation(annotations: Mapping[str, str], name: str) -> str:
    """The value of a checkpoint annotation, in whichever family it stands."""
    return next((annotations[family + name] for family in _ANNOTATION_FAMILIES if annotations.get(family + name)), "")


def addresses_of(network_status: object) -> tuple[str, ...]:
    """The IP addresses in podman's network.status: {network: {"interfaces": {name: {"subnets": [{"ipnet": "10.88.0.5/16"}]}}}}.

    Raises SPEC_INVALID.
    """
    found: list[str] = []
    for network in as_object(network_status, "network.status").values():
        for interface in as_object(as_object(network, "network").get("interfaces"), "interfaces").values():
            for subnet in as_list(as_object(interface, "interface").get("subnets"), "subnets"):
                found.append(str(as_object(subnet, "subnet").get("ipnet", "")).partition("/")[0])
    return tuple(address for address in found if address)


def pause_s(stats: Path) -> float:
    """How long the tasks were frozen, from CRIU's stats-dump (StatsEntry.dump.frozen_time, microseconds); 0 when unknown."""
    try:
        data = stats.read_bytes()
        (size,) = struct.unpack_from("<I", data, _CRIU_HEADER_BYTES)
        entry = data[_CRIU_HEADER_BYTES + 4 : _CRIU_HEADER_BYTES + 4 + size]
        dump = next(value for number, value in wire_fields(entry) if number == 1)
        frozen = next(value for number, value in wire_fields(dump) if number == 2) if isinstance(dump, bytes) else 0
    except (OSError, struct.error, ValueError, StopIteration):
        return 0.0
    return frozen / 1e6 if isinstance(frozen, int) else 0.0


def wire_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message as (number, value). ValueError when it is not one."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if kind == 2:
            size, position = _varint(message, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if position + size > len(message):
            raise ValueError("a field ends after its message")
        yield number, message[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data) and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
        shift += 7
    raise ValueError("a number does not end")


def _tasks(checkpoint: Path) -> tuple[Task, ...]:
    from smr.images.criu_files import tasks

    try:
        return tasks(checkpoint)
    except SmrError as error:
        raise _unreadable(error) from error


def _unreadable(error: SmrError) -> SmrError:
    return SmrError(f"the archive's CRIU images cannot be read: {error.message}", code=Code.ARCHIVE_INVALID)


def _sockets(checkpoint: Path) -> SocketFacts:
    from smr.images import criu_sockets

    try:
        return criu_sockets.facts(checkpoint, {})
    except SmrError as error:
        raise _unreadable(error) from error


def _host(facts: Facts, checkpoint: Path, tasks: Sequence[Task]) -> Host:
    arch = annotation(facts.annotations, "host.arch")
    version = annotation(facts.annotations, "runtime.version").partition("\n")[0]
    return Host(
        architecture=_GO_ARCHITECTURES.get(arch, arch) or _architecture(checkpoint, tasks),
        kernel=annotation(facts.annotations, "host.kernel"),
        criu=criu_version(annotation(facts.annotations, "criu.version")),
        runtime=version or _runtime(facts.runtime),
        cgroup=annotation(facts.annotations, "cgroups.version") or annotation(facts.annotations, "cgroup.version"),
    )


def _runtime(name: str) -> str:
    """The real runtime's name, of a path, or of containerd's io.containerd.runc.v2; ours is nobody's real one."""
    word = Path(name).name
    return "" if "smr" in word else next((known for known in ("crun", "runc") if known in word), word)


def criu_version(number: str) -> str:
    """CRIU's version as it prints it, from the number that engines write (40101 is 4.1.1)."""
    if not number.isdigit() or len(number) > 8:
        return number
    major, minor, sub = int(number) // 10000, int(number) // 100 % 100, int(number) % 100
    return f"{major}.{minor}.{sub}" if sub else f"{major}.{minor}"


def _architecture(checkpoint: Path, tasks: Sequence[Task]) -> str:
    for task in tasks:
        try:
            data = (checkpoint / f"core-{task.pid}.img").read_bytes()
            (size,) = struct.unpack_from("<I", data, _CRIU_HEADER_BYTES)
            entry = data[_CRIU_HEADER_BYTES + 4 : _CRIU_HEADER_BYTES + 4 + size]
            mtype = next(value for number, value in wire_fields(entry) if number == 1)
        except (OSError, struct.error, ValueError, StopIteration):
            continue
        if isinstance(mtype, int) and mtype in _ARCHITECTURES:
            return _ARCHITECTURES[mtype]
    raise SmrError("the archive's CRIU images do not say their architecture", code=Code.ARCHIVE_INVALID)


def _needs(checkpoint: Path) -> Needs:
    from smr.images.criu_needs import needs

    try:
        return needs(checkpoint)
    except SmrError as error:
        raise _unreadable(error) from error


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
