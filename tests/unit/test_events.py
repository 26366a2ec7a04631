"""The journal of events: whole entries, bounded, each read once, by writers that do not know of the reader."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from smr.proto.errors import Code, SmrError
from smr.shim import events
from smr.shim.agent.reader import News, Position, read
from smr.shim.config import Config
from smr.shim.events import MOST_BYTES, emit, emit_failure, note, pod_facts

CRI = {
    "io.kubernetes.cri.container-type": "container",
    "io.kubernetes.cri.sandbox-namespace": "shop",
    "io.kubernetes.cri.sandbox-name": "llama-0",
    "io.kubernetes.cri.sandbox-uid": "0f1e",
    "io.kubernetes.cri.container-name": "server",
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A node of its own."""
    return Config(run=tmp_path / "run", log=tmp_path / "smr.log")


def numbers(found: News) -> list[object]:
    """The member `n` of each event."""
    return [event["n"] for event in found.events]


def test_each_event_is_read_once(config: Config) -> None:
    """A reader goes on where it was."""
    note(config, "restored", {"n": 1})
    note(config, "restored", {"n": 2})
    first = read(config.run, Position())
    assert numbers(first) == [1, 2]
    assert first.events[0]["event"] == "restored"
    assert not read(config.run, first.position).events
    note(config, "restored", {"n": 3})
    assert numbers(read(config.run, first.position)) == [3]


def test_no_journal_is_no_news(config: Config) -> None:
    """Nothing happened yet."""
    assert read(config.run, Position()) == News(events=(), position=Position())


def test_the_journal_is_bounded_and_a_turn_is_not_missed(config: Config) -> None:
    """However much happens, two journals are kept; who reads at least once a turn gets all."""
    seen: list[object] = []
    position = Position()
    total = 3 * MOST_BYTES // 10_000
    for number in range(total):
        note(config, "restored", {"n": number, "fill": "x" * 10_000})
        if number % 50 == 0:
            news = read(config.run, position)
            seen, position = [*seen, *numbers(news)], news.position
            assert not news.lost
    assert [*seen, *numbers(read(config.run, position))] == list(range(total))
    folder = events.journal_dir(config.run)
    assert sorted(path.name for path in folder.iterdir()) == ["journal", "journal.1"]
    assert all(path.stat().st_size <= MOST_BYTES for path in folder.iterdir())


def test_two_turns_without_a_reader_are_told(config: Config) -> None:
    """What is lost is said to be, and what is left is read."""
    note(config, "restored", {"n": -1})
    position = read(config.run, Position()).position
    for number in range(3 * MOST_BYTES // 10_000):
        note(config, "restored", {"n": number, "fill": "x" * 10_000})
    news = read(config.run, position)
    assert news.lost
    assert numbers(news)[-1] == 3 * MOST_BYTES // 10_000 - 1
    assert not read(config.run, news.position).lost


def test_writers_at_once(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of many writers are whole, and none is lost where the journal turns."""
    monkeypatch.setattr(events, "MOST_BYTES", 40_000)

    def write(writer: int) -> None:
        for number in range(50):
            note(config, "restored", {"n": writer * 50 + number, "fill": "x" * 100})

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(int, map(str, numbers(read(config.run, Position()))))) == list(range(400))


def test_an_entry_that_was_cut_off_is_skipped(config: Config) -> None:
    """A write that a full disk, or a crash, has cut off harms no other entry."""
    note(config, "restored", {"n": 1})
    path = events.journal_dir(config.run) / "journal"
    with path.open("ab") as file:
        file.write(b'{"event": "resto')
    news = read(config.run, Position())
    assert numbers(news) == [1]
    with path.open("ab") as file:
        file.write(b"\n[1]\n")
    note(config, "restored", {"n": 2})
    assert numbers(read(config.run, news.position)) == [2]


def test_a_short_write_is_taken_back(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal never ends in half an entry of ours."""
    note(config, "restored", {"n": 1})
    original = events.os.write
    monkeypatch.setattr(events.os, "write", lambda fd, data: original(fd, data[:10]))
    note(config, "restored", {"n": 2})
    monkeypatch.undo()
    note(config, "restored", {"n": 3})
    assert numbers(read(config.run, Position())) == [1, 3]
    assert (events.journal_dir(config.run) / "journal").read_bytes().count(b"\n") == 3


def test_a_journal_that_cannot_be_written_fails_nobody(tmp_path: Path) -> None:
    """The log's line is written all the same."""
    (tmp_path / "run").write_text("a file")
    config = Config(run=tmp_path / "run", log=tmp_path / "smr.log")
    emit(config, "restored", {"container": "c1"})
    assert json.loads((tmp_path / "smr.log").read_text())["container"] == "c1"


def test_emit_tells_log_and_journal_the_same(config: Config) -> None:
    """A failure's code, reason and pod are in both."""
    emit_failure(config, "started_cold", "c1", CRI, SmrError("no image", hint="look", code=Code.IMAGE_NOT_FOUND), "llama")
    (event,) = read(config.run, Position()).events
    line = json.loads(config.log.read_text())
    for key in ("event", "container", "image", "code", "reason", "pod"):
        assert event[key] == line[key]
    assert (event["code"], event["reason"]) == ("image_not_found", "no image (look)")
    assert event["pod"] == {"namespace": "shop", "name": "llama-0", "uid": "0f1e", "container": "server"}


def test_a_long_reason_is_cut_in_the_journal(config: Config) -> None:
    """CRIU's log can be quoted at length; the log file has all of it."""
    emit_failure(config, "started_cold", "c1", {}, SmrError("x" * 5000))
    (event,) = read(config.run, Position()).events
    assert len(str(event["reason"])) == 1024
    assert len(json.loads(config.log.read_text())["reason"]) == 5000


def test_an_entry_is_bounded(config: Config) -> None:
    """A thousand warnings are for the log; the journal keeps what is counted and told."""
    note(config, "restored", {"container": "c1", "busy_s": 0.1, "warnings": ["w" * 100] * 1000})
    (event,) = read(config.run, Position()).events
    assert (event["container"], event["busy_s"], event.get("warnings")) == ("c1", 0.1, None)


@pytest.mark.parametrize(
    ("annotations", "found"),
    [
        ({}, {}),
        ({"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-name": "p"}, {}),
        ({**CRI, "io.kubernetes.cri.container-type": "sandbox"}, {}),
        (
            {
                "io.kubernetes.cri-o.ContainerType": "container",
                "io.kubernetes.pod.namespace": "n",
                "io.kubernetes.pod.name": "p",
                "io.kubernetes.container.name": "c",
            },
            {"namespace": "n", "name": "p", "container": "c"},
        ),
    ],
    ids=["none", "half", "sandbox", "cri-o"],
)
def test_pod_facts(annotations: dict[str, str], found: dict[str, str]) -> None:
    """Namespace and name are needed; what the engine does not tell is left out."""
    assert pod_facts(annotations) == found
