"""Runs the sections: each in a thread of its own, so that one that fails, or never ends, costs the report that section alone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from smr.proto.errors import Code, SmrError
from smr.shim import config as settings
from smr.shim.config import Config
from smr.shim.doctor.redact import GONE, Redactor, known_values
from smr.shim.doctor.sections import SECTIONS

MOST_CHARACTERS = 256 << 10
_PATIENCE_S = 90.0

Section = Callable[[Config], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one section found: JSON-like data or text; `error` when it could not, or not in time."""

    content: object = None
    error: str = ""

    def text(self) -> str:
        """For people."""
        if self.error:
            return f"could not be collected: {self.error}"
        return self.content if isinstance(self.content, str) else json.dumps(self.content, indent=2, default=str)


Report = Mapping[str, Part]


def collect(sections: Mapping[str, Section] = SECTIONS, patience_s: float = _PATIENCE_S) -> Report:
    """The report of this node, redacted and bounded. Bad settings are told in it; then the defaults hold."""
    config, problem = _settings()
    found = _run(sections, config, patience_s)
    try:
        redact = Redactor(known_values(config))
    except Exception as error:  # noqa: BLE001  # records of any kind may lie there
        redact, problem = Redactor(), f"{problem}; environments could not be read: {error!r}"
    parts = {name: _cleaned(part, redact) for name, part in found.items()}
    return {"settings_problem": Part(content=redact(problem)), **parts} if problem else parts


def _settings() -> tuple[Config, str]:
    try:
        return settings.load(), ""
    except SmrError as error:
        try:
            return settings.defaults(), str(error)
        except SmrError:  # the environment is bad, too
            return Config(), str(error)


def _run(sections: Mapping[str, Section], config: Config, patience_s: float) -> dict[str, Part]:
    found: dict[str, Part] = {}

    def one(name: str, section: Section) -> None:
        try:
            found[name] = Part(content=section(config))
        except Exception as error:  # noqa: BLE001  # the node is broken: that is why somebody asks
            found[name] = Part(error=str(error) if isinstance(error, SmrError) else repr(error))

    # Daemons: nobody waits at the end for one that waits for a dead disk.
    threads = {name: threading.Thread(target=one, args=(name, section), daemon=True) for name, section in sections.items()}
    for thread in threads.values():
        thread.start()
    deadline = time.monotonic() + patience_s
    for thread in threads.values():
        thread.join(max(0.0, deadline - time.monotonic()))
    late = Part(error=f"it did not end within {patience_s:g} s ({Code.TIMEOUT})")
    return {name: found.get(name, late) for name in sections}


def _cleaned(part: Part, redact: Redactor) -> Part:
    """What cannot be looked through is not sent."""
    try:
        return _clean(part, redact)
    except Exception as error:  # noqa: BLE001  # one section of many
        return Part(error=f"it could not be looked through for secrets: {type(error).__name__}")


def _clean(part: Part, redact: Redactor) -> Part:
    content = _redacted(part.content, redact)
    if len(text := Part(content=content).text()) > MOST_CHARACTERS:
        content = f"[the first {len(text) - MOST_CHARACTERS} characters are left out]\n{text[-MOST_CHARACTERS:]}"
    return Part(content=content, error=redact(part.error))


def _redacted(value: object, redact: Redactor) -> object:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {str(key): _member(str(key), item, redact) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_item(str(before), item, redact) for before, item in zip(("", *value), value, strict=False)]
    return value


def _item(flag: str, value: object, redact: Redactor) -> object:
    """A flag and its value are two items."""
    if isinstance(value, str) and flag.startswith("-") and redact(f"{flag} {value}") != f"{flag} {redact(value)}":
        return GONE
    return _redacted(value, redact)


def _member(key: str, value: object, redact: Redactor) -> object:
    """The name of a member is a reason to leave its value out."""
    if isinstance(value, str) and redact(f"{key}={value}") != f"{key}={redact(value)}":
        return redact(f"{key}={value}").removeprefix(f"{key}=")
    return _redacted(value, redact)
