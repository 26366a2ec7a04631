"""Layers against the kernel's own overlayfs: what a container changed arrives in another, and can be taken back exactly."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from smr.images.layer import apply_layer, diff_overlay, pack_tree, undo_from, unpack_tree
from smr.images.undo import Layers
from smr.proto.oci import parse_spec
from smr.shim.rootfs import Root, overlay_of

pytestmark = pytest.mark.engine

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service=ep


class Overlay:
    """One mounted overlay: `lower` is shared, `upper` its own, `merged` what a container sees."""

    def __init__(self, base: Path, lowers: list[Path], options: str = "") -> None:
        self.base = base
        self.lowers = lowers
        self.upper, self.merged = base / "upper", base / "merged"
        for path in (self.upper, base / "work", self.merged):
            path.mkdir(parents=True)
        data = f"lowerdir={':'.join(map(str, lowers))},upperdir={self.upper},workdir={base / 'work'}{options}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", data, str(self.merged)], check=True)

    def close(self) -> None:
        subprocess.run(["umount", str(self.merged)], check=True)


Make = Callable[..., Overlay]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that can be an overlay's upper and hold every attribute: tmpfs, since the test's own may be an overlay."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512m", "smr-test", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def make(disk: Path) -> Iterator[Make]:
    """Mount overlays that are unmounted at the end."""
    made: list[Overlay] = []

    def _make(name: str, options: str = "", lowers: list[Path] | None = None) -> Overlay:
        try:
            overlay = Overlay(disk / name, lowers or [disk / "top", disk / "bottom"], options)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this kernel does not mount an overlay here: {error}")
        made.append(overlay)
        return overlay

    populate(disk / "bottom", disk / "top")
    yield _make
    for overlay in made:
        overlay.close()


def populate(bottom: Path, top: Path) -> None:
    """Two lower layers: a small root, and one above that replaces and hides parts of it."""
    for directory in ("etc/conf.d", "usr/bin", "var/cache/deep/er", "srv/data", "opt/app/lib"):
        (bottom / directory).mkdir(parents=True)
    for name, text in {
        "etc/passwd": "root:x:0:0",
        "etc/conf.d/a": "a",
        "etc/conf.d/b": "b",
        "usr/bin/tool": "#!/bin/sh",
        "var/cache/deep/er/file": "cached",
        "srv/data/one": "1",
        "opt/app/lib/code.py": "print()",
    }.items():
        (bottom / name).write_text(text)
    os.link(bottom / "usr/bin/tool", bottom / "usr/bin/tool-linked")
    (bottom / "opt/app/current").symlink_to("lib")
    os.mkfifo(bottom / "srv/data/pipe")
    os.setxattr(bottom / "usr/bin/tool", "security.capability", CAPABILITY)
    os.utime(bottom / "etc", ns=(10**18 + 7, 10**18 + 7))
    (top / "etc/conf.d").mkdir(parents=True)
    (top / "etc/conf.d/b").write_text("b of the top")


def change(root: Path) -> None:
    """What a busy container does to its root, seen from inside."""
    (root / "etc/passwd").write_text("root:x:0:0\napp:x:1000:1000")
    (root / "etc/conf.d/a").unlink()
    for path in ("var/cache", "opt/app"):
        subprocess.run(["rm", "-rf", str(root / path)], check=True)
    (root / "var/cache").mkdir(mode=0o750)
    os.chown(root / "var/cache", 33, 33)
    (root / "var/cache/new").write_text("after the directory was made again")
    (root / "opt/app").write_text("a file where a directory was")
    (root / "srv/data/one").unlink()
    (root / "srv/data/one").mkdir()
    (root / "srv/data/one/now-a-directory").write_bytes(os.urandom(100_000))
    long = root / "srv" / ("d" * 120) / ("e" * 120)
    long.mkdir(parents=True)
    (long / "näme with ünicode").write_text("x")
    Path(os.fsdecode(os.fsencode(long) + b"/not-utf8-\xff\xfe")).write_bytes(b"raw")
    os.link(long / "näme with ünicode", root / "srv/hard")
    (root / "srv/link").symlink_to("/etc/../../etc/" + "x" * 150)
    os.mkfifo(root / "srv/fifo", 0o620)
    (root / "srv/server").write_text("program")
    os.chown(root / "srv/server", 1000, 3_000_000_000)
    (root / "srv/server").chmod(0o6755)
    os.setxattr(root / "srv/server", "security.capability", CAPABILITY)
    os.setxattr(root / "srv/server", "user.note", b"\x00\xff=\n1")
    with (root / "srv/sparse").open("wb") as sparse:
        sparse.seek(8 << 20)
        sparse.write(b"middle")
        sparse.truncate(1 << 30)
    (root / "srv/all-hole").touch()
    os.truncate(root / "srv/all-hole", 1 << 30)
    (root / "usr/bin").chmod(0o711)
    os.utime(root / "srv/server", ns=(1, 1_234_567_890_123_456_789))


def view(root: Path) -> dict[str, object]:
    """All that can be seen of a tree: types, content, owners, modes, attributes, times, holes and who is whose hard link."""
    seen: dict[str, object] = {}
    inodes: dict[tuple[int, int], list[str]] = {}
    for base, directories, files in os.walk(root):
        for name in [".", *directories, *files] if base == str(root) else [*directories, *files]:
            path = os.path.join(base, name)
            status = os.lstat(path)
            attributes = {key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)}
            attributes = {key: value for key, value in attributes.items() if not key.startswith("trusted.overlay.")}
            content: object = None
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                content = (status.st_size, hashlib.sha256(Path(path).read_bytes()).hexdigest())
                if status.st_nlink > 1:
                    inodes.setdefault((status.st_dev, status.st_ino), []).append(os.path.relpath(path, root))
            seen[os.path.relpath(path, root)] = (
                status.st_mode,
                status.st_uid,
                status.st_gid,
                status.st_mtime_ns,
                attributes,
                content,
            )
    seen["hard links"] = sorted(sorted(names) for names in inodes.values() if len(names) > 1)
    return seen


def test_a_changed_root_arrives_as_it_was(make: Make, disk: Path) -> None:
    """Whiteouts, opaque directories, links, attributes, capabilities, holes, fifos: the second merged view equals the first."""
    first, second = make("first"), make("second")
    change(first.merged)
    stats = diff_overlay(first.upper, first.lowers, disk / "layer.tar", exclude=())
    assert stats.whiteouts and stats.opaque and stats.fifos and stats.links
    assert (disk / "layer.tar").stat().st_size < 1 << 20, "holes must not be written out"
    apply_layer(disk / "layer.tar", second.merged, disk / "undo").commit()
    assert view(second.merged) == view(first.merged)
    assert (second.merged / "srv/sparse").stat().st_blocks * 512 < 1 << 20
    assert not (disk / "undo").exists()


def test_undo_puts_everything_back(make: Make, disk: Path) -> None:
    """After an undo the root is what it was, and nothing of the journal is left."""
    first, second = make("first"), make("second")
    (second.merged / "etc/own").write_text("of the second container")
    before = view(second.merged)
    change(first.merged)
    diff_overlay(first.upper, first.lowers, disk / "layer.tar", exclude=())
    applied = apply_layer(disk / "layer.tar", second.merged, disk / "undo")
    assert view(second.merged) != before
    applied.undo()
    assert view(second.merged) == before
    assert not (disk / "undo").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from smr.images import layer, tarsafe, undo
left = int(sys.argv[4])
def count(module, name):
    real = getattr(module, name)
    def counted(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(module, name, counted)
for name in ("open", "mkdir", "unlink", "symlink", "link", "mkfifo", "utime", "write", "sendfile", "fchown", "setxattr", "rmdir"):
    count(os, name)
if sys.argv[5] == "apply":
    layers = undo.Layers(upper=Path(sys.argv[6]), lowers=tuple(map(Path, sys.argv[7:]))) if sys.argv[6:] else None
    layer.apply_layer(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), layers=layers)
else:
    layer.undo_from(Path(sys.argv[3]), Path(sys.argv[2]))
"""


