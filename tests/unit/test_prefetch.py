"""Prefetch: what is read, what is left alone, and what the page cache says of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from smr.images import pagecache, prefetch
from smr.images.image import Image
from smr.images.store import Store
from smr.proto.checkpoint import LayerType
from smr.proto.errors import Code, SmrError
from tests.store_support import commit

MIB = 1 << 20
PAGES = {"pages-1.img": os.urandom(9 * MIB + 5), "pages-2.img": os.urandom(100)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with one image of some pages."""
    store = Store(tmp_path / "store")
    commit(store, "llama", pages=PAGES)
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
    monkeypatch.setattr(prefetch, "available_bytes", lambda: 4 * MIB)
    result = prefetch.prefetch(image, share=0.5)
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
    ],
)
def test_available_memory_is_within_our_own_cgroup(tmp_path: Path, cgroup: str, file: str, limit: str, expected: int) -> None:
    """Page cache is charged to who reads: a limit of ours counts, on cgroup v1 and v2."""
    proc, cgroups = memory_files(tmp_path, cgroup)
    (cgroups / file).parent.mkdir(parents=True)
    (cgroups / file).write_text(limit)
    assert pagecache.available_bytes(proc, cgroups) == expected


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
