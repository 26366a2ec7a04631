"""The store against kill -9, many processes at once, a full disk and a read-only mount. No engine is needed; mounts need root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from smr.images.store import Store
from smr.proto.checkpoint import LayerType
from smr.proto.errors import Code, SmrError
from tests.integration.command import run
from tests.store_support import commit, files_needed, files_of, fill, make_config

WORKER = Path(__file__).with_name("store_worker.py")


def worker(*words: object) -> list[str]:
    """The command of a program of `store_worker`."""
    return [sys.executable, str(WORKER), *map(str, words)]


def run_until_killed(*words: object) -> bool:
    """Run a program that may kill itself; whether it did. Any other failure is one."""
    done = run(worker(*words), check=False)
    assert done.returncode in {0, -signal.SIGKILL}, done.stderr
    return done.returncode != 0


@contextmanager
def running(*words: object) -> Iterator[subprocess.Popen[str]]:
    """A program that has said that it is ready; killed in the end."""
    with subprocess.Popen(worker(*words), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with two images, made by programs of their own."""
    for name, seed in (("llama", 1), ("other", 2)):
        run(worker("commit", tmp_path / "store", name, seed, 0))
    return Store(tmp_path / "store")


def check_store(store: Store) -> None:
    """Every image is whole, and after a gc nothing is there that no image needs."""
    assert store.broken() == []
    for image in store.images():
        store.verify(image).check()
    store.gc()
    assert files_of(store) == files_needed(store)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "new"])
def test_kill_at_any_step_of_a_commit_gives_the_old_or_the_new_image(store: Store, tmp_path: Path, name: str) -> None:
    """Before each thing that a commit does to a file it is killed: the name is whole, old or new, and gc takes the rest."""
    old = {image.name: image.digest for image in store.images()}
    seen = set()
    for step in range(1, 500):
        copy = Store(tmp_path / "copy")
        shutil.copytree(store.root, copy.root)
        killed = run_until_killed("commit", copy.root, name, 3, step)
        now = {image.name: image.digest for image in copy.images()}
        assert now["other"] == old["other"]
        seen.add("old" if now.get(name) == old.get(name) else "new")
        check_store(copy)
        commit(copy, name)
        check_store(copy)
        shutil.rmtree(copy.root)
        if not killed:
            break
    assert step > 20
    assert not killed
    assert seen == {"old", "new"}


@pytest.mark.slow
def test_kill_at_any_step_of_a_removal_leaves_whole_images(store: Store, tmp_path: Path) -> None:
    """The image is there whole or not at all; the other one always."""
    seen = set()
    for step in range(1, 200):
        copy = Store(tmp_path / "copy")
        shutil.copytree(store.root, copy.root)
        killed = run_until_killed("remove", copy.root, "llama", step)
        seen.add(len(copy.images()))
        check_store(copy)
        shutil.rmtree(copy.root)
        if not killed:
            break
    assert not killed
    assert seen == {1, 2}


def test_first_commit_killed_while_it_makes_the_store(tmp_path: Path) -> None:
    """A store that was half made is an empty one, and the next commit makes the rest."""
    for step in range(1, 12):
        root = tmp_path / str(step)
        assert run_until_killed("commit", root, "llama", 1, step)
        assert Store(root).images() == []
        run(worker("commit", root, "llama", 1, 0))
        check_store(Store(root))


def test_ingest_is_kept_while_its_maker_lives_and_swept_after(store: Store) -> None:
    """gc and other commits leave a live maker's directory alone; after kill -9 the next ingest drops it."""
    with running("hold", store.root) as maker:
        (held,) = (store.root / "ingest").iterdir()
        assert store.gc().ingests == 0
        commit(store, "third")
        assert (held / "blobs/0").stat().st_size == 1000
        maker.kill()
        maker.wait()
    commit(store, "fourth")
    assert not held.exists()
    check_store(store)