def killed(verb: str, step: int, layer: Path, root: Path, undo: Path, *layers: Path) -> bool:
    """Run `verb` in a process that is killed before its system call number `step`; whether it was killed."""
    command = [sys.executable, "-c", KILLED, str(layer), str(root), str(undo), str(step), verb, *map(str, layers)]
    code = subprocess.run(command, check=False).returncode
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.slow
@pytest.mark.parametrize("saves", ["everything", "the upper directory"])
def test_kill_at_any_instant_can_be_undone(make: Make, disk: Path, saves: str) -> None:
    """kill -9 before any system call of an application, and of its undo: undoing then gives the root of before."""
    first, second = make("first"), make("second")
    change(first.merged)
    diff_overlay(first.upper, first.lowers, disk / "layer.tar", exclude=())
    before = view(second.merged)
    layers = () if saves == "everything" else (second.upper, *second.lowers)
    step, runs = 1 if layers else 4, 0
    while killed("apply", step, disk / "layer.tar", second.merged, disk / "undo", *layers):
        if (disk / "undo").exists():
            killed("undo", 3 + step % 40, disk / "layer.tar", second.merged, disk / "undo")
        undo_from(disk / "undo", second.merged)
        assert view(second.merged) == before, f"killed before call {step}"
        step, runs = step + 17, runs + 1
    assert runs > 10
    undo_from(disk / "undo", second.merged)
    assert view(second.merged) == before


