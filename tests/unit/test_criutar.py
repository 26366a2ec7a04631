"""The tar of CRIU's images: what is packed comes back, and nothing else is ever unpacked."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smr.images.criutar import members, pack, pack_criu, unpack
from smr.proto.errors import Code, SmrError

Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, data: bytes = b"data", kind: bytes = tarfile.REGTYPE, **fields: object) -> Entry:
    """One entry of a tar."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def write_tar(path: Path, *entries: Entry, form: int = tarfile.GNU_FORMAT) -> Path:
    """A tar of these entries, as tarfile writes it."""
    with tarfile.open(path, "w", format=form) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data) if data else None)
    return path


def unpack_error(tar: Path, target: Path) -> SmrError:
    """What unpacking raises."""
    with pytest.raises(SmrError) as caught, tar.open("rb") as file:
        unpack(file, target)
    return caught.value


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """An empty directory with a file beside it that nobody may touch."""
    path = tmp_path / "in/target"
    path.mkdir(parents=True)
    return path


UNSAFE = {
    "parent": entry("../escaped"),
    "absolute": entry("/tmp/escaped"),
    "folder": entry("a/b"),
    "dot": entry("."),
    "dots": entry(".."),
    "no name": entry(""),
    "new line": entry("a\nb"),
    "directory": entry("dir", b"", tarfile.DIRTYPE),
    "symlink": entry("core-1.img", b"", tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": entry("core-1.img", b"", tarfile.LNKTYPE, linkname="/etc/passwd"),
    "character device": entry("null", b"", tarfile.CHRTYPE, devmajor=1, devminor=3),
    "block device": entry("sda", b"", tarfile.BLKTYPE, devmajor=8),
    "fifo": entry("fifo", b"", tarfile.FIFOTYPE),
    "contiguous": entry("file", b"x", tarfile.CONTTYPE),
    "sparse": entry("file", b"x" * 512, tarfile.GNUTYPE_SPARSE),
    "long name": entry("n" * 120),
}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("case", UNSAFE)
def test_unsafe_member_is_refused_and_writes_nothing_outside(tmp_path: Path, target: Path, case: str, form: int) -> None:
    """Whatever is not a plain file with a plain name is ARCHIVE_UNSAFE; only what came before it was written."""
    tar = write_tar(tmp_path / "x.tar", entry("inventory.img"), UNSAFE[case], form=form)
    error = unpack_error(tar, target)
    assert error.code is Code.ARCHIVE_UNSAFE
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {
        "x.tar",
        "in",
        "in/target",
        "in/target/inventory.img",
    }


def test_name_twice_is_refused(tmp_path: Path, target: Path) -> None:
    """The second of two equal names would overwrite the first."""
    assert unpack_error(write_tar(tmp_path / "x.tar", entry("a"), entry("a", b"other")), target).code is Code.ARCHIVE_UNSAFE
    assert (target / "a").read_bytes() == b"data"


def test_link_that_waits_in_the_target_is_not_followed(tmp_path: Path, target: Path) -> None:
    """Even in a directory that is not empty, no file outside it is written."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"whole")
    (target / "a").symlink_to(victim)
    assert unpack_error(write_tar(tmp_path / "x.tar", entry("a")), target).code is Code.ARCHIVE_UNSAFE
    assert victim.read_bytes() == b"whole"


@pytest.mark.parametrize(
    "headers", [{"path": "../x"}, {"size": "5"}, {"linkpath": "x"}, {"GNU.sparse.name": "x"}, {"SCHILY.x": "y"}]
)
def test_extended_header_that_changes_a_file_is_refused(tmp_path: Path, target: Path, headers: dict[str, str]) -> None:
    """A name or a size in an extended header would be another than the one that was checked."""
    tar = write_tar(tmp_path / "x.tar", entry("a", pax_headers=headers), form=tarfile.PAX_FORMAT)
    assert unpack_error(tar, target).code is Code.ARCHIVE_UNSAFE


def test_extended_header_of_times_is_fine(tmp_path: Path, target: Path) -> None:
    """tarfile writes one for a modification time with a fraction."""
    tar = write_tar(tmp_path / "x.tar", entry("a", mtime=1.5), form=tarfile.PAX_FORMAT)
    with tar.open("rb") as file:
        assert unpack(file, target) == ["a"]
    assert (target / "a").read_bytes() == b"data"


def test_huge_extended_header_is_refused_unread(tmp_path: Path, target: Path) -> None:
    """A header may not fill memory."""
    tar = write_tar(tmp_path / "x.tar", entry("a", pax_headers={"comment": "x" * (1 << 20)}), form=tarfile.PAX_FORMAT)
    assert unpack_error(tar, target).code is Code.ARCHIVE_INVALID


@pytest.mark.parametrize("record", [b"", b"x", b"99 mtime=1\n", b"3 \n", b"0 mtime=1\n", b"-5 mtime=1\n"])
def test_garbled_extended_header_is_refused(tmp_path: Path, target: Path, record: bytes) -> None:
    """Lengths that lie end the reading; an empty header says nothing and is harmless."""
    tar = write_tar(tmp_path / "x.tar", entry("h", record, b"x"), entry("a"))
    if record:
        assert unpack_error(tar, target).code is Code.ARCHIVE_INVALID
    else:
        with tar.open("rb") as file:
            assert [member.name for member in members(file)] == ["a"]


@pytest.mark.parametrize("keep", [0, 1, 511, 512, 700, 1024])
def test_cut_tar_is_refused(tmp_path: Path, target: Path, keep: int) -> None:
    """A tar without its end, wherever it was cut, is ARCHIVE_INVALID: a file may be missing."""
    tar = write_tar(tmp_path / "x.tar", entry("a", b"x" * 100), entry("b"))
    os.truncate(tar, keep)
    assert unpack_error(tar, target).code is Code.ARCHIVE_INVALID


@pytest.mark.parametrize("at", [0, 100, 124, 130, 148, 156, 345])
def test_garbled_header_is_refused(tmp_path: Path, target: Path, at: int) -> None:
    """One changed bit of a header is seen by its checksum."""
    tar = write_tar(tmp_path / "x.tar", entry("a"))
    data = bytearray(tar.read_bytes())
    data[at] ^= 1
    tar.write_bytes(data)
    assert unpack_error(tar, target).code is Code.ARCHIVE_INVALID


def test_pack_criu_leaves_pages_out_and_is_the_same_each_time(tmp_path: Path) -> None:
    """Pages are layers of their own; equal files give equal bytes, so that they are stored once."""
    folder = tmp_path / "criu"
    folder.mkdir()
    for name in ("pages-1.img", "pages-12.img", "pagemap-1.img", "core-1.img"):
        (folder / name).write_bytes(name.encode())
    pack_criu(folder, tmp_path / "1.tar")
    os.utime(folder / "core-1.img", (1, 1))
    pack_criu(folder, tmp_path / "2.tar")
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()
    with tarfile.open(tmp_path / "1.tar") as tar:
        assert tar.getnames() == ["core-1.img", "pagemap-1.img"]


def test_pack_takes_regular_files_only(tmp_path: Path) -> None:
    """A link or a directory among CRIU's images is not followed."""
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "dir").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "dir", "fifo"):
        with pytest.raises(SmrError) as caught:
            pack([tmp_path / name], tmp_path / "x.tar")
        assert caught.value.code is Code.ARCHIVE_UNSAFE


