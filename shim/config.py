"""Settings of a node: `/etc/smr/smr.toml`, then `SMR_*` environment variables, then flags. An unknown key is an error.

[smr]
store = "/var/lib/smr"        # checkpoint images
criu = "/opt/smr/criu/sbin/criu"
runtime = "runc"              # the real OCI runtime: a name on PATH or a path
log = "/var/log/smr/smr.log"
cache_share = 0.5             # of the memory that is available, what prefetch and each pin may take
fills = 2                     # restores that fill memory at a time; the others wait for their turn
fill_wait_s = 60.0            # how long a restore waits for its turn, and for memory
restore_attempts = 3          # how often a container of a pod is restored anew after it ended early; then it starts cold
restore_settled_s = 600.0     # what early means: within so many seconds of its restore
pod_names_wait_s = 60.0       # how long a pod may take to show the containers that its keys name, before that is told
capture_free_share = 0.15     # of the store's disk, what a capture leaves free; 0: that is not looked at
image_namespaces = "own"      # own: an image made of a pod is for pods of its Kubernetes namespace; any: for all
gpu_timeout_s = 0.0           # for each call of the NVIDIA driver; 0: 30 for locks, else 60 and more by the memory in use
agent_socket = ""             # where `smr agent` is called; empty: agent.sock in the state directory
agent_listen = "127.0.0.1:9464"  # its metrics and health: HOST:PORT or unix:PATH; empty: none
agent_events = "auto"         # events of pods, where its token allows it; or "off"

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
class _Number:
    """What a setting that is a number may be."""

    least: float
    most: float
    whole: bool = False

    def __str__(self) -> str:
        return f"a {'whole ' if self.whole else ''}number from {self.least:g} to {self.most:g}"

    def parse(self, value: object) -> float:
        """From TOML or, as text, from the environment. Raises ValueError."""
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise ValueError(value)
        number = int(value) if self.whole and not isinstance(value, float) else float(value)
        if not self.least <= number <= self.most or (self.whole and isinstance(number, float)):
            raise ValueError(value)
        return number


_NUMBERS = {
    "cache_share": _Number(least=0, most=1),
    "fills": _Number(least=1, most=1000, whole=True),
    "fill_wait_s": _Number(least=0, most=86400),
    "restore_attempts": _Number(least=1, most=1000000, whole=True),
    "restore_settled_s": _Number(least=0, most=86400),
    "capture_free_share": _Number(least=0, most=1),
    "pod_names_wait_s": _Number(least=0, most=86400),
    "gpu_timeout_s": _Number(least=0, most=86400),
}
_CHOICES = {"image_namespaces": ("own", "any")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings; every field has a default that works on a node where nothing was configured."""

    store: Path = Path("/var/lib/smr")
    run: Path = Path("/run/smr")
    criu: str = "criu"
    runtime: str = ""
    log: Path = Path("/var/log/smr/smr.log")
    cache_share: float = 0.5
    fills: int = 2
    fill_wait_s: float = 60.0
    restore_attempts: int = 3
    restore_settled_s: float = 600.0
    pod_names_wait_s: float = 60.0
    capture_free_share: float = 0.15
    image_namespaces: str = "own"
    gpu_timeout_s: float = 0.0
    agent_socket: str = ""
    agent_listen: str = "127.0.0.1:9464"
    agent_events: str = "auto"


def load(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """Settings of this node. A missing file gives the defaults; a bad one raises CONFIG_INVALID."""
    env = os.environ if environ is None else environ
    file = path or Path(env.get("SMR_CONFIG", str(DEFAULT_PATH)))
    values = _from_file(file)
    for name in (f.name for f in fields(Config)):
        if value := env.get(f"SMR_{name.upper()}"):
            values[name] = value
    typed = {name: _typed(name, value, file) for name, value in values.items()}
    return replace(Config(), **typed)  # type: ignore[arg-type]  # names and values are checked


def defaults(environ: Mapping[str, str] | None = None) -> Config:
    """Settings without the file, for who must go on where the file is bad."""
    return load(Path(os.devnull), environ)


def parse_settings(words: Sequence[str]) -> dict[str, str | float]:
    """Settings of smr.toml as NAME=VALUE; numbers where numbers are needed. Raises CONFIG_INVALID."""
    values: dict[str, str | float] = {}
    for word in words:
        name, _, value = word.partition("=")
        _check({name: value}, Path("--setting"))
        typed = _typed(name, value, Path("--setting"))
        values[name] = typed if isinstance(typed, int | float) else value
    return values


def _typed(name: str, value: object, file: Path) -> object:
    if name in _PATHS:
        return Path(str(value)).absolute()
    try:
        if name in _CHOICES:
            return _CHOICES[name][_CHOICES[name].index(str(value))]
        return _NUMBERS[name].parse(value) if name in _NUMBERS else value
    except ValueError:
        where = f"SMR_{name.upper()}" if isinstance(value, str) else f"{file}: {name}"
        needed = _NUMBERS.get(name) or " or ".join(_CHOICES[name])
        message = f"{where} = {value!r}: needed {needed}"
        raise SmrError(message, hint="correct it, or leave it out", code=Code.CONFIG_INVALID) from None


def _from_file(file: Path) -> dict[str, object]:
    import tomllib

    try:
        document = tomllib.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SmrError(f"cannot read {file}: {error}", hint=f"correct or remove {file}", code=Code.CONFIG_INVALID) from error
    table = document.pop("smr", {})
    known = _known()
    for key in document:
        hint = f"put it under [smr]: {key}" if key in known else _suggestion(key, ["smr"])
        raise SmrError(f"{file}: unknown key '{key}' outside [smr]", hint=hint, code=Code.CONFIG_INVALID)
    if not isinstance(table, dict):
        raise SmrError(f"{file}: smr is no table", hint="begin it with a line [smr]", code=Code.CONFIG_INVALID)
    for key, value in table.items():
        if key in _NUMBERS and isinstance(value, str):
            raise _wrong(key, value, file)
    _check(table, file)
    return table


def _check(table: Mapping[str, object], file: Path) -> None:
    """Raise unless all names are known and all values of their kinds; a number may be text here."""
    known = _known()
    for key, value in table.items():
        if key not in known:
            raise SmrError(f"{file}: unknown key '{key}'", hint=_suggestion(key, known), code=Code.CONFIG_INVALID)
        if key not in _NUMBERS and (not isinstance(value, str) or (key in _PATHS and not value.startswith("/"))):
            raise _wrong(key, value, file)


def _wrong(key: str, value: object, file: Path) -> SmrError:
    needed = _NUMBERS.get(key) or ("an absolute path" if key in _PATHS else "a string")
    return SmrError(f"{file}: {key} = {value!r}: needed {needed}", hint=f"correct {file}", code=Code.CONFIG_INVALID)


def _known() -> list[str]:
    return [f.name for f in fields(Config) if f.name != "run"]


def _suggestion(key: str, known: Sequence[str]) -> str:
    close = get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else "known: " + ", ".join(known)
