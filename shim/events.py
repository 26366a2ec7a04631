"""What happened on this node: a line in our log for people, and an entry in a journal for the agent's metrics and events.

    RUN/events/journal      a line of JSON that names this journal, then one for each event: time, event, container, image, ...
    RUN/events/journal.1    the journal before it

Whoever checkpoints or restores a container writes, whether an agent runs or not; so the agent counts what happened while it was
down. The journal lies on a tmpfs and is bounded: at MOST_BYTES it takes the place of the one before. Writers exclude each other
by a flock of the journal, and an entry is one write, taken back when it was not whole. smr.shim.agent.reader reads. This is in a
restore's path: standard library only, and little of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from smr.proto.errors import SmrError
from smr.proto.pod import pod_of
from smr.shim.config import Config
from smr.shim.log import canonical_line

MOST_BYTES = 1 << 20
_REASON_CHARACTERS = 1024
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
