"""The report as people read it and as it is sent: a text, or a tar.gz of a folder with a file for each section."""

from __future__ import annotations

import io
import platform
import tarfile
import time
from datetime import UTC, datetime
from pathlib import Path

from smr.proto.errors import Code, SmrError
from smr.shim.doctor.collect import Report
from smr.shim.files import write_atomic

SUFFIXES = (".tar.gz", ".tgz")


def to_text(report: Report) -> str:
    """All sections under their names."""
    return "\n".join(f"== {name}\n{part.text().rstrip()}\n" for name, part in report.items())


def to_json(report: Report) -> dict[str, object]:
    """A member for each section: what it found, or {"error": ..}."""
    return {name: {"error": part.error} if part.error else part.content for name, part in report.items()}


def check_target(path: Path) -> None:
    """Raise USAGE for a name that is none of an archive, or a folder that is not there, before anything is collected."""
    if not path.name.endswith(SUFFIXES):
        raise SmrError(f"{path}: needed a name that ends in {' or '.join(SUFFIXES)}", code=Code.USAGE)
    if not path.absolute().parent.is_dir():
        raise SmrError(f"{path}: there is no folder {path.absolute().parent}", code=Code.USAGE)


def write(report: Report, path: Path) -> None:
    """Write the archive, whole or not at all, for its owner alone."""
    now = datetime.now(UTC)
    folder = f"smr-doctor-{platform.node() or 'node'}-{now.strftime('%Y%m%d-%H%M%S')}"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, part in report.items():
            plain = bool(part.error) or isinstance(part.content, str)
            data = f"{part.text().rstrip()}\n".encode(errors="replace")
            entry = tarfile.TarInfo(f"{folder}/{name}.{'txt' if plain else 'json'}")
            entry.size, entry.mode, entry.mtime = len(data), 0o600, int(time.time())
            tar.addfile(entry, io.BytesIO(data))
    try:
        write_atomic(path.absolute(), buffer.getvalue())
    except OSError as error:
        raise SmrError(f"cannot write {path}: {error.strerror}", hint="-o names another file", code=Code.PERMISSION) from error
