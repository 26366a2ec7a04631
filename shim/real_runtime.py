"""The real OCI runtime, runc or crun: which one SMR stands in front of. Standard library only.

SMR_RUNTIME names it, else /etc/smr/smr.toml, else /etc/smr/runtime, else it is what PATH has. The folder that the containerd
shim puts on PATH is passed over, as shim/bin/smr-runtime does: there `runc` is SMR itself.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from smr.proto.errors import Code, SmrError
from smr.shim.config import Config

FOLDER = "smr-path"
NAMES = ("runc", "crun")
_NAMED_IN = Path("/etc/smr/runtime")


def real_runtime(config: Config, *, asked: str = "") -> str:
    """Path of the real runtime; `asked`, a name, comes before what is configured. Raises RUNTIME_MISSING."""
    named = asked or os.environ.get("SMR_RUNTIME") or config.runtime or _first_line(_NAMED_IN)
    names = (named,) if named else NAMES
    found = next((path for name in names if (path := _which(name))), None)
    if found is None:
        raise SmrError(
            f"no OCI runtime found: {' or '.join(names)} is not there, cannot be executed, or is SMR itself",
            hint="install runc, or name one in /etc/smr/runtime",
            code=Code.RUNTIME_MISSING,
        )
    return found


def _which(name: str) -> str | None:
    path = os.pathsep.join(part for part in os.get_exec_path() if Path(part).name != FOLDER)
    found = shutil.which(name, path=path)
    return found if found and Path(found).resolve().name != "smr-runtime" else None


def _first_line(file: Path) -> str:
    try:
        return next(iter(file.read_text().splitlines()), "")
    except OSError:
        return ""
