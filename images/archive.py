"""Checkpoints in and out of the store as one file: `import_archive` and `export_archive`.

In come archives of podman, CRI-O and containerd and OCI archives, with whatever compression; out go podman's shape, which
`podman container restore --import` takes, and an OCI archive of the image as it is. An archive is not trusted: it is unpacked by
`smr.images.archive_stage` into the ingest's own directory, which goes away with everything in it when anything is wrong.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from smr.images.archive_oci import add_oci, is_oci_layout
from smr.images.archive_podman import add_podman, is_podman_shape
from smr.images.archive_stage import stage
from smr.images.image import Image
from smr.images.reference import parse_name
from smr.images.store import Store
from smr.proto.errors import Code, SmrError


class Format(StrEnum):
    """What an export looks like."""

    PODMAN = "podman"
    OCI = "oci"


def import_archive(path: Path, store: Store, name: str, *, replace: bool = True) -> Image:
    """Make the image NAME[:TAG] of the checkpoint archive `path`.

    Raises ANNOTATION_INVALID (the name), USAGE (no such file), ARCHIVE_UNSAFE, ARCHIVE_INVALID, UNSUPPORTED (no checkpoint,
    incremental, zstd without a reader), DISK_FULL, IMAGE_EXISTS. After any of them the store is as it was.
    """
    parse_name(name)  # a wrong name is said before gigabytes are read
    _check_file(path)
    with store.ingest() as ingest:
        staged = ingest.path / "archive"
        staged.mkdir()
        stage(path, staged)
        if is_oci_layout(staged):
            config = add_oci(staged, ingest)
        elif is_podman_shape(staged):
            config = add_podman(staged, ingest)
        else:
            raise SmrError(
                f"{path} is no checkpoint archive: found neither config.dump nor an OCI layout in it",
                hint="make one with 'podman container checkpoint --export', 'smr export', "
                "or 'ctr images export --skip-manifest-json' of a checkpoint image",
                code=Code.UNSUPPORTED,
                path=path,
            )
        return ingest.commit(name, config, replace=replace)


def export_archive(image: Image, out: Path, *, format: Format | str = Format.PODMAN) -> tuple[str, ...]:
    """Write `image` to the new or replaced file `out`, whole or not at all; returns what the format could not carry.

    The name of `out` decides the compression of podman's shape: .tar is plain, .tar.zst zstd, anything else gzip. Lease the
    image. Raises USAGE (no place to write), IMAGE_CORRUPT, DISK_FULL, UNSUPPORTED.
    """
    from smr.images.archive_export import write_oci, write_podman

    if out.is_dir() or not out.parent.is_dir():
        raise SmrError(f"cannot write {out}: needed a file name in a directory that exists", code=Code.USAGE, path=out)
    image.check()
    return write_oci(image, out) if Format(format) is Format.OCI else write_podman(image, out)


def _check_file(path: Path) -> None:
    if not path.is_file():
        what = "a directory" if path.is_dir() else "nothing"
        raise SmrError(f"cannot import {path}: found {what} there, needed an archive", code=Code.USAGE, path=path)