def test_excluded_mount_points_are_left_out(make: Make, disk: Path) -> None:
    """Files that the engine puts into the root for its mounts are not carried over, nor what lies below a directory of them."""
    first, second = make("first"), make("second")
    (first.merged / "etc/hosts").touch()
    (first.merged / "proc").mkdir()
    (first.merged / "proc/inside").touch()
    (first.merged / "kept").touch()
    stats = diff_overlay(first.upper, first.lowers, disk / "layer.tar", exclude=["/etc/hosts", "/proc"])
    apply_layer(disk / "layer.tar", second.merged, disk / "undo").commit()
    assert stats.excluded == 2
    assert (second.merged / "kept").exists()
    assert not (second.merged / "etc/hosts").exists()
    assert not (second.merged / "proc").exists()


def test_an_unsafe_layer_leaves_the_root_alone(make: Make, disk: Path) -> None:
    """A layer that turns out to be unsafe half-way through is taken back before the error is raised."""
    from smr.images.tar import Entry, Kind, TarWriter
    from smr.proto.errors import Code, SmrError

    root = make("first").merged
    before = view(root)
    fd = os.open(disk / "evil.tar", os.O_WRONLY | os.O_CREAT)
    with TarWriter(fd) as writer:
        writer.add_bytes(Entry(name="etc/passwd", kind=Kind.FILE, size=4), b"evil")
        writer.add(Entry(name="opt/app/.wh.lib", kind=Kind.FILE))
        writer.add(Entry(name="etc/null", kind=Kind.CHAR, device=(1, 3)))
    os.close(fd)
    with pytest.raises(SmrError) as caught:
        apply_layer(disk / "evil.tar", root, disk / "undo")
    assert caught.value.code is Code.ARCHIVE_UNSAFE
    assert view(root) == before


@pytest.mark.parametrize("options", [",redirect_dir=on", ",redirect_dir=on,metacopy=on", ",metacopy=off,redirect_dir=off"])
def test_renamed_directories_and_metadata_copies(make: Make, disk: Path, options: str) -> None:
    """With redirect_dir and metacopy the upper refers to content of lower layers: that is carried, not the reference."""
    first, second = make("first", options), make("second")
    subprocess.run(["mv", str(first.merged / "var/cache/deep"), str(first.merged / "srv/moved")], check=True)
    subprocess.run(["mv", str(first.merged / "etc"), str(first.merged / "configuration")], check=True)
    (first.merged / "configuration/conf.d/a").unlink()
    (first.merged / "configuration/conf.d/new").write_text("new")
    (first.merged / "configuration/passwd").chmod(0o600)
    os.chown(first.merged / "opt/app/lib/code.py", 5, 5)
    diff_overlay(first.upper, first.lowers, disk / "layer.tar", exclude=())
    apply_layer(disk / "layer.tar", second.merged, disk / "undo").commit()
    assert view(second.merged) == view(first.merged)


def test_whiteouts_in_attributes(make: Make, disk: Path) -> None:
    """The attribute form of a whiteout (kernel 6.7, in images made for nested overlays) removes the file like a device 0:0."""
    first, second = make("first"), make("second")
    first.close = lambda: None  # type: ignore[method-assign]
    subprocess.run(["umount", str(first.merged)], check=True)
    (first.upper / "srv/data").mkdir(parents=True)
    os.setxattr(first.upper / "srv/data", "trusted.overlay.opaque", b"x")
    (first.upper / "srv/data/one").touch()
    os.setxattr(first.upper / "srv/data/one", "trusted.overlay.whiteout", b"y")
    stats = diff_overlay(first.upper, first.lowers, disk / "layer.tar", exclude=())
    apply_layer(disk / "layer.tar", second.merged, disk / "undo").commit()
    assert stats.whiteouts == 1
    assert sorted(path.name for path in (second.merged / "srv/data").iterdir()) == ["pipe"]


def test_tmpfs_contents_come_back(disk: Path) -> None:
    """/dev/shm's content: files with their owner and times, directories, and names that a layer would take for whiteouts."""
    shm, back = disk / "shm", disk / "back"
    shm.mkdir(mode=0o1777)
    shm.chmod(0o1777)
    back.mkdir()
    (shm / "sem.x").write_bytes(b"\0" * 32)
    (shm / ".wh.file").write_text("a plain name here")
    (shm / "sub").mkdir()
    os.chown(shm / "sem.x", 1000, 1000)
    (shm / "gone").touch()
    pack_tree(shm, disk / "shm.tar")
    unpack_tree(disk / "shm.tar", back)
    assert view(back) == view(shm)


