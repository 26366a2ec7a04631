"""The store on disk: an OCI image layout with two things more, which OCI tools ignore.

    ROOT/                 0700
      oci-layout          {"imageLayoutVersion": "1.0.0"}
      index.json          what images there are: manifests by digest, each named by org.opencontainers.image.ref.name
      blobs/sha256/HEX    0444, content-addressed
      ingest/ID/          an image being made: `work` is its maker's, `blobs` holds what was added. Flocked while its maker lives
      lock                flock: held by whoever changes index.json or blobs/

Invariants. index.json only ever refers to whole blobs, which were fsynced before; it is replaced by a rename, so readers take no
lock. A manifest blob is flocked (shared) while somebody uses its image: that is a lease, and it is what `gc` and `remove` ask.
Everything else that is found in blobs/ or ingest/ without an owner is garbage. Copy images in with `smr import`, not with
another tool: such a tool does not hold the lock, and `gc` would take its blobs for garbage.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from smr.images.files import locked, write_atomic, writing
from smr.images.manifest import INDEX_TYPE, MANIFEST_TYPE, Descriptor, parse_descriptor
from smr.images.reference import DEFAULT_TAG
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Json, as_list, as_object

NAME_ANNOTATION = "org.opencontainers.image.ref.name"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of index.json. `descriptor` keeps what other tools wrote there."""

    name: str
    tag: str
    descriptor: Descriptor

    @property
    def digest(self) -> str:
        """The image's digest."""
        return self.descriptor.digest

    @property
    def reference(self) -> str:
        """NAME:TAG, or the digest where there is no name."""
        return f"{self.name}:{self.tag}" if self.name else self.digest


def new_entry(name: str, tag: str, digest: str, size_bytes: int) -> Entry:
    """The entry of an image of ours."""
    annotations = {NAME_ANNOTATION: f"{name}:{tag}"}
    descriptor = Descriptor(media_type=MANIFEST_TYPE, digest=digest, size_bytes=size_bytes, annotations=annotations)
    return Entry(name=name, tag=tag, descriptor=descriptor)


class Layout:
    """The paths of a store, its index and its lock."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.blobs = self.root / "blobs" / "sha256"
        self.ingests = self.root / "ingest"
        self.index = self.root / "index.json"
        self.lock = self.root / "lock"

    def blob(self, digest: str) -> Path:
        """The file of a blob, there or not."""
        return self.blobs / digest.removeprefix("sha256:")

    def create(self) -> None:
        """Make the directories of the store, once."""
        with writing(self.root):
            for directory in (self.root, self.blobs.parent, self.blobs, self.ingests):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            marker = self.root / "oci-layout"
            if not marker.exists():
                with locked(self.lock):
                    write_atomic(marker, b'{"imageLayoutVersion":"1.0.0"}', mode=0o644)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the store's lock: nobody else changes index or blobs."""
        with ExitStack() as stack:
            with writing(self.lock):
                stack.enter_context(locked(self.lock))
            yield

    def entries(self) -> list[Entry]:
        """What index.json says; nothing when there is none. Raises IMAGE_CORRUPT or PERMISSION."""
        try:
            document = as_object(json.loads(self.index.read_bytes()), "index.json")
            found = [parse_descriptor(value, "manifests[]") for value in as_list(document.get("manifests"), "manifests")]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except PermissionError as error:
            raise SmrError(f"cannot read {self.index}", hint="run as root", code=Code.PERMISSION, path=self.index) from error
        except (ValueError, SmrError) as error:
            raise SmrError(f"{self.index} is damaged: {error}", code=Code.IMAGE_CORRUPT, path=self.index) from error
        return [_entry(descriptor) for descriptor in found]

    def save(self, entries: Iterable[Entry]) -> None:
        """Replace index.json. The caller holds the lock."""
        manifests = [entry.descriptor.as_json() for entry in entries]
        document: Json = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": manifests}
        data = json.dumps(document, sort_keys=True, indent=1).encode()
        with writing(self.index, len(data)):
            write_atomic(self.index, data, mode=0o644)

    def blob_files(self) -> list[os.DirEntry[str]]:
        """All that lies among the blobs."""
        try:
            with os.scandir(self.blobs) as found:
                return list(found)
        except FileNotFoundError:
            return []


def _entry(descriptor: Descriptor) -> Entry:
    full = descriptor.annotations.get(NAME_ANNOTATION, "")
    name, _, tag = full.rpartition(":") if ":" in full else (full, "", "")
    return Entry(name=name, tag=tag or (DEFAULT_TAG if name else ""), descriptor=descriptor)
