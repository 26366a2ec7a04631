"""The annotations that name sources of mounts: `smr.mounts`, a list, and `smr.mount.DEST`, one mount each.

    smr.mounts=/data=/srv/data,/models=/mnt/nfs/models        DEST=SOURCE[,DEST=SOURCE...]
    smr.mount./data=/srv/data

Kubernetes takes no path in a key, so there only the list can be written. In the list a backslash takes the meaning from a comma,
an equal sign or a backslash behind it; white space around an entry is dropped. Destinations are paths in the container and come
out without `//`, `.` or a slash at their end; sources are paths of the host and come out as they are. Standard library only.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping

from smr.proto.errors import Code, SmrError

MOUNTS = "smr.mounts"
MOUNT_PREFIX = "smr.mount."

_ENTRY = re.compile(r"(?:\\.|[^\\,])+", re.DOTALL)
_DESTINATION = re.compile(r"((?:\\.|[^\\=])*)=(.*)", re.DOTALL)


def parse_mounts(ours: Mapping[str, str]) -> dict[str, str]:
    """Destination to source, from all keys of both forms. Raises ANNOTATION_INVALID, also for a destination named twice."""
    found: dict[str, str] = {}
    for key, destination, source in _pairs(ours):
        place = _checked(key, destination, source)
        if place in found:
            raise _invalid(key, f"the destination {place} is named twice", "name each mount once")
        found[place] = source
    return found


def _pairs(ours: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for key, value in ours.items():
        if key.startswith(MOUNT_PREFIX):
            yield key, key.removeprefix(MOUNT_PREFIX), value
    for entry in _ENTRY.findall(ours.get(MOUNTS, "")):
        if not entry.strip():
            continue
        split = _DESTINATION.fullmatch(entry.strip())
        if split is None:
            raise _invalid(MOUNTS, f"'{entry.strip()}' is not DEST=SOURCE", f"use {MOUNTS}=/data=/srv/data,/models=/mnt/models")
        yield MOUNTS, _plain(split[1]).strip(), _plain(split[2]).strip()


def _checked(key: str, destination: str, source: str) -> str:
    if not destination.startswith("/") or ".." in destination.split("/") or clean(destination) == "/":
        raise _invalid(key, f"the destination '{destination}' must be an absolute path below /, without '..'", f"use {_EXAMPLE}")
    if not source.startswith("/") or "\0" in source + destination:
        raise _invalid(key, f"the source '{source}' must be an absolute path on the host", f"use {_EXAMPLE}")
    return clean(destination)


_EXAMPLE = f"{MOUNTS}=/data=/srv/data"


def clean(destination: str) -> str:
    """A path in a container as runtimes read it: `//`, `.` and `..` resolved by name, no slash at the end."""
    return posixpath.normpath(f"/{destination.lstrip('/')}")


def _plain(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


def _invalid(key: str, what: str, hint: str) -> SmrError:
    return SmrError(f"annotation {key}: {what}", hint=hint, code=Code.ANNOTATION_INVALID, annotation=key)
