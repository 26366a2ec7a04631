"""Secrets taken out of text: what this node's containers have in their environment, by value; others, by their look.

By their look: what follows a word such as password, token or api-key; user and password of a URL; Authorization headers; private
keys, JSON Web Tokens and keys of known services. It is a second line: sections do not collect what has secrets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from smr.proto.annotations import QUIESCE, RESUME
from smr.proto.errors import SmrError
from smr.proto.oci import load_spec
from smr.shim.config import Config
from smr.shim.restored import environment_of
from smr.shim.state import all_states

GONE = "[left out]"
_WORD = (
    "(?:password|passwd|passphrase|secret|token|authorization|credentials?|cookie|api[-_]?key|access[-_]?key|private[-_]?key"
    "|session[-_]?key)"
)
# Each keeps its first group and drops the rest.
_LOOKS = tuple(
    re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for pattern in (
        r"(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
        r"(\b(?:bearer|basic)\s+)[\w.~+/=-]+",
        r"(\b[a-z][a-z0-9+.-]*://)[^/@\s\"']+(?=@)",
        # --api-key VALUE, also as two strings of a JSON list, plain or quoted once more.
        rf"(--?[\w-]*{_WORD}[\w-]*(?:\\*[\"'])?,?[\s=]+(?:\\*[\"'])?)[^\s\"'\\]+",
        rf"(\b[\w.-]*{_WORD}[\w.-]*\\*[\"']?\s*[=:]\s*\\*[\"']?)(?!\[left out\])[^\s\"'\\,;&}}\]]+",
        r"()\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*",
        r"()\b(?:hf_|sk-|ghp_|gho_|ghs_|github_pat_|glpat-|xox[abp]-|AKIA|AIza|nvapi-)[\w-]{8,}",
    )
)
# Names whose values say nothing of anybody, and would be taken out of every path.
_ORDINARY = frozenset({"PATH", "HOME", "HOSTNAME", "TERM", "LANG", "PWD", "SHELL", "USER", "TZ", "LD_LIBRARY_PATH", "container"})
_LEAST_CHARACTERS = 6
HOOKS = (QUIESCE, RESUME)


def head(hook: str) -> str:
    """What a hook calls, without what it is called with."""
    return re.split(r"[\s?]", hook, maxsplit=1)[0]


class Redactor:
    """Takes `values`, and what looks like a secret, out of texts."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        known = {value for value in values if len(value) >= _LEAST_CHARACTERS}
        known |= {json.dumps(value)[1:-1] for value in known}  # as a log has them
        # Longer ones first: one may be the beginning of another.
        self._values = sorted(known, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """The text without them."""
        for value in self._values:
            text = text.replace(value, GONE)
        for look in _LOOKS:
            text = look.sub(rf"\g<1>{GONE}", text)
        return text


def known_values(config: Config) -> Iterator[str]:
    """Of every container that SMR knows: what its hooks are called with, word by word; and the values of its environment as its
    spec has them, whole and line by line.
    """
    for state in all_states(config.run):
        for hook in (state.record.resume, *(state.record.annotations.get(key, "") for key in HOOKS)):
            yield from hook.removeprefix(head(hook)).split()
        try:
            document = load_spec(Path(state.record.bundle)).document
        except (SmrError, OSError):
            continue
        for name, value in environment_of(document).items():
            if name not in _ORDINARY and not name.startswith("LC_"):
                yield value
                yield from value.splitlines()
