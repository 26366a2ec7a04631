"""A disk that is full, a store that may not be written, a lock that another holds."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from smr.images import files, ingest, layout
from smr.images.criutar import pack
from smr.images.files import locked, write_atomic, writing
from smr.images.store import Store
from smr.proto.checkpoint import LayerType
from smr.proto.errors import Code, SmrError
from tests.store_support import commit, files_needed, files_of, fill, make_config


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with one image."""
    store = Store(tmp_path / "store")
    commit(store, "first")
    return store


def failing(number: int) -> Callable[..., None]:
    """A function that the disk refuses."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (ingest.shutil, "move"),
        (ingest, "_fsync"),
        (ingest, "write_file"),
        (ingest, "fsync_directory"),
        (ingest, "_place"),
        (layout, "write_atomic"),
        (files, "write_file"),
        (files, "fsync_directory"),
    ],
)
def test_full_disk_at_any_step_leaves_the_store_as_it_was(
    store: Store, monkeypatch: pytest.MonkeyPatch, module: object, name: str, number: int
) -> None:
    """Moving, syncing, renaming, replacing the index: each failure is DISK_FULL, and nothing of the image stays."""
    before = files_of(store)
    with monkeypatch.context() as patch, pytest.raises(SmrError) as caught, store.ingest() as made:
        patch.setattr(module, name, failing(number))
        fill(made, pages={"pages-1.img": b"second"})
        made.commit("second", make_config("2025-05-01T00:00:00Z"))
    assert caught.value.code is Code.DISK_FULL
    assert str(store.root) in caught.value.message
    assert caught.value.hint
    if (module, name) == (files, "fsync_directory"):
        # The index was replaced and only its durability is in doubt: the image is whole, and may stay.
        assert all(store.verify(image).ok for image in store.images())
        assert files_of(store) == files_needed(store)
    else:
        assert files_of(store) == before
    assert commit(store, "third").reference == "third:latest"


def test_full_disk_names_the_bytes_that_were_needed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the size is known the message has it, beside what is free."""
    with store.ingest() as made:
        (made.path / "pages-1.img").write_bytes(bytes(12345))
        monkeypatch.setattr(ingest.shutil, "move", failing(errno.ENOSPC))
        with pytest.raises(SmrError) as caught:
            made.add(made.path / "pages-1.img", LayerType.PAGES, title="pages-1.img")
    assert "needed 12345 bytes" in caught.value.message
    assert caught.value.context["needed_bytes"] == 12345


def test_full_disk_while_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tar of CRIU's images says DISK_FULL too."""
    (tmp_path / "core-1.img").write_bytes(b"x")
    monkeypatch.setattr(os, "sendfile", failing(errno.ENOSPC))
    with pytest.raises(SmrError) as caught:
        pack([tmp_path / "core-1.img"], tmp_path / "x.tar")
    assert caught.value.code is Code.DISK_FULL


def test_full_disk_while_materializing_leaves_an_empty_directory(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restore that finds no room says so, and leaves no half of a directory."""
    target = store.root / "restore"
    target.mkdir()
    monkeypatch.setattr(os, "sendfile", failing(errno.ENOSPC))
    with pytest.raises(SmrError) as caught:
        store.resolve("first").materialize(target)
    assert caught.value.code is Code.DISK_FULL
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_store_that_may_not_be_written_says_so(tmp_path: Path, number: int) -> None:
    """PERMISSION with the path and who may."""
    with pytest.raises(SmrError) as caught, writing(tmp_path):
        raise OSError(number, os.strerror(number))
    assert caught.value.code is Code.PERMISSION
    assert str(tmp_path) in caught.value.message


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    """What is neither full nor forbidden is not dressed up as that."""
    with pytest.raises(IsADirectoryError), writing(tmp_path):
        raise IsADirectoryError(errno.EISDIR, "is a directory")


def test_atomic_write_keeps_the_old_content_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed write leaves the old file and no temporary."""
    path = tmp_path / "index.json"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        write_atomic(path, b"new")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"index.json": b"old"}


def test_lock_that_another_holds_times_out(tmp_path: Path) -> None:
    """Nobody waits for ever: TIMEOUT says which file, and the holder is not disturbed."""
    path = tmp_path / "lock"
    with path.open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(SmrError) as caught, locked(path, timeout_s=0.05):
            pass
        assert caught.value.code is Code.TIMEOUT
    with locked(path, timeout_s=0.05):
        assert path.exists()


def test_sweep_between_making_and_locking_a_directory_is_survived(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A maker whose fresh directory is swept before it could lock it makes another."""
    made: list[Path] = []
    mkdtemp = ingest.mkdtemp

    def swept_once(**arguments: object) -> str:
        directory = mkdtemp(**arguments)  # type: ignore[call-overload]
        made.append(Path(directory))
        if len(made) == 1:
            ingest.sweep(layout.Layout(store.root))
        return directory

    monkeypatch.setattr(ingest, "mkdtemp", swept_once)
    commit(store, "second")
    assert len(made) == 2
    assert files_of(store) == files_needed(store)
