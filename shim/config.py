"""Settings of a node: `/etc/smr/smr.toml`, then `SMR_*` environment variables, then flags. An unknown key is an error.

[smr]
store = "/var/lib/smr"        # checkpoint images
criu = "/opt/smr/criu/sbin/criu"
runtime = "runc"              # the real OCI runtime: a name on PATH or a path
log = "/var/log/smr/smr.log"

The state directory (`run`, default /run/smr, must not survive a boot) is set by SMR_RUN alone: the sh part of smr-runtime
looks there before anything reads TOML.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path

from smr.proto.errors import Code, SmrError

DEFAULT_PATH = Path("/etc/smr/smr.toml")
_PATHS = frozenset({"store", "run", "log"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings; every field has a default that works on a node where nothing was configured."""

    store: Path = Path("/var/lib/smr")
    run: Path = Path("/run/smr")
    criu: str = "criu"
    runtime: str = ""
    log: Path = Path("/var/log/smr/smr.log")


def load(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """Settings of this node. A missing file gives the defaults; a bad one raises CONFIG_INVALID."""
    env = os.environ if environ is None else environ
    file = path or Path(env.get("SMR_CONFIG", str(DEFAULT_PATH)))
    values = _from_file(file)
    for name in (f.name for f in fields(Config)):
        if value := env.get(f"SMR_{name.upper()}"):
            values[name] = value
    typed = {name: Path(value).absolute() if name in _PATHS else value for name, value in values.items()}
    return replace(Config(), **typed)  # type: ignore[arg-type]  # names and values are checked


def defaults(environ: Mapping[str, str] | None = None) -> Config:
    """Settings without the file, for who must go on where the file is bad."""
    return load(Path(os.devnull), environ)


def _from_file(file: Path) -> dict[str, str]:
    import tomllib

    try:
        document = tomllib.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SmrError(f"cannot read {file}: {error}", hint=f"correct or remove {file}", code=Code.CONFIG_INVALID) from error
    table = document.pop("smr", {})
    known = [f.name for f in fields(Config) if f.name != "run"]
    for key in document:
        hint = f"put it under [smr]: {key}" if key in known else _suggestion(key, ["smr"])
        raise SmrError(f"{file}: unknown key '{key}' outside [smr]", hint=hint, code=Code.CONFIG_INVALID)
    if not isinstance(table, dict):
        raise SmrError(f"{file}: smr is no table", hint="begin it with a line [smr]", code=Code.CONFIG_INVALID)
    for key, value in table.items():
        if key not in known:
            raise SmrError(f"{file}: unknown key '{key}'", hint=_suggestion(key, known), code=Code.CONFIG_INVALID)
        if not isinstance(value, str) or (key in _PATHS and not value.startswith("/")):
            needed = "an absolute path" if key in _PATHS else "a string"
            raise SmrError(f"{file}: {key} = {value!r}: needed {needed}", hint=f"correct {file}", code=Code.CONFIG_INVALID)
    return table


def _suggestion(key: str, known: Sequence[str]) -> str:
    close = get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else "known: " + ", ".join(known)
