"""What an agent has counted, and up to where: kept so that the next agent goes on with it. Bounded by what there is to name.

    RUN/agent/totals.json     {"version": 1, "position": .., "counters": [[name, labels, value], ..], "histograms": [..]}

The place in the journal is saved with the counts, in one file: no event counts twice, and none is left out.
"""

from __future__ import annotations

import contextlib
import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from smr.shim.agent.reader import Position
from smr.shim.files import write_atomic

VERSION = 1
# Seconds. A restore takes 0.1 s and more, a stage from 1 ms, a cold checkpoint of a large container minutes.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

Labels = tuple[str, ...]
Key = tuple[str, Labels]


@dataclass(slots=True)
class Histogram:
    """Values seen: how many fell into each bucket of BUCKETS and beyond the last, and their sum."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    sum: float = 0.0

    def add(self, value: float) -> None:
        """One more."""
        self.counts[bisect_left(BUCKETS, value)] += 1
        self.sum += value


@dataclass(slots=True)
class Totals:
    """Counters and histograms by name and label values."""

    position: Position = field(default_factory=Position)
    counters: dict[Key, float] = field(default_factory=dict)
    histograms: dict[Key, Histogram] = field(default_factory=dict)

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        """Add to a counter."""
        key = (name, labels)
        self.counters[key] = self.counters.get(key, 0) + by

    def observe(self, name: str, *labels: str, value: float) -> None:
        """Add a value to a histogram."""
        self.histograms.setdefault((name, labels), Histogram()).add(value)

    def add(self, event: Mapping[str, object]) -> None:
        """Count one event of the journal. An event that is not known, or has no number where there should be one, is let go."""
        kind, code = event.get("event"), str(event.get("code") or "")
        if kind in _RESULTS:
            self.count("restores", _RESULTS[kind], code)
        if kind == "restored":
            self._restored(event)
        if kind in {"checkpointed", "checkpoint_failed"}:
            self.count("checkpoints", "ok" if kind == "checkpointed" else "failed", code)
        if kind == "checkpointed":
            self._times("checkpoint_pause", event.get("pause_s"))
            self._stages("checkpoint_stage", event)

    def _restored(self, event: Mapping[str, object]) -> None:
        self._times("restore", event.get("busy_s"))
        self._stages("restore_stage", event)
        pages = event.get("pages")
        if not isinstance(pages, dict):
            return
        memory, read = _number(pages.get("memory_bytes")), _number(pages.get("read_bytes"))
        if pages.get("strategy") == "lazy":
            self.count("restore_bytes", "lazy", by=memory)
        elif memory:
            self.count("restore_bytes", "disk", by=read)
            self.count("restore_bytes", "cache", by=max(0.0, memory - read))

    def _times(self, name: str, value: object, *labels: str) -> None:
        if isinstance(value, int | float):
            self.observe(name, *labels, value=float(value))

    def _stages(self, name: str, event: Mapping[str, object]) -> None:
        stages = event.get("stages_s")
        for stage, seconds in stages.items() if isinstance(stages, dict) else ():
            self._times(name, seconds, str(stage))

    def save(self, path: Path) -> None:
        """Write the file. Not synced: it lives beside the journal, on a tmpfs."""
        document = {
            "version": VERSION,
            "position": {"journal": self.position.journal, "offset": self.position.offset},
            "counters": [[name, labels, value] for (name, labels), value in self.counters.items()],
            "histograms": [[name, labels, one.counts, one.sum] for (name, labels), one in self.histograms.items()],
        }
        write_atomic(path, json.dumps(document).encode(), durable=False)


_RESULTS = {
    "restored": "restored",
    "started_cold": "cold",
    "runtime_bypassed": "bypassed",
    "restore_failed": "failed",
    "restore_killed": "killed",
}


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def load(path: Path) -> Totals:
    """What was saved; nothing, so that all is counted again from the journal, where there is no file that can be read."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        document = json.loads(path.read_bytes())
        if document["version"] == VERSION:
            return _parse(document)
    return Totals()


def _parse(document: Mapping[str, object]) -> Totals:
    position, counters, histograms = document["position"], document["counters"], document["histograms"]
    if not (isinstance(position, dict) and isinstance(counters, list) and isinstance(histograms, list)):
        raise TypeError("not a file of ours")
    found = Totals(position=Position(journal=str(position["journal"]), offset=int(position["offset"])))
    for name, labels, value in counters:
        found.counters[str(name), tuple(map(str, labels))] = float(value)
    for name, labels, counts, total in histograms:
        if len(counts) == len(BUCKETS) + 1:
            found.histograms[str(name), tuple(map(str, labels))] = Histogram([int(count) for count in counts], float(total))
    return found
