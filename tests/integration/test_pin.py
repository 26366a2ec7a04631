"""Pinned images: real locked memory, real processes, `kill -9`. No engine is needed; locking needs CAP_IPC_LOCK (root)."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from smr.images import pin as pinning
from smr.images.image import Image
from smr.images.pagecache import cached_bytes_of
from smr.images.pin import Pin, find_pin, pin, pins, unpin
from smr.images.store import Store
from smr.proto.checkpoint import LayerType
from smr.proto.errors import Code, SmrError
from tests.integration.command import eventually
from tests.store_support import commit, rewrite_blob

MIB = 1 << 20
SMR = [sys.executable, "-c", "import sys; from smr.shim.cli import main; main(sys.argv[1:])"]


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A state directory; what is pinned there is let go in the end."""
    path = tmp_path / "run"
    yield path
    for left in pins(path):
        unpin(path, left.digest)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with an image of 20 MiB."""
    store = Store(tmp_path / "store")
    commit(store, "llama", pages={"pages-1.img": os.urandom(20 * MIB)})
    return store


@pytest.fixture
def image(store: Store) -> Image:
    """The image, none of it in memory."""
    image = store.resolve("llama")
    drop(image)
    if cached(image):
        pytest.skip("this file system keeps files in memory (tmpfs)")
    return image


def drop(image: Image) -> None:
    """Ask the kernel to forget the image's bytes; locked ones it keeps."""
    for layer in image.layers:
        fd = os.open(layer.path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def cached(image: Image) -> int:
    """Bytes of the layers in memory."""
    return sum(cached_bytes_of(layer.path) for layer in image.layers)


def size(image: Image) -> int:
    """Bytes of the layers."""
    return sum(layer.size_bytes for layer in image.layers)


def locked_bytes(pid: int) -> int:
    """What a process has locked, to whole pages."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmLck"))
    return int(line.split()[1]) << 10


def ended(pid: int) -> bool:
    """Gone, or a zombie of this process, which is its parent here."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def smr(tmp_path: Path, *words: str, status: int = 0) -> str:
    """Standard output of the command, in a process of its own."""
    env = os.environ | {"SMR_STORE": str(tmp_path / "store"), "SMR_RUN": str(tmp_path / "run"), "SMR_CONFIG": "/dev/null"}
    done = subprocess.run([*SMR, *words], env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def test_pinned_image_is_not_evicted(run_dir: Path, store: Store, image: Image) -> None:
    """Until it is unpinned."""
    counts: list[int] = []
    made = pin(run_dir, store, image, progress=counts.append)
    assert sum(counts) == made.bytes == size(image)
    assert locked_bytes(made.pid) >= made.bytes
    drop(image)
    assert cached(image) == size(image)
    assert unpin(run_dir, image.digest) == made
    drop(image)
    assert cached(image) == 0
    assert (pins(run_dir), list((run_dir / "pins").iterdir())) == ([], [])


def test_pin_again_changes_nothing(run_dir: Path, store: Store, image: Image) -> None:
    """The same process holds it; unpinning twice is no error."""
    made = pin(run_dir, store, image)
    assert pin(run_dir, store, image) == made
    assert pins(run_dir) == [made]
    assert unpin(run_dir, image.digest) == made
    assert unpin(run_dir, image.digest) is None
    assert ended(made.pid)


def test_two_pins_at_once_are_one(tmp_path: Path, run_dir: Path, image: Image) -> None:
    """Both commands succeed, with the same pin."""
    env = os.environ | {"SMR_STORE": str(tmp_path / "store"), "SMR_RUN": str(run_dir), "SMR_CONFIG": "/dev/null"}
    argv = [*SMR, "pin", "llama", "--json"]
    both = [subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [json.loads(process.communicate(timeout=60)[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert answers[0] == answers[1]
    assert [found.pid for found in pins(run_dir)] == [answers[0]["pid"]]


def test_killed_pinner_leaves_nothing(run_dir: Path, store: Store, image: Image) -> None:
    """Memory, lease and pin are gone with it, and a new pin can be made."""
    made = pin(run_dir, store, image)
    os.kill(made.pid, signal.SIGKILL)
    eventually(lambda: ended(made.pid))
    assert (pins(run_dir), find_pin(run_dir, image.digest)) == ([], None)
    assert list((run_dir / "pins").iterdir()) == []
    drop(image)
    assert cached(image) == 0
    assert pin(run_dir, store, image).pid != made.pid
    unpin(run_dir, image.digest)
    store.remove("llama")


def test_pinner_is_alone_and_the_first_to_go(run_dir: Path, store: Store, image: Image) -> None:
    """No session, terminal, folder or open output of its starter; the kernel ends it before a container."""
    made = pin(run_dir, store, image)
    proc = Path(f"/proc/{made.pid}")
    assert os.getsid(made.pid) == made.pid
    assert os.readlink(proc / "cwd") == "/"
    eventually(lambda: {os.readlink(proc / f"fd/{number}") for number in (0, 1, 2)} == {"/dev/null"})
    assert (proc / "oom_score_adj").read_text() == "1000\n"


def test_pinned_image_is_not_removed(tmp_path: Path, run_dir: Path, store: Store, image: Image) -> None:
    """`rm` says what to do; forced, it ends the pin, and memory and disk are given back."""
    made = pin(run_dir, store, image)
    assert "smr unpin llama:latest" in smr(tmp_path, "images", "rm", "llama", status=6)
    assert pins(run_dir) == [made]
    smr(tmp_path, "images", "rm", "--force", "llama")
    assert ended(made.pid)
    assert not any(layer.path.exists() for layer in image.layers)


def test_replaced_image_is_unpinned_by_its_digest(tmp_path: Path, run_dir: Path, store: Store, image: Image) -> None:
    """Its name is another image's now; the pin keeps its blobs until it ends."""
    made = pin(run_dir, store, image)
    newer = commit(store, "llama", pages={"pages-1.img": b"new" * 5000})
    store.gc()
    assert image.layers_of(LayerType.PAGES)[0].path.exists()
    found = json.loads(smr(tmp_path, "images", "ls", "--json"))
    assert [(entry["digest"], entry["pinned"]) for entry in found] == [(newer.digest, False)]
    assert made.digest[7:19] in smr(tmp_path, "pin", "--list")
    assert "unpinned" in smr(tmp_path, "unpin", made.digest)
    assert (pins(run_dir), ended(made.pid)) == ([], True)


def test_command_pins_lists_and_unpins(tmp_path: Path, run_dir: Path, image: Image) -> None:
    """`smr pin`, `pin --list`, `images ls` and `unpin`; as JSON too."""
    made = json.loads(smr(tmp_path, "pin", "llama", "--json"))
    assert (made["reference"], made["digest"], made["bytes"]) == ("llama:latest", image.digest, size(image))
    assert json.loads(smr(tmp_path, "pin", "--list", "--json")) == [made]
    assert "pinned" in smr(tmp_path, "images", "ls").splitlines()[1].split()
    (listed,) = json.loads(smr(tmp_path, "images", "ls", "--json"))
    assert (listed["pinned"], listed["cached_share"]) == (True, 1.0)
    assert json.loads(smr(tmp_path, "unpin", "llama", "--json")) == {
        "digest": image.digest,
        "unpinned": True,
        "bytes": size(image),
    }
    assert "was not pinned" in smr(tmp_path, "unpin", "llama")
    assert json.loads(smr(tmp_path, "pin", "--list", "--json")) == []
    assert "IMAGE or --list" in smr(tmp_path, "pin", status=2)


def test_pin_takes_no_more_than_its_share(run_dir: Path, store: Store, image: Image) -> None:
    """It would be taken from everything else on the node."""
    with pytest.raises(SmrError, match="may not be pinned") as caught:
        pin(run_dir, store, image, share=1e-6)
    assert caught.value.code is Code.MEMORY_LIMIT
    assert pins(run_dir) == []
    assert cached(image) < size(image)


def test_damaged_image_is_not_pinned(run_dir: Path, store: Store, image: Image) -> None:
    """The error of the process that should have held it comes to the caller."""
    rewrite_blob(image.layers_of(LayerType.PAGES)[0].path, b"x" * (20 * MIB))
    with pytest.raises(SmrError, match="damaged") as caught:
        pin(run_dir, store, image)
    assert caught.value.code is Code.IMAGE_CORRUPT
    assert pins(run_dir) == []


def test_pinner_that_dies_while_it_reads(run_dir: Path, store: Store, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller hears of it instead of waiting."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SmrError, match="ended without a word"):
        pin(run_dir, store, image)


def test_pid_of_another_process_is_not_killed(run_dir: Path, image: Image) -> None:
    """A file that nobody has locked is no pin, whatever it says."""
    with subprocess.Popen(["sleep", "60"]) as bystander:
        (run_dir / "pins").mkdir(parents=True)
        stale = Pin(reference="llama:latest", digest=image.digest, store="/s", bytes=1, pid=bystander.pid)
        text = json.dumps({name: getattr(stale, name) for name in ("reference", "digest", "store", "bytes", "pid")})
        pinning._file(run_dir, image.digest).write_text(text)
        assert unpin(run_dir, image.digest) is None
        assert bystander.poll() is None
        bystander.kill()


def test_without_the_right_to_lock_memory(store: Store, image: Image) -> None:
    """The error says what is missing; 20 MiB are more than RLIMIT_MEMLOCK lets anyone have."""
    code = f"""
import ctypes, resource
from pathlib import Path
from smr.images.pin import _lock
from smr.proto.errors import SmrError
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
libc = ctypes.CDLL(None, use_errno=True)
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capset(header, data) == 0
try:
    _lock(Path({str(image.layers_of(LayerType.PAGES)[0].path)!r}))
except SmrError as error:
    print(error.code, error.hint)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("permission run as root"), done.stderr


def test_locked_memory_is_not_available(run_dir: Path, store: Store, image: Image) -> None:
    """The kernel keeps locked pages apart, so what asks for available memory does not count on them."""
    before = unevictable()
    made = pin(run_dir, store, image)
    assert unevictable() - before >= made.bytes - 4 * mmap.PAGESIZE * len(image.layers)


def unevictable() -> int:
    """Bytes that the kernel may not reclaim."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("Mlocked:"))
    return int(line.split()[1]) << 10
