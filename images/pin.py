"""Pinned images: their blobs are locked in memory, so that no other work of the node pushes them out of the page cache.

    RUN/pins/HEX     a pin: JSON {reference, digest, store, bytes, pid}; flocked by the process that holds the blobs

Locked memory needs a holder. A copy in a tmpfs would need none, but it would be a second copy beside the page cache that a
restore reads, and could not be checked as the store is. So a pin is a process of ours, one for each pinned image and none for the
others: `python -I -m smr.images.pin RUN STORE DIGEST SHARE REFERENCE`. It reads the image, maps its blobs, locks them (mlock) and
sleeps. It holds a lease of the image, so that no removal takes its blobs away, lives outside the cgroup and session that it was
started in, and is the first that the kernel ends when memory is short: a pin is no reason to end a container.

A pin ends by `unpin`, by kill -9, and with the machine. What is left then is a file that nobody has locked, which counts for
nothing and goes when somebody looks at the pins next. Locked memory is not among what is available, so prefetch, plans and other
restores count with what is left.

The program's standard output: the bytes dealt with, a number a line, then one line of JSON: the pin, or {"error": ..}.
Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from smr.images.files import try_lock
from smr.images.image import Image
from smr.images.pagecache import available_bytes
from smr.images.prefetch import SHARE, cache_room, prefetch
from smr.images.store import Store
from smr.proto.errors import Code, SmrError, exit_status

_END_S = 10.0
_POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """A pinned image and the process that holds it. `reference` is what it was called when it was pinned."""

    reference: str
    digest: str
    store: str
    bytes: int
    pid: int


def pins(run_dir: Path) -> list[Pin]:
    """What is pinned now."""
    return [pin for path in sorted(_folder(run_dir).glob("*")) if (pin := _living(path)) is not None]


def find_pin(run_dir: Path, digest: str) -> Pin | None:
    """The pin of an image."""
    return _living(_file(run_dir, digest))


def pin(
    run_dir: Path, store: Store, image: Image, *, share: float = SHARE, progress: Callable[[int], object] | None = None
) -> Pin:
    """Keep `image` in memory until `unpin`; returns when it is there. One that is pinned stays so.

    Raises MEMORY_LIMIT when it would take more than its share of what is available, PERMISSION where memory may not be locked,
    IMAGE_CORRUPT, IMAGE_NOT_FOUND.
    """
    if (found := find_pin(run_dir, image.digest)) is not None:
        return found
    argv = [
        sys.executable,
        "-I",
        "-m",
        "smr.images.pin",
        str(run_dir),
        str(store.root),
        image.digest,
        str(share),
        image.reference,
    ]
    null = subprocess.DEVNULL
    process = subprocess.Popen(argv, stdin=null, stdout=subprocess.PIPE, stderr=null, start_new_session=True, text=True)
    assert process.stdout is not None
    try:
        with process.stdout as output:
            answer = _answer(output, progress)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if "error" not in answer:
        process.returncode = 0  # it lives on, and nobody waits for it
        return Pin(**answer)  # type: ignore[arg-type]  # as the program printed it
    process.wait()
    error = answer["error"]
    assert isinstance(error, dict)
    raise SmrError(error["message"], hint=error["hint"], code=Code(error["code"]), image=image.reference)


def unpin(run_dir: Path, digest: str) -> Pin | None:
    """End a pin, and wait for its end; None when there was none. Raises TIMEOUT when its process does not end."""
    found = find_pin(run_dir, digest)
    if found is None:
        return None
    with suppress(ProcessLookupError):
        handle = os.pidfd_open(found.pid)
        try:
            # The lock is its holder's for as long as that lives: still held, so the pid was not given to another meanwhile.
            if find_pin(run_dir, digest) == found:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                if not select.select([handle], [], [], _END_S)[0]:
                    raise SmrError(f"process {found.pid}, which pins {digest}, does not end", code=Code.TIMEOUT)
        finally:
            os.close(handle)
    _living(_file(run_dir, digest))
    return found


def pinned_digest(run_dir: Path, store: Store, image: str) -> str:
    """The digest of `image`; one that was replaced or lost its name is still known to its pin. Raises IMAGE_NOT_FOUND."""
    try:
        return store.resolve(image).digest
    except SmrError as error:
        found = [pin.digest for pin in pins(run_dir) if image == pin.reference or pin.digest.startswith(image)]
        if error.code is not Code.IMAGE_NOT_FOUND or len(found) != 1:
            raise
        return found[0]


def _folder(run_dir: Path) -> Path:
    return run_dir / "pins"


def _file(run_dir: Path, digest: str) -> Path:
    return _folder(run_dir) / digest.removeprefix("sha256:")


def _living(path: Path) -> Pin | None:
    """The pin of a file whose holder lives and is done; the file of one that is dead is removed."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        if try_lock(fd):
            path.unlink(missing_ok=True)  # locked, so no new holder has it: that one looks whether its file is still there
            return None
        with open(fd, "rb", closefd=False) as file:
            return Pin(**json.loads(file.read() or b"null"))
    except (ValueError, TypeError):
        return None  # its holder is still reading
    finally:
        os.close(fd)


