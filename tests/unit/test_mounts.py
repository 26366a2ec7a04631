"""Mounts as the kernel lists them: mountinfo, and the overlay behind a container's root."""

from __future__ import annotations

from pathlib import Path

import pytest

from smr.shim.mountinfo import MountEntry, entries, unescape
from smr.shim.rootfs import OverlayMount, overlay_of

# Linux 6.18: mount -t overlay -o 'lowerdir=l\,1:l\:2:l 3:l=4,upperdir=/o/u\,p,workdir=w'
ESCAPED = (
    r"275 263 0:101 / /o/m rw,relatime - overlay overlay "
    r"rw,lowerdir=/o/l\134\0541:/o/l\134:2:/o/l\0403:/o/l=4,upperdir=/o/u\134\054p,workdir=/o/w,uuid=on"
)


def test_fields_of_a_line() -> None:
    """Point, type and options, with any number of optional fields before the dash."""
    text = (
        "22 1 0:20 / /proc rw,nosuid shared:12 master:3 - proc proc rw\n"
        "36 35 98:0 /mnt1 /mnt2 rw,noatime - ext3 /dev/root rw,errors=continue\n"
        "40 35 0:5 / /none rw -  tmpfs  rw,size=1k\n".replace("-  tmpfs  ", "- tmpfs  ")
    )
    assert entries(text) == [
        MountEntry(point="/proc", type="proc", options="rw"),
        MountEntry(point="/mnt2", type="ext3", options="rw,errors=continue"),
        MountEntry(point="/none", type="tmpfs", options="rw,size=1k"),
    ]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (r"/a\040b", "/a b"),
        (r"/a\011b\012c", "/a\tb\nc"),
        (r"/a\134b", r"/a\b"),
        (r"/a\134040b", r"/a\040b"),
        ("/plain", "/plain"),
        (r"/\303\251", "/é"),
        (r"/\377", "/\udcff"),
    ],
)
def test_octal_escapes(text: str, path: str) -> None:
    """Each escape once, bytes that are no UTF-8 included."""
    assert unescape(text) == path


def test_point_with_a_dash_and_odd_line_ends() -> None:
    """What looks like a separator in a name is escaped, and only a newline ends a line."""
    text = "1 0 0:1 / /a\\040-\\040b\x1c\u2028c rw - tmpfs t rw\n"
    assert [entry.point for entry in entries(text)] == ["/a - b\x1c\u2028c"]


def test_own_mounts_can_be_read() -> None:
    """This machine's list has its root."""
    assert "/" in [entry.point for entry in entries()]


def test_overlay_of_podman() -> None:
    """Upper directory, and lower ones from the highest to the lowest."""
    text = (
        "1 0 0:1 / /s/overlay/id/merged rw - overlay overlay "
        "rw,lowerdir=/s/overlay/l/A:/s/overlay/l/B,upperdir=/s/overlay/id/diff,workdir=/s/overlay/id/work,volatile\n"
    )
    assert overlay_of(Path("/s/overlay/id/merged"), text) == OverlayMount(
        upper=Path("/s/overlay/id/diff"), lowers=(Path("/s/overlay/l/A"), Path("/s/overlay/l/B"))
    )


def test_overlay_with_escaped_names() -> None:
    """Comma, colon, space and equals sign in names, as the kernel prints them."""
    found = overlay_of(Path("/o/m"), ESCAPED)
    assert found is not None
    assert found.upper == Path("/o/u,p")
    assert found.lowers == (Path("/o/l,1"), Path("/o/l:2"), Path("/o/l 3"), Path("/o/l=4"))


def test_overlay_with_backslashes() -> None:
    """A backslash of a name, also one before the colon that separates two."""
    text = r"1 0 0:1 / /m rw - overlay overlay rw,lowerdir=/b\134\134s:/c\134\134:/d,upperdir=/u"
    found = overlay_of(Path("/m"), text)
    assert found is not None
    assert found.lowers == (Path(r"/b\s"), Path("/c\\"), Path("/d"))


def test_overlay_with_one_option_a_layer() -> None:
    """Linux 6.8 and mounts made by fsconfig: lowerdir+, where a colon is a colon."""
    text = "1 0 0:1 / /m rw - overlay overlay rw,lowerdir+=/a:1,lowerdir+=/b,datadir+=/d,upperdir=/u,workdir=/w"
    found = overlay_of(Path("/m"), text)
    assert found is not None
    assert found.lowers == (Path("/a:1"), Path("/b"))


def test_relative_lower_directories(tmp_path: Path) -> None:
    """containers/storage mounts from its own folder: the nearest above the upper one that has them."""
    (tmp_path / "overlay/l/A").mkdir(parents=True)
    (tmp_path / "overlay/id/diff").mkdir(parents=True)
    text = f"1 0 0:1 / /m rw - overlay overlay rw,lowerdir=l/A:l/gone,upperdir={tmp_path}/overlay/id/diff,workdir=/w"
    found = overlay_of(Path("/m"), text)
    assert found is not None
    assert found.lowers == (tmp_path / "overlay/l/A", Path("l/gone"))


def test_the_uppermost_mount_counts() -> None:
    """What is mounted over a root hides it."""
    first = "1 0 0:1 / /m rw - overlay overlay rw,lowerdir=/a,upperdir=/u1,workdir=/w\n"
    second = "2 1 0:2 / /m rw - overlay overlay rw,lowerdir=/a,upperdir=/u2,workdir=/w\n"
    assert overlay_of(Path("/m"), first + second) == OverlayMount(upper=Path("/u2"), lowers=(Path("/a"),))
    assert overlay_of(Path("/m"), first + "2 1 0:2 / /m rw - tmpfs t rw\n") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1 0 0:1 / /m rw - ext4 /dev/vda rw",
        "1 0 0:1 / /other rw - overlay o rw,upperdir=/u",
        "1 0 0:1 / /m ro - overlay o ro,lowerdir=/a:/b",
    ],
)
def test_roots_without_a_writable_layer(text: str) -> None:
    """No mount, no overlay, another's, or one without an upper directory."""
    assert overlay_of(Path("/m"), text) is None
