"""Prefetch: what is read, what is left alone, and what the page cache says of it."""

from __future__ import annotations

import fcntl
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from smr.images import pagecache, prefetch
from smr.images.image import Image
from smr.images.store import Store
from smr.proto.checkpoint import LayerType
from smr.proto.errors import Code, SmrError
from tests.store_support import fill, make_config

MIB = 1 << 20
PAGES = {"pages-1.img": os.urandom(9 * MIB + 5), "pages-2.img": os.urandom(100)}
SEGMENTS = (
    (LayerType.SEGMENT, "segment-0", os.urandom(8 * MIB + 4096)),
    (LayerType.SEGMENT, "segment-1", os.urandom(4096)),
    (LayerType.PAGETABLE, "pagetable", b"table" * 1000),
)
MEMORY_BYTES = 64 * MIB


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with one image of some pages, of CRIU's and of ours."""
    store = Store(tmp_path / "store")
    with store.ingest() as ingest:
        for kind, title, data in SEGMENTS:
            (ingest.path / title).write_bytes(data)
            ingest.add(ingest.path / title, kind, title=title)
        fill(ingest, pages=PAGES)
        ingest.commit("llama", replace(make_config(), memory_bytes=MEMORY_BYTES))
    return store


@pytest.fixture
def image(store: Store) -> Image:
    """The image, whose layers are not in memory."""
    image = store.resolve("llama")
    for layer in image.layers:
        drop(layer.path)
    if prefetch.cached_share(image) > 0:
        pytest.skip("this file system keeps files in memory (tmpfs), so nothing can be read ahead")
    return image


def drop(path: Path) -> None:
    """Take a file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def total(image: Image) -> int:
    """Bytes of all layers."""
    return sum(layer.size_bytes for layer in image.layers)


def test_prefetch_brings_the_whole_image_into_memory(image: Image) -> None:
    """Afterwards all of it is cached, and a second run reads nothing."""
    first = prefetch.prefetch(image, threads=3)
    assert (first.total_bytes, first.cached_bytes, first.read_bytes, first.left_bytes) == (total(image), 0, total(image), 0)
    assert prefetch.cached_share(image) == 1.0
    second = prefetch.prefetch(image, threads=3)
    assert (second.cached_bytes, second.read_bytes, second.left_bytes) == (total(image), 0, 0)


def test_prefetch_takes_only_its_share_of_memory(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is left on disk: read-ahead must not push the containers of the node out of memory."""
    monkeypatch.setattr(prefetch, "available_bytes", lambda: 200 * MIB)
    result = prefetch.prefetch(image, share=0.01)
    assert result.read_bytes <= 2 * MIB
    assert result.left_bytes == total(image) - result.read_bytes
    assert not result.cancelled
    large = next(layer for layer in image.layers if layer.title == "pages-1.img")
    assert pagecache.cached_bytes_of(large.path) < large.size_bytes


def test_prefetch_stops_when_it_is_cancelled(image: Image, tmp_path: Path) -> None:
    """A file that appears ends the reading; here it is there from the start."""
    cancel = tmp_path / "cancel"
    cancel.touch()
    result = prefetch.prefetch(image, cancel=cancel)
    assert (result.cancelled, result.read_bytes, result.left_bytes) == (True, 0, total(image))
    cancel.unlink()
    assert not prefetch.prefetch(image, cancel=cancel).cancelled


def test_prefetch_ends_with_what_it_is_for(image: Image, tmp_path: Path) -> None:
    """The bundle of a container that was given up is gone, and then nobody needs its image."""
    result = prefetch.prefetch(image, alive=tmp_path / "bundle")
    assert (result.cancelled, result.read_bytes) == (True, 0)
    (tmp_path / "bundle").mkdir()
    assert not prefetch.prefetch(image, alive=tmp_path / "bundle").cancelled


def test_small_layers_alone(image: Image) -> None:
    """Pages that will come past the page cache are not read into it."""
    prefetch.prefetch(image, bulk=False)
    for layer in image.layers:
        large = layer.kind in {LayerType.PAGES, LayerType.SEGMENT, LayerType.PAGETABLE}
        assert pagecache.cached_bytes_of(layer.path) == (0 if large else layer.size_bytes), layer.kind


