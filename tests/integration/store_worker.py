"""Programs that `test_store_crash` starts: makers and users of images, some of which kill themselves on the way.

python store_worker.py commit STORE NAME SEED KILL_AT    a commit; SIGKILL at the KILL_AT-th thing done to a file, 0 for never
python store_worker.py remove STORE NAME KILL_AT
python store_worker.py hold STORE                        an ingest with a file in it, until it is killed
python store_worker.py lease STORE NAME                  a lease, until it is killed
python store_worker.py churn STORE SEED                  commits, uses, removes and collects for a while, then says "ok"
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from smr.images.store import Store
from smr.proto.checkpoint import LayerType
from smr.proto.errors import Code, SmrError
from tests.store_support import commit, make_config

# What Python reports before it asks the kernel to touch a file; fsync and flock are among none of them, and change nothing.
_EVENTS = {
    "open",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.remove",
    "os.chmod",
    "os.truncate",
    "os.link",
    "os.symlink",
    "shutil.move",
}


def die_at(number: int, root: str) -> None:
    """SIGKILL ourselves just before the `number`-th use of a file of the store."""
    count = 0
    lock = threading.Lock()

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        path = arguments[0] if arguments else None
        if event not in _EVENTS or not (isinstance(path, int) or str(path).startswith(root)):
            return
        with lock:
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    if number:
        sys.addaudithook(watch)


def pages(seed: int) -> dict[str, bytes]:
    """Pages of which one is the same for all seeds, so that images share it."""
    return {"pages-1.img": b"shared" * 4000, "pages-2.img": random.Random(seed).randbytes(60_000)}


def churn(store: Store, seed: int) -> None:
    """What a busy node does to its store, in any order; only what may be refused is."""
    chance = random.Random(seed)
    for turn in range(25):
        name = f"image-{chance.randrange(3)}"
        try:
            chance.choice((make, make, use, remove, collect))(store, name, seed * 1000 + turn)
        except SmrError as error:
            if error.code not in {Code.IMAGE_NOT_FOUND, Code.IMAGE_IN_USE}:
                raise


def make(store: Store, name: str, seed: int) -> None:
    """A new image under an old name, or the same image twice."""
    commit(store, name, pages=pages(seed % 7), config=make_config(f"2025-01-01T00:00:{seed % 7:02}Z"))


def use(store: Store, name: str, _seed: int) -> None:
    """A restore: all of the image must be there and right for as long as it is leased."""
    with store.leased(name) as image:
        target = Path(tempfile.mkdtemp(dir=store.root.parent))
        try:
            image.materialize(target)
            assert (target / "pages-1.img").read_bytes() == b"shared" * 4000
            store.verify(image).check()
        finally:
            shutil.rmtree(target)


def remove(store: Store, name: str, _seed: int) -> None:
    """A removal."""
    store.remove(name)


def collect(store: Store, _name: str, _seed: int) -> None:
    """A collection."""
    store.gc()


def wait() -> None:
    """Say that we are there, and stay until we are killed."""
    print("ready", flush=True)
    signal.pause()


def main(what: str, root: str, *words: str) -> None:
    """Run one of the programs."""
    store = Store(Path(root))
    if what == "commit":
        die_at(int(words[2]), root)
        commit(store, words[0], pages=pages(int(words[1])), config=make_config(f"2025-01-01T00:00:{words[1]:0>2}Z"))
    elif what == "remove":
        die_at(int(words[1]), root)
        store.remove(words[0])
    elif what == "hold":
        with store.ingest() as ingest:
            (ingest.path / "x").write_bytes(bytes(1000))
            ingest.add(ingest.path / "x", LayerType.PAGES, title="pages-1.img")
            wait()
    elif what == "lease":
        with store.leased(words[0]):
            wait()
    elif what == "churn":
        churn(store, int(words[0]))
    print("ok")


if __name__ == "__main__":
    main(*sys.argv[1:])