def layers_of(overlay: Overlay) -> Layers:
    """What a journal may rely on."""
    return Layers(upper=overlay.upper, lowers=tuple(overlay.lowers))


def test_what_lower_layers_have_is_not_saved(make: Make, disk: Path) -> None:
    """An undo takes it from there: the journal stays small however much a layer removes, and the root is what it was."""
    (disk / "bottom/opt/app/lib/large").write_bytes(os.urandom(4 << 20))
    os.link(disk / "bottom/opt/app/lib/large", disk / "bottom/opt/app/linked")
    with (disk / "bottom/opt/app/holes").open("wb") as sparse:
        sparse.truncate(64 << 20)
    first, second = make("first"), make("second")
    (second.merged / "var/cache/own").write_bytes(os.urandom(1 << 20))  # below a directory that the layer replaces
    before = view(second.merged)
    change(first.merged)
    diff_overlay(first.upper, first.lowers, disk / "layer.tar", exclude=())
    apply_layer(disk / "layer.tar", second.merged, disk / "undo", layers=layers_of(second))
    assert sum(file.stat().st_size for file in (disk / "undo").iterdir()) < 3 << 20
    undo_from(disk / "undo", second.merged)
    assert view(second.merged) == before
    assert (second.merged / "opt/app/holes").stat().st_blocks == 0


def test_a_copy_of_a_copy(make: Make, disk: Path) -> None:
    """A metadata-only copy in a lower layer, as engines make for user namespaces, is no content: that is further below."""
    middle = make("middle", ",redirect_dir=on,metacopy=on")
    os.chown(middle.merged / "opt/app/lib/code.py", 5, 5)
    os.chown(middle.merged / "etc/passwd", 5, 5)
    middle.close()
    middle.close = lambda: None  # type: ignore[method-assign]
    lowers = [middle.upper, disk / "top", disk / "bottom"]
    first = make("first", ",redirect_dir=on,metacopy=on", lowers=lowers)
    second = make("second", ",redirect_dir=on,metacopy=on", lowers=lowers)
    os.chown(first.merged / "opt/app/lib/code.py", 6, 6)
    before = view(second.merged)
    diff_overlay(first.upper, first.lowers, disk / "layer.tar", exclude=())
    apply_layer(disk / "layer.tar", second.merged, disk / "undo", layers=layers_of(second))
    assert view(second.merged)["opt/app/lib/code.py"] == view(first.merged)["opt/app/lib/code.py"]
    undo_from(disk / "undo", second.merged)
    assert view(second.merged) == before


def test_what_is_written_and_not_yet_closed_on_fuse(disk: Path) -> None:
    """The kernel keeps what was written through FUSE until it is told: a layer has it all the same, and named marks count."""
    program = shutil.which("fuse-overlayfs")
    if program is None or not Path("/dev/fuse").exists():
        pytest.skip("no fuse-overlayfs, or no /dev/fuse")
    for name in ("lower/old", "upper", "work", "merged"):
        (disk / name).mkdir(parents=True)
    (disk / "lower/gone").touch()
    (disk / "lower/old/inside").touch()
    (disk / "upper/.wh.gone").touch()  # as it marks removed files where it may not make devices
    options = f"lowerdir={disk}/lower,upperdir={disk}/upper,workdir={disk}/work"
    subprocess.run([program, disk / "merged", f"-o{options}"], check=True, stderr=subprocess.DEVNULL)
    try:
        overlay = overlay_of(disk / "merged")
        assert overlay is not None
        assert (overlay.upper, overlay.lowers, overlay.fuse) == (disk / "upper", (disk / "lower",), True)
        subprocess.run(["rm", "-r", disk / "merged/old"], check=True)
        (disk / "merged/old").mkdir()
        with (disk / "merged/open").open("wb", buffering=0) as file:
            file.write(b"not closed")
            Root(path=disk / "merged", overlay=overlay).capture(disk / "layer.tar", parse_spec({}))
    finally:
        subprocess.run(["umount", disk / "merged"], check=True)
    target = disk / "target"
    subprocess.run(["cp", "-a", disk / "lower", target], check=True)
    apply_layer(disk / "layer.tar", target, disk / "undo").commit()
    assert sorted(path.name for path in target.rglob("*")) == ["old", "open"]
    assert (target / "open").read_bytes() == b"not closed"
