"""What happened on this node: a line in our log for people, and an entry in a journal for the agent's metrics and events.

    RUN/events/journal      a line of JSON that names this journal, then one for each event: time, event, container, image, ...
    RUN/events/journal.1    the journal before it

Whoever checkpoints or restores a container writes, whether an agent runs or not; so the agent counts what happened while it was
down. The journal lies on a tmpfs and is bounded: at MOST_BYTES it takes the place of the one before. Writers exclude each other
by a flock of the journal, and an entry is one write, taken back when it was not whole. A reader takes no lock: it remembers which
journal it has read and how far, so that nothing is missed unless the journal turns twice meanwhile. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from smr.proto.errors import SmrError
from smr.proto.pod import pod_of
from smr.shim.config import Config
from smr.shim.log import canonical_line

MOST_BYTES = 1 << 20
_REASON_CHARACTERS = 1024
_FIRST_LINE_BYTES = 256
_ENTRY_CHARACTERS = 32 << 10
# What is kept of an entry that is longer.
_LEAST = frozenset({"time", "event", "container", "image", "digest", "code", "reason", "pod", "busy_s", "pause_s"})
_OPEN = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC


def emit(config: Config, event: str, facts: Mapping[str, object], annotations: Mapping[str, str] | None = None) -> None:
    """Tell of an event in log and journal; `annotations` are the container's, of which its pod is told. Never raises OSError."""
    pod = pod_facts(annotations or {})
    told = {**facts, "pod": pod} if pod else facts
    note(config, event, told)
    canonical_line(config.log, event, **told)


def emit_failure(
    config: Config, event: str, container: str, annotations: Mapping[str, str], error: SmrError, image: str = ""
) -> None:
    """Tell that `container` was not restored from `image`, and why."""
    emit(config, event, {"container": container, "image": image, "code": error.code.value, "reason": str(error)}, annotations)


def pod_facts(annotations: Mapping[str, str]) -> dict[str, str]:
    """The pod of a container: namespace, name, uid, container, as far as its engine tells; empty when it has none."""
    pod = pod_of(annotations)
    if pod is None or not (pod.namespace and pod.name):
        return {}
    facts = {"namespace": pod.namespace, "name": pod.name, "uid": pod.uid, "container": pod.container}
    return {what: value for what, value in facts.items() if value}


def journal_dir(run: Path) -> Path:
    """Where the journal lies; the agent watches it."""
    return run / "events"


def note(config: Config, event: str, facts: Mapping[str, object]) -> None:
    """Append to the journal alone. What cannot be written is not counted, and fails nobody."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    entry: dict[str, object] = {"time": now, "event": event, **facts}
    if isinstance(reason := entry.get("reason"), str):
        entry["reason"] = reason[:_REASON_CHARACTERS]
    line = json.dumps(entry, default=str)
    if len(line) > _ENTRY_CHARACTERS:
        line = json.dumps({key: value for key, value in entry.items() if key in _LEAST}, default=str)
    with contextlib.suppress(OSError):
        _append(journal_dir(config.run), line.encode() + b"\n")


def _append(folder: Path, line: bytes) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "journal"
    while True:
        fd = os.open(path, _OPEN | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if not _is(path, fd):
                continue  # another has turned it
            size_bytes = os.fstat(fd).st_size
            if size_bytes + len(line) > MOST_BYTES and size_bytes:
                path.rename(path.with_suffix(".1"))
                continue
            if not size_bytes:
                line = json.dumps({"journal": f"{time.time_ns():x}.{os.getpid()}"}).encode() + b"\n" + line
            if os.write(fd, line) != len(line):
                os.ftruncate(fd, size_bytes)  # a full disk
            return
        finally:
            os.close(fd)


def _is(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


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
