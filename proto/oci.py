"""The parts of an OCI runtime spec (`config.json`) that SMR reads, typed; the rest of the document is carried along untouched.

Source: the OCI runtime specification 1.0 to 1.2. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from smr.proto.errors import Code, SmrError

Json = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One entry of `mounts`."""

    destination: str
    type: str
    source: str
    options: tuple[str, ...]

    @property
    def is_bind(self) -> bool:
        """runc treats a mount as bind by type or by option."""
        return self.type == "bind" or "bind" in self.options or "rbind" in self.options


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A container's spec. `document` is the whole JSON; the rest are the fields that SMR decides by."""

    document: Mapping[str, object]
    args: tuple[str, ...]
    terminal: bool
    rootfs: str
    rootfs_readonly: bool
    hostname: str
    annotations: Mapping[str, str]
    mounts: tuple[Mount, ...]
    namespaces: Mapping[str, str]
    cgroups_path: str

    def rootfs_path(self, bundle: Path) -> Path:
        """`root.path`, which may be relative to the bundle."""
        return bundle / self.rootfs


def as_object(value: object, what: str) -> Json:
    """`value` as a JSON object ({} for null), or SPEC_INVALID naming `what`."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SmrError(f"{what}: needed a JSON object, found {type(value).__name__}", code=Code.SPEC_INVALID)
    return value


def as_list(value: object, what: str) -> Sequence[object]:
    """`value` as a JSON array ([] for null), or SPEC_INVALID naming `what`."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise SmrError(f"{what}: needed a JSON array, found {type(value).__name__}", code=Code.SPEC_INVALID)
    return value


def parse_spec(document: Mapping[str, object]) -> Spec:
    """Read a spec. Raises SPEC_INVALID when a field that is read has the wrong type."""
    process = as_object(document.get("process"), "process")
    root = as_object(document.get("root"), "root")
    linux = as_object(document.get("linux"), "linux")
    namespaces = [as_object(entry, "linux.namespaces[]") for entry in as_list(linux.get("namespaces"), "linux.namespaces")]
    return Spec(
        document=document,
        args=tuple(str(arg) for arg in as_list(process.get("args"), "process.args")),
        terminal=bool(process.get("terminal", False)),
        rootfs=str(root.get("path", "rootfs")),
        rootfs_readonly=bool(root.get("readonly", False)),
        hostname=str(document.get("hostname", "")),
        annotations={key: str(value) for key, value in as_object(document.get("annotations"), "annotations").items()},
        mounts=tuple(_mount(as_object(entry, "mounts[]")) for entry in as_list(document.get("mounts"), "mounts")),
        namespaces={str(entry.get("type")): str(entry.get("path", "")) for entry in namespaces},
        cgroups_path=str(linux.get("cgroupsPath", "")),
    )


def load_spec(bundle: Path) -> Spec:
    """Read `config.json` of a bundle. Raises SPEC_INVALID when it is missing or is not a spec."""
    path = bundle / "config.json"
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SmrError(f"cannot read {path}: {error}", code=Code.SPEC_INVALID, bundle=bundle) from error
    return parse_spec(as_object(document, str(path)))


def _mount(entry: Json) -> Mount:
    return Mount(
        destination=str(entry.get("destination", "")),
        type=str(entry.get("type", "")),
        source=str(entry.get("source", "")),
        options=tuple(str(option) for option in as_list(entry.get("options"), "mounts[].options")),
    )
