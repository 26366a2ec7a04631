"""Reads the journal of events (smr.shim.events): each event once, by a reader that says how far it is.

It takes no lock. It names the journal that it has read last and how far, so that nothing is missed unless the journal turns twice
meanwhile; that is told.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from smr.shim.events import journal_dir

_FIRST_LINE_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """How far a reader is: `offset` bytes into the journal of that name; no name: at the beginning of what there is."""

    journal: str = ""
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """Events since a position, oldest first, and where the next are; `lost` when the journal turned twice in between."""

    events: tuple[Mapping[str, object], ...]
    position: Position
    lost: bool = False


def read(run: Path, since: Position) -> News:
    """What the journal has after `since`."""
    folder = journal_dir(run)
    while True:
        new = _part(folder / "journal", since)
        if new is not None and new.name == since.journal:
            parts = [new]
            break
        old = _part(folder / "journal.1", since)
        parts = [part for part in (old, new) if part is not None]
        if len({part.name for part in parts}) == len(parts):
            break  # else it turned between the two reads
    if old_at := [number for number, part in enumerate(parts) if part.name == since.journal]:
        parts = parts[old_at[0] :]
    lost = bool(parts and since.journal) and parts[0].name != since.journal
    events = tuple(entry for part in parts for entry in _events(part.content))
    position = Position(journal=parts[-1].name, offset=parts[-1].end) if parts else since
    return News(events=events, position=position, lost=lost)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What a journal has beyond a position, or after its first line when the position is in another; whole lines, up to `end`."""

    name: str
    content: bytes
    end: int


def _part(path: Path, since: Position) -> _Part | None:
    """None when there is no journal, or when its first line is not written yet."""
    try:
        with path.open("rb") as file:
            first = file.readline(_FIRST_LINE_BYTES)
            name = _name(first)
            if not name:
                return None
            begin = since.offset if name == since.journal else len(first)
            file.seek(begin)
            content = file.read()
    except OSError:
        return None
    whole = content[: content.rfind(b"\n") + 1]
    return _Part(name=name, content=whole, end=begin + len(whole))


def _name(first: bytes) -> str:
    with contextlib.suppress(ValueError):
        if first.endswith(b"\n") and isinstance(document := json.loads(first), dict):
            return str(document.get("journal", ""))
    return ""


def _events(content: bytes) -> Iterator[Mapping[str, object]]:
    for line in content.splitlines():
        with contextlib.suppress(ValueError):
            if isinstance(entry := json.loads(line), dict):
                yield entry