def test_order_is_that_of_a_restore(image: Image) -> None:
    """First what CRIU opens, then its pages, then the page table, then the segments from their begin."""
    kinds = {layer.path: layer.kind for layer in image.layers}
    order = [kinds[piece.path] for piece in prefetch._pieces(image, (*prefetch._SMALL, *prefetch._BULK))]
    wanted = ["CRIU", "ROOTFS", "TMPFS", "PAGES", "PAGETABLE", "SEGMENT"]
    assert list(dict.fromkeys(kind.name for kind in order)) == wanted
    assert order.count(LayerType.SEGMENT) == 3


def test_container_keeps_its_room(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read is no more than what is left when the container has its memory, however large the share."""
    monkeypatch.setattr(prefetch, "available_bytes", lambda: MEMORY_BYTES + 10 * MIB)
    assert 0 < prefetch.prefetch(image, share=1.0).read_bytes <= 10 * MIB


@pytest.mark.parametrize(
    ("available", "container", "share", "room"),
    [(100, 20, 0.5, 50), (100, 60, 0.5, 40), (100, 100, 0.5, 0), (100, 200, 0.5, 0), (100, 20, 0.1, 10), (0, 0, 0.5, 0)],
)
def test_room_is_a_share_and_leaves_the_container_its_own(available: int, container: int, share: float, room: int) -> None:
    """Never below nothing."""
    assert prefetch.cache_room(available, container, share) == room


def test_plan_goes_past_the_cache_where_there_is_no_room(image: Image) -> None:
    """An image that fits beside its container goes through the cache; one that does not, past it, unless it is there already."""
    assert prefetch.plan(image, 4 * MEMORY_BYTES).way is prefetch.Way.CACHE
    tight = prefetch.plan(image, MEMORY_BYTES + MIB)
    assert (tight.way, tight.room_bytes, tight.cached_bytes) == (prefetch.Way.DIRECT, MIB, 0)
    prefetch.prefetch(image)
    assert prefetch.plan(image, MEMORY_BYTES + MIB).way is prefetch.Way.CACHE


def test_program_leaves_the_pages_where_there_is_no_room(store: Store, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fill will read them past the page cache; what CRIU reads is in memory."""
    monkeypatch.setattr(prefetch, "available_bytes", lambda: MEMORY_BYTES + 5 * MIB)
    assert prefetch.main([str(store.root), "llama"]) == 0
    assert pagecache.cached_bytes_of(image.layers_of(LayerType.SEGMENT)[0].path) == 0
    assert pagecache.cached_bytes_of(image.layers_of(LayerType.CRIU)[0].path) > 0


def test_progress_adds_up_to_the_image(image: Image) -> None:
    """What was in memory counts as dealt with."""
    image.layers_of(LayerType.SEGMENT)[0].path.read_bytes()
    counts: list[int] = []
    prefetch.prefetch(image, progress=counts.append)
    assert sum(counts) == total(image)


def test_readers_grow_while_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as many for as long as the device gives a fifth more with them; then no more."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    clock = [0.0]
    monkeypatch.setattr(prefetch.time, "monotonic", lambda: clock[0])
    ramp, seen = prefetch._Ramp(None), []
    for _ in range(400):
        clock[0] += 1.0 / min(ramp.readers, 3)  # a device that three readers keep busy
        ramp.read(prefetch.PIECE_BYTES)
        seen.append(ramp.readers)
    assert list(dict.fromkeys(seen)) == [2, 4, 8]


def test_readers_that_were_asked_for(image: Image) -> None:
    """A number that the user gave is that number."""
    ramp = prefetch._Ramp(3)
    for _ in range(100):
        ramp.read(prefetch.PIECE_BYTES)
    assert ramp.readers == 3


def test_second_prefetch_waits_and_reads_nothing(image: Image) -> None:
    """Two restores of an image at once read it once: the second begins when the first is done."""
    order: list[str] = []
    results: list[prefetch.Prefetched] = []

    def first_piece(_: int) -> None:
        if not order:
            order.append("first reads")
            second.start()
            assert not done.wait(0.3), "the second did not wait"

    def later() -> None:
        results.append(prefetch.prefetch(image))
        done.set()

    done = threading.Event()
    second = threading.Thread(target=later)
    assert prefetch.prefetch(image, threads=1, progress=first_piece).read_bytes == total(image)
    second.join()
    assert (results[0].read_bytes, results[0].cached_bytes) == (0, total(image))


def test_waiting_prefetch_can_be_cancelled(image: Image, tmp_path: Path) -> None:
    """Also while another one reads."""
    fd = os.open(image.layers[0].path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    timer = threading.Timer(0.1, (tmp_path / "cancel").touch)
    timer.start()
    try:
        assert prefetch.prefetch(image, cancel=tmp_path / "cancel").cancelled
    finally:
        os.close(fd)
        timer.join()


def test_prefetch_names_the_image_that_it_cannot_read(image: Image) -> None:
    """A blob that is missing is IMAGE_CORRUPT, from whatever thread."""
    image.layers_of(LayerType.PAGES)[0].path.unlink()
    with pytest.raises(SmrError, match="llama:latest") as caught:
        prefetch.prefetch(image)
    assert caught.value.code is Code.IMAGE_CORRUPT


def test_blob_that_was_cut_ends_the_reading(store: Store) -> None:
    """A file shorter than its manifest says is read to its end and no further; the restore reports it."""
    image = store.resolve("llama")
    path = image.layers_of(LayerType.PAGES)[0].path
    os.truncate(path, 100)
    drop(path)
    assert prefetch.prefetch(image).total_bytes == total(image)


def test_cached_share_of_a_part(image: Image) -> None:
    """One layer read of several counts by its bytes."""
    small = image.layers_of(LayerType.CRIU)[0]
    small.path.read_bytes()
    assert prefetch.cached_share(image) == pytest.approx(small.size_bytes / total(image))


def test_cachestat_and_mincore_agree(image: Image) -> None:
    """Both answers are about the same pages, in whole files and across the edges of pages."""
    path = image.layers_of(LayerType.PAGES)[0].path
    fd = os.open(path, os.O_RDONLY)
    try:
        if pagecache._cachestat(fd, 0, MIB) is None:
            pytest.skip("this kernel has no cachestat (6.5)")
        os.pread(fd, 3 * MIB, 2 * MIB)
        size = os.fstat(fd).st_size
        for offset, length in ((0, size), (2 * MIB, MIB), (2 * MIB + 10, 5), (0, 1), (size - 3, 3)):
            assert pagecache.cached_bytes(fd, offset, length) == pagecache._mincore(fd, offset, length)
        assert pagecache.cached_bytes(fd, 2 * MIB, MIB) == MIB
        assert pagecache.cached_bytes(fd, 0, 0) == 0
    finally:
        os.close(fd)


def test_mincore_serves_where_cachestat_is_missing(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an older kernel the share is the same."""
    monkeypatch.setattr(pagecache, "_cachestat", lambda *_: None)
    assert prefetch.cached_share(image) == 0.0
    prefetch.prefetch(image)
    assert prefetch.cached_share(image) == 1.0


def test_read_ahead_of_any_range(image: Image) -> None:
    """In memory afterwards, to the end of the file and no further; the rest is not read for it as a whole."""
    path = image.layers_of(LayerType.PAGES)[0].path
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        pagecache.read_ahead(fd, size // 4096 * 4096, 10 * MIB)
        assert pagecache.cached_bytes(fd, size - 5, 5) == 5
        assert pagecache.cached_bytes(fd, 0, size) < size
        pagecache.read_ahead(fd, 0, size)
        assert pagecache.cached_bytes(fd, 0, size) == size
        pagecache.read_ahead(fd, 4096 * MIB, MIB)
    finally:
        os.close(fd)


def test_read_ahead_without_mappings_that_populate(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before kernel 5.14 madvise refuses; then the range is read."""
    monkeypatch.setattr(pagecache, "_MADV_POPULATE_READ", 9999)
    assert prefetch.prefetch(image).read_bytes == total(image)
    assert prefetch.cached_share(image) == 1.0


def test_share_of_a_large_file_is_sampled(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """All, nothing, and about a half."""
    path = image.layers_of(LayerType.PAGES)[0].path
    size = path.stat().st_size
    monkeypatch.setattr(pagecache, "_SAMPLED_FROM_BYTES", size)
    monkeypatch.setattr(pagecache, "_SAMPLE_BYTES", 16384)
    assert pagecache.cached_bytes_of(path) == 0
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
        os.pread(fd, size // 2, 0)
    finally:
        os.close(fd)
    assert pagecache.cached_bytes_of(path) == pytest.approx(size / 2, rel=0.1)
    prefetch.prefetch(image)
    assert pagecache.cached_bytes_of(path) == size


def memory_files(tmp_path: Path, cgroup: str) -> tuple[Path, Path]:
    """A /proc with 8 GiB available, and an empty cgroup file system."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\nHugePages_Total:       0\n")
    (tmp_path / "proc/self/cgroup").write_text(cgroup)
    (tmp_path / "cgroup").mkdir()
    return tmp_path / "proc", tmp_path / "cgroup"


@pytest.mark.parametrize(
    ("cgroup", "file", "limit", "expected"),
    [
        ("0::/pod\n", "pod/memory.max", "1073741824\n", 1 << 30),
        ("0::/pod\n", "pod/memory.max", "max\n", 8 << 30),
        ("0::/elsewhere\n", "pod/memory.max", "1\n", 8 << 30),
        ("4:cpu,memory:/pod\n0::/\n", "memory/pod/memory.limit_in_bytes", "1073741824\n", 1 << 30),
        ("4:memory:/pod\n", "memory/pod/memory.limit_in_bytes", "9223372036854771712\n", 8 << 30),
        ("0::/pod/container\n", "pod/memory.max", "1073741824\n", 1 << 30),
    ],
)
def test_available_memory_is_within_our_own_cgroup(tmp_path: Path, cgroup: str, file: str, limit: str, expected: int) -> None:
    """Page cache is charged to who reads: a limit of ours counts, on cgroup v1 and v2."""
    proc, cgroups = memory_files(tmp_path, cgroup)
    (cgroups / file).parent.mkdir(parents=True)
    (cgroups / file).write_text(limit)
    assert pagecache.available_bytes(proc, cgroups) == expected


@pytest.mark.parametrize(
    ("cgroup", "folder", "limit", "usage", "stat"),
    [
        ("0::/pod\n", "pod", "memory.max", "memory.current", "anon 1\nactive_file 1000\ninactive_file 24\nactive_anon 7\n"),
        (
            "4:memory:/pod\n",
            "memory/pod",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "active_file 5\ninactive_file 5\ntotal_active_file 1000\ntotal_inactive_file 24\n",
        ),
    ],
)
def test_what_a_cgroup_uses_is_not_available(tmp_path: Path, cgroup: str, folder: str, limit: str, usage: str, stat: str) -> None:
    """Its limit less its memory; page cache, its children's too, can be had."""
    proc, cgroups = memory_files(tmp_path, cgroup)
    (cgroups / folder).mkdir(parents=True)
    for name, text in ((limit, "1073741824\n"), (usage, "73741824\n"), ("memory.stat", stat)):
        (cgroups / folder / name).write_text(text)
    assert pagecache.available_bytes(proc, cgroups) == 1_000_000_000 + 1024


def test_program_reads_an_image(store: Store, image: Image) -> None:
    """The detached program does the same, by any reference."""
    assert prefetch.main([str(store.root), image.digest]) == 0
    assert prefetch.cached_share(image) == 1.0


def test_program_says_what_is_wrong(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Its exit status is that of `smr`: 3 for an unknown image, 2 for a wrong call."""
    assert prefetch.main([str(store.root), "lama"]) == 3
    assert "did you mean llama:latest?" in capsys.readouterr().err
    assert prefetch.main([]) == 2
    assert "usage" in capsys.readouterr().err
