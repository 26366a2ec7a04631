"""Why each of CRIU's options is there, in a few words: kept in the image for a dump, in the record for a restore, and shown.

The reasons that come of what was in the tree are `smr.images.criu_needs`'; the others follow from what was asked of SMR.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from smr.proto.annotations import CRIU_PREFIX, Annotations, Tcp
from smr.proto.checkpoint import CheckpointConfig

NOT_USED = "allowed; nothing in the tree needed it"
_DUMP = {
    "tcp-close": "connections are SMR's to save",
    "network-lock": "connections are SMR's to save, so nothing has to be kept from them",
    "skip-in-flight": "connections that nobody has accepted yet are not saved",
    "irmap-scan-path": "paths that are watched: an overlay cannot open a watched file by its handle",
    "external": "files that are the node's: of a GPU's driver, or the container's output",
    "shell-job": "the first process leads no session",
}
_RESTORE = {
    "leave-stopped": "the tree is completed before any of it runs",
    "lazy-pages": "smr.pages=lazy",
    "external": "files of the GPU's driver are this node's",
    "inherit-fd": "the container's output is this engine's",
    "lsm-profile": "the label that this container has of AppArmor or SELinux",
    "lsm-mount-context": "the SELinux label of this container's mounts",
}


def of_dump(chosen: Mapping[str, str], found: Mapping[str, str], asked: Collection[str] = ()) -> dict[str, str]:
    """Option to reason, for the options of a dump; `found`: reasons that the dump itself gives, `asked`: the container's."""
    reasons = {name: found.get(name) or _DUMP.get(name) or NOT_USED for name in chosen}
    return reasons | {name: f"{CRIU_PREFIX}{name} asks for it" for name in asked if reasons.get(name) == NOT_USED}


def of_restore(
    options: Mapping[str, str], image: CheckpointConfig, annotations: Annotations, more: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Option to reason, for the options of a restore; `more` are reasons of those who added an option themselves."""
    connections = "smr.tcp=established" if annotations.tcp is Tcp.ESTABLISHED else f"smr.tcp={annotations.tcp.value}"
    reasons = {**_RESTORE, "tcp-close": f"{connections}: CRIU restores no connection", "tcp-established": connections}
    return {
        name: f"{CRIU_PREFIX}{name} asks for it"
        if name in annotations.criu
        else (more or {}).get(name) or reasons.get(name) or image.criu_why.get(name) or "the image asks for it"
        for name in options
    }