FILE_NAMES = st.text(st.sampled_from("abcXYZ019-_. "), min_size=1, max_size=100).filter(lambda name: name not in {".", ".."})


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(FILE_NAMES, st.binary(max_size=2000), max_size=8))
def test_what_is_packed_comes_back(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    """Names and bytes survive pack and unpack, and tarfile reads the same."""
    root = tmp_path_factory.mktemp("tar")
    source, target = root / "source", root / "target"
    source.mkdir()
    target.mkdir()
    for name, data in files.items():
        (source / name).write_bytes(data)
    pack(source.iterdir(), root / "x.tar")
    with (root / "x.tar").open("rb") as file:
        assert sorted(unpack(file, target)) == sorted(files)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == files
    with tarfile.open(root / "x.tar") as tar:
        assert sorted(tar.getnames()) == sorted(files)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=1600))
def test_any_bytes_are_refused_or_read_never_crash(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """Random bytes end in SmrError or in an empty list, not in another exception."""
    path = tmp_path_factory.mktemp("any") / "x.tar"
    path.write_bytes(data)
    with path.open("rb") as file:
        try:
            assert list(members(file)) == []
        except SmrError as error:
            assert error.code in {Code.ARCHIVE_INVALID, Code.ARCHIVE_UNSAFE}
