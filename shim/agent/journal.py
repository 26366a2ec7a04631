"""What the journal of events says, told once to each: the totals, whoever watches, and Kubernetes.

The totals and the place in the journal are saved after each look, before anybody else is told. A watcher that does not keep up
is let go; it never makes the agent wait, or grow.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from smr.shim.agent import totals
from smr.shim.agent.reader import Position, read
from smr.shim.agent.watch import Watch
from smr.shim.events import journal_dir

Event = Mapping[str, object]
_WAITING_MOST = 1000


class Follower:
    """Reads the journal of `run` as it grows, from where `totals_file` says that the agent before has stopped.

    The first `look` is the owner's, when `tell` can be told what happened before.
    """

    def __init__(self, run: Path, totals_file: Path, tell: Callable[[Event], object]) -> None:
        self._run, self._file, self._tell = run, totals_file, tell
        self.totals = totals.load(totals_file)
        self._queues: set[asyncio.Queue[Event | None]] = set()
        self._watch = Watch(journal_dir(run), self.look)

    def close(self) -> None:
        """End: watchers get None."""
        self._watch.close()
        for queue in self._queues:
            _put_last(queue)

    def look(self) -> None:
        """Take up what is new."""
        news = read(self._run, self.totals.position)
        if news.lost:
            self.totals.count("events_lost")
        for event in news.events:
            self.totals.add(event)
        if news.position == self.totals.position and not news.lost:
            return
        self.totals.position = news.position
        self._save()
        for event in news.events:
            self._tell(event)
            for queue in list(self._queues):
                self._offer(queue, event)

    def count(self, name: str, label: str) -> None:
        """Count what is in no journal."""
        self.totals.count(name, label)
        self._save()

    @contextlib.contextmanager
    def subscription(self, *, replay: bool = False) -> Iterator[tuple[tuple[Event, ...], asyncio.Queue[Event | None]]]:
        """All that the journal has so far, with `replay`, and the events after that.

        None is the last: the agent ends, or the reader did not keep up.
        """
        queue: asyncio.Queue[Event | None] = asyncio.Queue(_WAITING_MOST)
        past = self._past() if replay else ()
        self._queues.add(queue)
        try:
            yield past, queue
        finally:
            self._queues.discard(queue)

    def _past(self) -> tuple[Event, ...]:
        """Up to where the totals are, neither less nor more: the next look goes on from there."""
        while True:
            self.look()
            news = read(self._run, Position())
            if news.position == self.totals.position or not news.position.journal:  # no journal any more
                return news.events

    def _save(self) -> None:
        with contextlib.suppress(OSError):
            self.totals.save(self._file)

    def _offer(self, queue: asyncio.Queue[Event | None], event: Event) -> None:
        try:
            queue.put_nowait(event)
        except asyncio.QueueFull:
            self._queues.discard(queue)
            _put_last(queue)


def _put_last(queue: asyncio.Queue[Event | None]) -> None:
    while True:
        try:
            queue.put_nowait(None)
        except asyncio.QueueFull:
            queue.get_nowait()
        else:
            return