def _answer(output: Iterable[str], progress: Callable[[int], object] | None) -> dict[str, object]:
    for line in output:
        if line.startswith("{"):
            return dict(json.loads(line))
        if progress is not None:
            progress(int(line))
    message = "the process that should pin the image ended without a word"
    return {"error": {"message": message, "hint": "see 'journalctl -k' for an OOM kill", "code": Code.INTERNAL.value}}


# The program.


def main(argv: list[str]) -> int:
    """Pin an image and sleep. Ends by a signal, or at once with an error on standard output."""
    from smr.images.charge import leave_cgroup

    if len(argv) != 5:
        sys.stderr.write("usage: python -I -m smr.images.pin RUN STORE DIGEST SHARE REFERENCE\n")
        return exit_status(Code.USAGE)
    run_dir, root, digest, share, reference = argv
    leave_cgroup()
    os.chdir("/")
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    store = Store(Path(root))
    try:
        image = store.resolve(digest)
        with store.lease(image):
            hold(Path(run_dir), store, image, float(share), reference)
    except SmrError as error:
        _say(json.dumps({"error": error.as_json()}))
    return 1


def hold(run_dir: Path, store: Store, image: Image, share: float, reference: str) -> None:
    """Lock the image in memory, say so, and sleep for ever. Another process that pins it already is an answer too."""
    path = _file(run_dir, image.digest)
    fd = _take(path)
    if fd is None:
        _say(json.dumps(asdict(_wait_for(path, image))))
        return
    image.check()
    _check_room(image, share)
    prefetch(image, share=1.0, progress=lambda count: _say(str(count)))
    size_bytes = sum(_lock(layer) for layer in {layer.path for layer in image.layers})
    pinned = Pin(reference=reference, digest=image.digest, store=str(store.root), bytes=size_bytes, pid=os.getpid())
    os.pwrite(fd, json.dumps(asdict(pinned)).encode(), 0)
    _say(json.dumps(asdict(pinned)))
    _close_output()
    while True:
        signal.pause()


def _take(path: Path) -> int | None:
    """The pin's file, locked and empty; None when another process holds it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for _ in range(int(1 / _POLL_S)):
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        if try_lock(fd) and os.fstat(fd).st_nlink:
            os.ftruncate(fd, 0)
            return fd
        os.close(fd)
        time.sleep(_POLL_S)  # who looks at the pins has the lock of a dead one for a moment
    return None


def _wait_for(path: Path, image: Image) -> Pin:
    """Another process is at it."""
    while True:
        if (found := _living(path)) is not None:
            return found
        if not path.exists():
            raise SmrError(
                f"pinning {image.reference} was given up by another command", hint="try again", code=Code.CONTAINER_STATE
            )
        time.sleep(_POLL_S)


def _check_room(image: Image, share: float) -> None:
    """Page cache of the image counts as available, and would be taken by the pin like the rest."""
    available = available_bytes()
    room = cache_room(available, image.config.memory_bytes, share)
    if image.size_bytes > room:
        raise SmrError(
            f"image {image.reference} of {image.size_bytes} bytes may not be pinned: of {available} bytes of memory that are "
            f"available {room} may be taken",
            hint="'smr pin --list' shows what is pinned; raise cache_share in /etc/smr/smr.toml",
            code=Code.MEMORY_LIMIT,
        )


def _lock(path: Path) -> int:
    """Map a file and lock it for as long as this process lives; returns its size."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    fd = os.open(path, os.O_RDONLY)
    try:
        size_bytes = os.fstat(fd).st_size
        if not size_bytes:
            return 0
        address = libc.mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if address == ctypes.c_void_p(-1).value or libc.mlock(address, size_bytes) != 0:
            raise _not_locked(path, ctypes.get_errno())
        return size_bytes
    finally:
        os.close(fd)


def _not_locked(path: Path, number: int) -> SmrError:
    message = f"cannot lock {path} in memory: {os.strerror(number)}"
    # Both are what the kernel says to a process without CAP_IPC_LOCK that is over RLIMIT_MEMLOCK.
    if number in {errno.EPERM, errno.ENOMEM}:
        return SmrError(message, hint="run as root, with the capability CAP_IPC_LOCK", code=Code.PERMISSION)
    return SmrError(message, hint="'smr images verify' says what is damaged", code=Code.IMAGE_CORRUPT)


def _say(line: str) -> None:
    """In one piece, from any thread. Raises BrokenPipeError when nobody reads any more: then the pin is not wanted."""
    os.write(1, f"{line}\n".encode())


def _close_output() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.close(null)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