def test_lease_ends_with_its_holder(store: Store) -> None:
    """A leased image is not removed by another process, and no stale lease is left by kill -9."""
    with running("lease", store.root, "llama") as user:
        with pytest.raises(SmrError) as caught:
            store.remove("llama")
        assert caught.value.code is Code.IMAGE_IN_USE
        user.kill()
        user.wait()
    store.remove("llama")
    check_store(store)


@pytest.mark.slow
def test_many_processes_at_once_lose_nothing(store: Store) -> None:
    """Commits that share blobs, restores, removals and collections in six processes: each is whole or refused for a reason."""
    processes = [
        subprocess.Popen(worker("churn", store.root, seed), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in range(6)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "ok\n"), err
    check_store(store)


@pytest.mark.slow
def test_makers_killed_at_random_disturb_nobody(store: Store) -> None:
    """While programs are killed in the middle, others go on, and in the end nothing of the dead is left."""
    with subprocess.Popen(worker("churn", store.root, 99), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as steady:
        for step in range(3, 60, 4):
            run_until_killed("commit", store.root, "image-1", step % 7, step)
        out, err = steady.communicate(timeout=120)
    assert (steady.returncode, out) == (0, "ok\n"), err
    check_store(store)


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root: mounts a tmpfs")
    path = tmp_path / "tmpfs"
    path.mkdir()
    mounted = run(["mount", "-t", "tmpfs", "-o", "size=2m", "smr-test", path], check=False)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        run(["umount", path])


def test_full_disk_while_adding(tmpfs: Path, tmp_path: Path) -> None:
    """A file that does not fit: DISK_FULL says how much was needed, the file is still the caller's, the store as before."""
    store = Store(tmpfs / "store")
    commit(store, "first")
    before = files_of(store)
    big = tmp_path / "pages-1.img"
    big.write_bytes(bytes(3 << 20))
    with pytest.raises(SmrError) as caught, store.ingest() as ingest:
        ingest.add(big, LayerType.PAGES, title="pages-1.img")
    assert caught.value.code is Code.DISK_FULL
    assert caught.value.context["needed_bytes"] == 3 << 20
    assert big.stat().st_size == 3 << 20
    assert files_of(store) == before
    commit(store, "second")
    check_store(store)


def commit_with_room(store: Store, filler: Path, room: int) -> None:
    """A commit whose file system has `room` bytes left after the last add."""
    with store.ingest() as ingest:
        fill(ingest)
        with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        os.truncate(filler, filler.stat().st_size - room)
        ingest.commit("second", make_config("2025-05-01T00:00:00Z"))


def test_full_disk_while_committing(tmpfs: Path) -> None:
    """However little room is left after the last add, the commit is DISK_FULL and gives all of it back, or is whole."""
    store = Store(tmpfs / "store")
    commit(store, "first", pages={})
    before = files_of(store)
    filler = tmpfs / "filler"
    refused = 0
    for room in range(0, 1 << 18, 4096):
        try:
            commit_with_room(store, filler, room)
            break
        except SmrError as error:
            assert error.code is Code.DISK_FULL
            refused += 1
        assert files_of(store) == before
        filler.unlink()
    assert refused >= 2
    assert {image.name for image in store.images()} == {"first", "second"}
    check_store(store)


def test_store_on_a_read_only_mount_is_read(tmpfs: Path, tmp_path: Path) -> None:
    """Readers need no write access: resolve, lease, config and verify work; writers are told PERMISSION."""
    store = Store(tmpfs / "store")
    made = commit(store, "llama")
    run(["mount", "-o", "remount,ro", tmpfs])
    with store.leased("llama") as image:
        assert image.config == made.config
        assert store.verify(image).ok
        outside = tmp_path / "outside"
        outside.mkdir()
        with pytest.raises(SmrError, match="beside the store"):
            image.materialize(outside)
        assert list(outside.iterdir()) == []
    for write in (lambda: commit(store, "other"), lambda: store.remove("llama"), store.gc):
        with pytest.raises(SmrError) as caught:
            write()
        assert caught.value.code is Code.PERMISSION
    assert store.resolve("llama").digest == made.digest
