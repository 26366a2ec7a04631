"""Our tar against the standard library's, and against garbage."""

from __future__ import annotations

import io
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smr.images.tar import Entry, Kind, TarWriter, data_segments
from smr.images.tar_reader import FileStream, Limits, TarReader
from smr.proto.errors import Code, SmrError
from tests.tar_support import Item, directory, file, other, tar_bytes, write_tar

_names = st.lists(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=90), min_size=1, max_size=4
).map("/".join)
_xattrs = st.dictionaries(st.sampled_from(["user.a", "user.b=c"[:6], "security.capability"]), st.binary(max_size=40), max_size=2)
_entries = st.builds(
    Entry,
    name=_names.filter(lambda name: not name.endswith("/")),
    kind=st.just(Kind.FILE),
    mode=st.integers(0, 0o7777),
    uid=st.integers(0, 2**32 - 1),
    gid=st.integers(0, 2**32 - 1),
    mtime_ns=st.integers(-(2**62), 2**62),
    xattrs=_xattrs,
)
_quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(data: bytes, limits: Limits | None = None) -> list[Item]:
    """All entries of a tar with their content, read as a stream."""
    reader = TarReader(io.BytesIO(data), limits=limits)
    return [(entry, reader.read(entry, 1 << 20) if entry.kind is Kind.FILE else b"") for entry in reader]


@_quick
@given(entries=st.lists(st.tuples(_entries, st.binary(max_size=1500)), max_size=4))
def test_what_is_written_is_read(tmp_path: Path, entries: list[Item]) -> None:
    """Names, owners, times to the nanosecond, attributes and content come back, whatever they are."""
    items = [(replace(entry, size=len(content)), content) for entry, content in entries]
    assert read(tar_bytes(tmp_path, items)) == items


