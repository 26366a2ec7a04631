"""The command line of an OCI runtime, as runc and crun define it, taken apart far enough to act on it.

Nothing is rejected here: an option that is not known is kept in its place and left to the real runtime. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_GLOBAL_VALUES = frozenset({"root", "log", "log-format", "log-level", "criu", "rootless", "cgroup-manager"})
_VERB_VALUES = frozenset(
    {
        "bundle", "b", "pid-file", "console-socket", "pidfd-socket", "preserve-fds", "config", "image-path", "work-path",
        "parent-path", "page-server", "status-fd", "manage-cgroups-mode", "empty-ns", "lsm-profile", "lsm-mount-context",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeCall:
    """One call of the runtime. `global_args` are the words before the verb, `options` the verb's, `id` the container's."""

    argv: tuple[str, ...]
    global_args: tuple[str, ...]
    root: str
    log: Path | None
    log_format: str
    verb: str
    options: tuple[tuple[str, str | None], ...]
    id: str
    rest: tuple[str, ...]

    def option(self, *names: str) -> str | None:
        """The last value given for an option by any of its names, without dashes; "" for a flag; None when absent."""
        values = [value or "" for name, value in self.options if name in names]
        return values[-1] if values else None

    @property
    def bundle(self) -> Path:
        """The bundle, absolute; the current directory when none is named."""
        return Path(self.option("bundle", "b") or ".").absolute()


def parse_call(argv: Sequence[str]) -> RuntimeCall:
    """Take the words after the program's name apart."""
    globals_, verb_at = _options(argv, 0, _GLOBAL_VALUES)
    verb = argv[verb_at] if verb_at < len(argv) else ""
    # crun's -f names a file for create and run, and is a flag of delete.
    options, id_at = _options(argv, verb_at + 1, _VERB_VALUES | ({"f"} if verb in {"create", "run"} else set()))
    values = {name: value for name, value in globals_ if value is not None}
    return RuntimeCall(
        argv=tuple(argv),
        global_args=tuple(argv[:verb_at]),
        root=values.get("root", ""),
        log=Path(values["log"]) if values.get("log") else None,
        log_format=values.get("log-format", "text"),
        verb=verb,
        options=tuple(options),
        id=argv[id_at] if id_at < len(argv) else "",
        rest=tuple(argv[id_at + 1 :]),
    )


def _options(argv: Sequence[str], at: int, with_value: frozenset[str]) -> tuple[list[tuple[str, str | None]], int]:
    """Options from `at` on, and the index of the first word that is none."""
    found: list[tuple[str, str | None]] = []
    while at < len(argv) and argv[at].startswith("-") and argv[at] != "-":
        if argv[at] == "--":
            return found, at + 1
        name, equals, value = argv[at].lstrip("-").partition("=")
        if equals:
            found.append((name, value))
        elif name in with_value and at + 1 < len(argv):
            at += 1
            found.append((name, argv[at]))
        else:
            found.append((name, None))
        at += 1
    return found, at
