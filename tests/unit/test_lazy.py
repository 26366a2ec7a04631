"""The bookkeeping of a lazy restore: which bytes are missing where, through everything a process can do to its memory."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path

import pytest

from smr.images.lazy_folder import load_all
from smr.images.lazy_journal import Ending, Journal, Registration
from smr.images.lazy_layout import Layout, Piece
from smr.images.lazy_source import Source
from smr.images.lazy_state import State
from smr.images.pagemap import Entry, Pagemap, read_pagemap, write_pagemap
from smr.images.pagetable import PAGE_BYTES, Chunk, Codec, PageTable, Run
from smr.images.uffd import Event, Message, build_message, parse_message
from smr.proto.errors import SmrError

_P = PAGE_BYTES


def _layout() -> Layout:
    return Layout([Piece(10 * _P, 14 * _P, 0, 0), Piece(14 * _P, 16 * _P, 1, 0), Piece(20 * _P, 24 * _P, 2, 0)])


def _table() -> PageTable:
    chunks = [Chunk(0, Codec.RAW, number * 4 * _P, 4 * _P, 4, b"") for number in range(3)]
    runs = [Run(1, 4, 10 * _P, 0), Run(1, 4, 14 * _P, 1), Run(7, 4, 10 * _P, 2)]
    return PageTable(segments=[12 * _P], chunks=chunks, runs=runs)


def test_a_layout_finds_the_piece_at_an_address_and_the_next() -> None:
    """An address belongs to one piece or to none; `following` gives the piece there or the first after."""
    layout = _layout()
    assert layout.at(9 * _P) is None
    assert layout.at(13 * _P + 5) == Piece(10 * _P, 14 * _P, 0, 0)
    assert layout.at(14 * _P) == Piece(14 * _P, 16 * _P, 1, 0)
    assert layout.at(16 * _P) is None
    assert layout.following(0) == Piece(10 * _P, 14 * _P, 0, 0)
    assert layout.following(17 * _P) == Piece(20 * _P, 24 * _P, 2, 0)
    assert layout.following(24 * _P) is None


def test_removing_splits_pieces_and_keeps_their_bytes() -> None:
    """What is left of a piece still names the right bytes of its chunk."""
    layout = _layout()
    assert layout.remove(11 * _P, 12 * _P)
    assert list(layout)[:2] == [Piece(10 * _P, 11 * _P, 0, 0), Piece(12 * _P, 14 * _P, 0, 2 * _P)]
    assert layout.remove(13 * _P, 21 * _P)
    assert list(layout)[1:] == [Piece(12 * _P, 13 * _P, 0, 2 * _P), Piece(21 * _P, 24 * _P, 2, _P)]
    assert not layout.remove(13 * _P, 21 * _P)
    assert layout.size_bytes == 5 * _P


def test_moving_takes_the_bytes_along_and_replaces_the_target() -> None:
    """After mremap the new place lacks what the old one lacked, and the old one nothing."""
    layout = _layout()
    assert layout.move(13 * _P, 21 * _P, 2 * _P)
    assert list(layout) == [
        Piece(10 * _P, 13 * _P, 0, 0),
        Piece(15 * _P, 16 * _P, 1, _P),
        Piece(20 * _P, 21 * _P, 2, 0),
        Piece(21 * _P, 22 * _P, 0, 3 * _P, moved=True),
        Piece(22 * _P, 23 * _P, 1, 0, moved=True),
        Piece(23 * _P, 24 * _P, 2, 3 * _P),
    ]
    assert not layout.move(100 * _P, 200 * _P, _P)


def test_still_gives_only_the_same_bytes_at_the_same_place() -> None:
    """A copy that was prepared for a piece must not use it for other bytes that were moved there since."""
    layout = _layout()
    wanted = layout.at(10 * _P)
    assert wanted is not None
    layout.move(20 * _P, 11 * _P, _P)
    assert layout.still(wanted) == [Piece(10 * _P, 11 * _P, 0, 0), Piece(12 * _P, 14 * _P, 0, 2 * _P)]


def test_a_layout_is_right_whatever_happens() -> None:
    """Random removals, moves and look-ups agree with a dictionary of pages."""
    rng = random.Random(3)
    layout = Layout(Piece(at * _P, (at + 8) * _P, at, 0) for at in range(0, 200, 10))
    model = {at + page: (at, page) for at in range(0, 200, 10) for page in range(8)}
    for _ in range(400):
        start, size, target = rng.randrange(200), rng.randrange(1, 30), rng.randrange(200)
        if rng.random() < 0.1:
            changed = any(page in model for page in range(start, start + size))
            assert layout.remove(start * _P, (start + size) * _P) is changed
            model = {page: value for page, value in model.items() if not start <= page < start + size}
        elif abs(start - target) >= size:
            layout.move(start * _P, target * _P, size * _P)
            moved = {page - start + target: model.pop(page) for page in range(start, start + size) if page in model}
            model = {page: value for page, value in model.items() if not target <= page < target + size} | moved
        found = {
            (piece.start + at) // _P: (piece.chunk, (piece.skip + at) // _P)
            for piece in layout
            for at in range(0, piece.end - piece.start, _P)
        }
        assert found == model
        assert layout.size_bytes == len(model) * _P
        at = layout.at(start * _P)
        assert (at is not None) == (start in model)


def test_a_child_lacks_what_its_parent_lacked_and_goes_its_own_way() -> None:
    """After a fork, what happens in one of both does not change the other."""
    state = State(_table())
    parent = state.register(Registration(1, 100, 5, -1))
    state.apply(0, Message(Event.REMOVE, 10 * _P, 11 * _P, 0))
    assert state.apply(0, Message(Event.FORK, 9, 0, 0))
    child = state.spaces[1]
    assert (child.fd, child.root, list(child.missing)) == (9, False, list(parent.missing))
    state.apply(1, Message(Event.UNMAP, 0, 1 << 40, 0))
    assert child.done
    assert parent.missing.size_bytes == 7 * _P


def test_an_event_in_delivered_memory_is_kept_for_a_successor() -> None:
    """A page that was delivered and then dropped must stay zero, also for a worker that does not know of the delivery."""
    state, journal = State(_table()), Journal(3)
    task = Registration(1, 100, 5, -1)
    space = state.register(task)
    journal.register(task)
    space.delivered(10 * _P, 11 * _P)
    message = Message(Event.REMOVE, 10 * _P, 11 * _P, 0)
    assert state.apply(0, message)
    _read(journal, 0, message)
    journal.commit()
    successor = State(_table())
    successor.replay(journal)
    assert successor.spaces[0].at(10 * _P) is None
    assert successor.spaces[0].at(11 * _P) is not None


def test_an_event_that_changes_nothing_need_not_be_kept() -> None:
    """Memory that no image page belongs to may be unmapped for ever without filling the journal."""
    state = State(_table())
    state.register(Registration(1, 100, 5, -1))
    assert not state.apply(0, Message(Event.UNMAP, 50 * _P, 60 * _P, 0))


def test_a_successor_finds_tasks_events_and_deliveries() -> None:
    """A journal brings a new state to where the old one was; what follows from an event counts with it."""
    journal = Journal(3)
    for task in (Registration(1, 100, 5, 6), Registration(7, 101, 8, -1)):
        journal.register(task)
    _read(journal, 0, Message(Event.FORK, 9, 0, 0))
    journal.commit([(2, Message(Event.UNMAP, 10 * _P, 11 * _P, 0))])
    journal.deliver(1)
    state = State(_table())
    state.replay(journal)
    parent, other, child = state.spaces
    assert (parent.pidfd, parent.host_pid, other.pid, child.fd) == (6, 100, 7, 9)
    assert list(parent.missing) == [Piece(10 * _P, 14 * _P, 0, 0)]
    assert list(other.missing) == [Piece(10 * _P, 14 * _P, 2, 0)]
    assert [piece.start for piece in child.missing] == [11 * _P, 14 * _P]


def test_a_delivered_run_says_nothing_of_the_same_chunk_moved_there() -> None:
    """A mark belongs to the run where the table puts it, not to what the process moved to its place."""
    chunks = [Chunk(0, Codec.RAW, 0, 4 * _P, 4, b"")]
    table = PageTable(segments=[4 * _P], chunks=chunks, runs=[Run(1, 4, 10 * _P, 0), Run(1, 4, 20 * _P, 0)])
    journal = Journal(2)
    journal.register(Registration(1, 100, 5, -1))
    journal.deliver(0)
    _read(journal, 0, Message(Event.UNMAP, 10 * _P, 14 * _P, 0))
    journal.commit()
    _read(journal, 0, Message(Event.REMAP, 20 * _P, 10 * _P, 4 * _P))
    journal.commit()
    state = State(table)
    state.replay(journal)
    assert list(state.spaces[0].missing) == [Piece(10 * _P, 14 * _P, 0, 0, moved=True)]


def test_what_a_killed_reader_read_is_left_for_its_successor() -> None:
    """An event that was read but not counted is found; a fault is not, for who waits for it asks again."""
    journal = Journal(3)
    journal.register(Registration(1, 100, 5, -1))
    message = Message(Event.REMOVE, 10 * _P, 11 * _P, 0)
    _read(journal, 0, message)
    assert journal.leftover() == (0, message)
    _read(journal, 0, Message(Event.PAGEFAULT, 0, 10 * _P, 0))
    assert journal.leftover() is None
    journal.prepare(0)
    assert journal.leftover() is None


def test_a_journal_says_when_it_is_full_and_keeps_the_first_reason() -> None:
    """Room is kept for what follows from the last event; a second failure does not hide the first."""
    journal = Journal(0, capacity=4)
    for pid in range(4):
        assert not journal.full
        journal.register(Registration(pid, 0, 0, -1))
    assert journal.full
    message = Message(Event.UNMAP, _P, 2 * _P, 0)
    _read(journal, 0, message)
    journal.commit([(0, message)] * 1000)
    assert len(list(journal.replay())) == 1005
    with pytest.raises(ValueError, match="1023 events"):
        journal.commit([(0, message)] * 1023)
    journal.end(Ending.FAILED, "first")
    journal.end(Ending.DONE, "second")
    assert (journal.ending, journal.reason) == (Ending.FAILED, "first")


@pytest.mark.parametrize("event", [Message(Event.FORK, 7, 0, 0), Message(Event.REMAP, 1 << 46, 2 << 40, 3)])
def test_messages_are_read_as_the_kernel_writes_them(event: Message) -> None:
    """Kinds and their three numbers survive the way there and back; of a fork only 32 bits are a descriptor."""
    assert parse_message(build_message(event)) == event
    fork = build_message(Message(Event.FORK, 7 | 1 << 40, 0, 0))
    assert parse_message(fork).first == 7


def test_a_segment_that_has_not_its_size_is_refused_at_once(tmp_path: Path) -> None:
    """A short segment, and one that is not there, are named before anything is served."""
    path = tmp_path / "segment"
    path.write_bytes(b"x" * 11 * _P)
    with pytest.raises(SmrError, match=r"has 45056 bytes, needed 49152"):
        Source(_table(), [path])
    with pytest.raises(SmrError, match="No such file"):
        Source(_table(), [tmp_path / "none"])
    with pytest.raises(SmrError, match="1 segments, 0 were given"):
        Source(_table(), [])


def test_criu_loads_all_that_a_stripped_folder_still_has(tmp_path: Path) -> None:
    """Entries lose the mark that lets CRIU leave them out, and nothing else."""
    (tmp_path / "pages-1.img").write_bytes(bytes(3 * _P))
    path = tmp_path / "pagemap-5.img"
    magic = bytes.fromhex("1943565430145600")
    entries = [Entry(1, 3, 0, 6), Entry(5, 6, 2, 4), Entry(8, 9, 3, 1)]
    write_pagemap(Pagemap(path=path, magic=magic, pages_id=1, entries=[], wide=True), entries)
    assert load_all(tmp_path) == 1
    assert [entry.flags for entry in read_pagemap(path).entries] == [4, 4, 1]
    assert load_all(tmp_path) == 0


def _read(journal: Journal, space: int, message: Message) -> None:
    """What the kernel does when it is given the address of a record."""
    ctypes.memmove(journal.prepare(space), build_message(message), 32)