@_quick
@given(entries=st.lists(st.tuples(_entries, st.binary(max_size=1500)), max_size=3))
def test_tarfile_reads_what_is_written(tmp_path: Path, entries: list[Item]) -> None:
    """Python's tarfile sees the same members."""
    items = [(replace(entry, size=len(content), mtime_ns=entry.mtime_ns // 10**9 * 10**9), content) for entry, content in entries]
    with tarfile.open(fileobj=io.BytesIO(tar_bytes(tmp_path, items))) as tar:
        seen = [(m.name, m.mode, m.uid, m.gid, tar.extractfile(m).read()) for m in tar.getmembers()]  # type: ignore[union-attr]
    assert seen == [(e.name, e.mode, e.uid, e.gid, content) for e, content in items]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_tarfile_writes_is_read(form: int) -> None:
    """Files, links and devices of each format that other tools write are understood."""
    long = "d/" * 30 + "f" * 90 if form != tarfile.USTAR_FORMAT else "d/" * 30 + "f" * 60
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, kind, link in (
            (long, tarfile.REGTYPE, ""),
            ("dir", tarfile.DIRTYPE, ""),
            ("s", tarfile.SYMTYPE, "x" * 100),
            ("h", tarfile.LNKTYPE, "s"),
            ("null", tarfile.CHRTYPE, ""),
            ("fifo", tarfile.FIFOTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.devmajor, info.devminor = kind, link, 1, 3
            info.size, info.mtime = (5 if kind == tarfile.REGTYPE else 0), 1234567890
            tar.addfile(info, io.BytesIO(b"hello"))
    found = read(buffer.getvalue())
    assert [(entry.name.rstrip("/"), entry.kind, entry.link, content) for entry, content in found] == [
        (long, Kind.FILE, "", b"hello"),
        ("dir", Kind.DIRECTORY, "", b""),
        ("s", Kind.SYMLINK, "x" * 100, b""),
        ("h", Kind.HARDLINK, "s", b""),
        ("null", Kind.CHAR, "", b""),
        ("fifo", Kind.FIFO, "", b""),
    ]
    assert found[4][0].device == (1, 3)
    assert found[0][0].mtime_ns == 1234567890 * 10**9


def test_holes_stay_holes(tmp_path: Path) -> None:
    """A sparse file takes as much of the archive as it has data, and tarfile reads it as the same bytes."""
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as out:
        out.seek(5 << 20)
        out.write(b"data")
        out.truncate(64 << 20)
    archive = tmp_path / "a.tar"
    with sparse.open("rb") as content, archive.open("wb") as out, TarWriter(out.fileno()) as writer:
        segments = data_segments(content.fileno(), 64 << 20)
        if segments is None:
            pytest.skip("this file system has no holes")
        writer.add(Entry(name="sparse", kind=Kind.FILE, size=64 << 20, segments=segments), content.fileno())
    assert archive.stat().st_size < 1 << 20
    with tarfile.open(archive) as tar:
        assert tar.extractfile("sparse").read() == sparse.read_bytes()  # type: ignore[union-attr]
    back = tmp_path / "back"
    with archive.open("rb") as source, back.open("wb") as target:
        reader = TarReader(FileStream(source.fileno()))
        entry = next(iter(reader))
        reader.copy(entry, target.fileno())
    assert back.read_bytes() == sparse.read_bytes()
    assert back.stat().st_blocks == sparse.stat().st_blocks


def test_every_truncation_is_said(tmp_path: Path) -> None:
    """An archive that ends anywhere before its end mark is invalid, in a stream and in a file."""
    data = tar_bytes(tmp_path, [file("a", b"x" * 600, mtime_ns=5, xattrs={"user.a": b"1"}), directory("d/"), file("b", b"y")])
    for size in [*range(0, len(data) - 1024, 97), len(data) - 1024]:
        with pytest.raises(SmrError) as caught:
            read(data[:size])
        assert caught.value.code is Code.ARCHIVE_INVALID, size
        (tmp_path / "cut.tar").write_bytes(data[:size])
        with (tmp_path / "cut.tar").open("rb") as cut, pytest.raises(SmrError) as caught:
            list(TarReader(FileStream(cut.fileno())))
        assert caught.value.code is Code.ARCHIVE_INVALID, size


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 4000), value=st.integers(0, 255))
def test_garbage_is_an_error_of_ours_or_harmless(tmp_path: Path, position: int, value: int) -> None:
    """Any one altered byte gives an archive that can be read, or is refused: nothing else is raised."""
    segments = ((0, 100), (4096, 30))
    items = [file("n" * 120, b"x" * 700, xattrs={"user.a": b"1"}), other("s", Kind.SYMLINK, link="t")]
    items.append((replace(file("sparse")[0], size=10_000, segments=segments), b"z" * 130))
    data = bytearray(tar_bytes(tmp_path, items))
    data[position % len(data)] = value
    reader = TarReader(io.BytesIO(bytes(data)))
    try:
        for entry in reader:
            with open(os.devnull, "wb") as sink:
                if entry.kind is Kind.FILE:
                    while chunk := reader.read_some(4096):
                        sink.write(chunk)
    except SmrError as error:
        assert error.code in (Code.ARCHIVE_INVALID, Code.ARCHIVE_UNSAFE)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=3000))
def test_random_bytes_are_no_archive(data: bytes) -> None:
    """Bytes that are not a tar are refused, unless they begin with its end mark."""
    if any(data[:512]) or len(data) < 512:
        with pytest.raises(SmrError):
            read(data)


@pytest.mark.parametrize(
    ("limits", "items"),
    [
        (Limits(entries=2), [file("a"), file("b"), file("c")]),
        (Limits(bytes=100), [file("a", b"x" * 60), file("b", b"x" * 60)]),
        (Limits(file_bytes=100), [file("a", b"x" * 101)]),
        (Limits(name_bytes=10), [file("a" * 11)]),
        (Limits(header_bytes=1000), [file("a", xattrs={"user.a": b"x" * 2000})]),
    ],
)
def test_limits_are_kept(tmp_path: Path, limits: Limits, items: list[Item]) -> None:
    """Too many entries, bytes, a file, name or header too long: refused as unsafe."""
    with pytest.raises(SmrError) as caught:
        read(tar_bytes(tmp_path, items), limits)
    assert caught.value.code is Code.ARCHIVE_UNSAFE
    assert read(tar_bytes(tmp_path, items)) == items


def test_a_header_that_promises_gigabytes_allocates_nothing(tmp_path: Path) -> None:
    """An extended header of 4 GiB is refused by its size alone, before it is read."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 4 << 30
    with pytest.raises(SmrError) as caught:
        read(info.tobuf() + bytes(2048))
    assert caught.value.code is Code.ARCHIVE_UNSAFE


@pytest.mark.parametrize("sparse", [((10, 5), (0, 5)), ((0, 5), (3, 7)), ((0, 10), (9_999_999, 10))])
def test_sparse_maps_that_lie_are_refused(tmp_path: Path, sparse: tuple[tuple[int, int], ...]) -> None:
    """Segments out of order, on top of each other, or after the file's end."""
    stored = sum(length for _, length in sparse)
    item = (replace(file("s")[0], size=1000, segments=sparse), b"x" * stored)
    with pytest.raises(SmrError) as caught:
        read(tar_bytes(tmp_path, [item]))
    assert caught.value.code is Code.ARCHIVE_INVALID


def test_a_header_that_was_altered_is_refused(tmp_path: Path) -> None:
    """A changed name that the header's check sum does not know of."""
    data = bytearray(tar_bytes(tmp_path, [file("name", b"x")]))
    data[0] ^= 1
    with pytest.raises(SmrError) as caught:
        read(bytes(data))
    assert caught.value.code is Code.ARCHIVE_INVALID


def test_an_unfinished_archive_is_truncated(tmp_path: Path) -> None:
    """A tar without its end mark counts as truncated, even when its last entry is whole."""
    path = write_tar(tmp_path / "a.tar", [file("a", b"x")], end=False)
    with pytest.raises(SmrError) as caught:
        read(path.read_bytes())
    assert caught.value.code is Code.ARCHIVE_INVALID
