"""Labels of a security module: AppArmor's profile, SELinux's labels of processes and mounts.

CRIU puts each process under the label that it had (criu/lsm.c), but the new container has one of its own: SELinux gives each
container other categories, and files of one are closed to the label of another. So CRIU is told the new spec's label by
--lsm-profile, and the one of its mounts by --lsm-mount-context, as podman does for its own restores. What the image's processes
had is in `inventory.img`; what this node has is asked of the kernel as CRIU asks it.

    image     node      what is done
    same      same      the label of the new spec, where it has another one; else the checkpoint's
    none      any       processes without a label stay so: a warning where the new spec has one
    one       another   CRIU refuses such an image, so labels are taken out of it: a warning

Standard library only, unless labels are taken out.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec, as_object

_APPARMOR = Path("/sys/kernel/security/apparmor")
_SELINUX = Path("/sys/fs/selinux/enforce")
_UNCONFINED = "unconfined"
_INVENTORY_MAGIC_BYTES = 4
_LSMTYPE = 6  # InventoryEntry.lsmtype


class Module(StrEnum):
    """By its number in CRIU's images: none 0, SELinux 1, AppArmor 2."""

    NONE = "none"
    SELINUX = "selinux"
    APPARMOR = "apparmor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What is to be done: options of CRIU, whether the image's labels go, and what a user should know."""

    options: Mapping[str, str] = field(default_factory=dict)
    strip: bool = False
    warnings: tuple[str, ...] = ()


def of_node(apparmor: Path = _APPARMOR, selinux: Path = _SELINUX) -> Module:
    """The module that CRIU sees here (kerndat_lsm): AppArmor first."""
    if apparmor.exists():
        return Module.APPARMOR
    return Module.SELINUX if selinux.exists() else Module.NONE


def of_image(folder: Path) -> Module:
    """The module where the dump in `folder` was made; without protobuf, which is slow to load. Raises IMAGE_CORRUPT."""
    from smr.images.archive_facts import wire_fields

    data = (folder / "inventory.img").read_bytes()
    try:
        (size,) = struct.unpack_from("<I", data, _INVENTORY_MAGIC_BYTES)
        start = _INVENTORY_MAGIC_BYTES + 4
        number = next((value for key, value in wire_fields(data[start : start + size]) if key == _LSMTYPE), 0)
    except (struct.error, ValueError) as error:
        raise SmrError(f"CRIU image inventory.img: {error}", hint="checkpoint again", code=Code.IMAGE_CORRUPT) from error
    return {1: Module.SELINUX, 2: Module.APPARMOR}.get(number if isinstance(number, int) else 0, Module.NONE)


def apply(folder: Path, old: Spec, new: Spec) -> Labels:
    """`plan` for the dump in `folder` on this node; labels that cannot stay are taken out of its images."""
    node = of_node()
    if node is Module.NONE and not any(label_of(old, module) for module in Module):
        return Labels()
    labels = plan(of_image(folder), node, old, new)
    if labels.strip:
        from smr.images.creds import edit_creds

        edit_creds(folder, unlabelled=True)
    return labels


def label_of(spec: Spec, module: Module) -> str:
    """The label that a spec gives its processes under this module; empty for none."""
    process = as_object(spec.document.get("process"), "process")
    key = {Module.APPARMOR: "apparmorProfile", Module.SELINUX: "selinuxLabel"}.get(module, "")
    return str(process.get(key) or "")


def plan(image: Module, node: Module, old: Spec, new: Spec) -> Labels:
    """What a restore of an image of `image` on a node with `node` does about labels."""
    wanted, had = label_of(new, node), label_of(old, image)
    if image is Module.NONE or (image is not node and not had):
        told = f"{_name(node)} label {wanted} was not given: processes of the checkpoint have none" if wanted else ""
        return Labels(warnings=(told,) if told else ())
    if image is not node:
        lost = f"{_name(image)} label {had} of the checkpoint is left out: this node has {_name(node)}"
        unconfined = f"; processes do not get {wanted} instead" if wanted else ""
        return Labels(strip=True, warnings=(lost + unconfined,))
    return _same(node, wanted, had, old, new)


def _same(module: Module, wanted: str, had: str, old: Spec, new: Spec) -> Labels:
    context = _mount_label(new)
    if wanted == had and context == _mount_label(old):
        return Labels()  # CRIU does it by itself
    if not had or not wanted:
        what = f"label {wanted} was not given: processes of the checkpoint have none" if wanted else f"label {had} stays"
        return Labels(warnings=(f"{_name(module)} {what}",) if had or wanted else ())
    if not _plain_word(wanted + context):
        return Labels(warnings=(f"{_name(module)} label {had} stays: {wanted + context!r} is none that CRIU can be told",))
    profile = "none:" if (module, wanted) == (Module.APPARMOR, _UNCONFINED) else f"{module.value}:{wanted}"
    if module is Module.SELINUX and context:
        return Labels(options={"lsm-profile": profile, "lsm-mount-context": context})
    return Labels(options={"lsm-profile": profile})


def _mount_label(spec: Spec) -> str:
    return str(as_object(spec.document.get("linux"), "linux").get("mountLabel") or "")


def _plain_word(label: str) -> bool:
    """A label becomes a word of CRIU's configuration file, which knows quotes, comments and white space."""
    return label.isprintable() and label.isascii() and not any(c in label for c in " \t\"'#\\")


def _name(module: Module) -> str:
    return {Module.APPARMOR: "AppArmor", Module.SELINUX: "SELinux", Module.NONE: "no security module"}[module]
