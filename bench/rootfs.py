"""What a container's changed files cost: `python -m bench.rootfs [--json] [--files N] [--gib N] [--runs N] [--cases LIST]`.

Roots are real: the kernel's overlay in --place, and copies of a base, as podman's vfs and containerd's native snapshotter make
them. The peers are measured in the same run: GNU tar with attributes packing the same directory and unpacking onto an overlay.

    small      N small files (4 KiB each, in directories of 100), new in the container
    base       an image of N files of which the container has changed 100 (overlay: the upper directory has only those)
    removed    a directory of N files of the image that the container has removed
    replaced   N files of the image that the container has written again
    dense      one file of --gib GiB
    sparse     one file of --gib GiB of which 64 MiB are data

Times are wall clock in seconds, medians of --runs: `diff_s` is in a checkpoint's pause, `apply_s` in a restore's way, `undo_s`
follows a restore that failed. `journal_bytes` is what an application keeps for its undo, in memory on most nodes.

    {"machine": {..}, "files": 20000, "gib": 4, "rows": [{"case": "small", "root": "overlay", "diff_s": .., "apply_s": ..,
     "undo_s": .., "tar_bytes": .., "journal_bytes": .., "tar_create_s": .., "tar_extract_s": ..}, ..]}
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.machine import describe
from smr.images.layer import apply_layer, diff_overlay, diff_tree, undo_from
from smr.images.undo import Layers

CASES = ("small", "base", "removed", "replaced", "dense", "sparse")
_DIRECTORY_FILES = 100
_DATA_BYTES = 64 << 20
Change = Callable[[Path], None]


class Overlay:
    """A mounted overlay with a new upper directory."""

    def __init__(self, place: Path, lower: Path) -> None:
        self.lower, self.upper, self.merged = lower, place / "upper", place / "merged"
        for folder in (self.upper, place / "work", self.merged):
            folder.mkdir(parents=True)
        options = f"lowerdir={lower},upperdir={self.upper},workdir={place / 'work'}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(self.merged)], check=True)

    def close(self) -> None:
        """Unmount."""
        subprocess.run(["umount", str(self.merged)], check=True)


def fill(folder: Path, files: int, size_bytes: int = 4096) -> None:
    """Small files in directories."""
    content = os.urandom(size_bytes)
    for number in range(files):
        directory = folder / f"d{number // _DIRECTORY_FILES}"
        if number % _DIRECTORY_FILES == 0:
            directory.mkdir(parents=True, exist_ok=True)
        (directory / f"f{number}").write_bytes(content)


def big(path: Path, size_bytes: int, *, sparse: bool) -> None:
    """One file, of data all over or with holes."""
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        if sparse:
            step = size_bytes // (_DATA_BYTES >> 20)
            for offset in range(0, size_bytes, step):
                file.seek(offset)
                file.write(block)
            file.truncate(size_bytes)
        else:
            for _ in range(size_bytes >> 20):
                file.write(block)


def cases(files: int, size_bytes: int) -> dict[str, tuple[Change, Change]]:
    """By name: what makes the image, and what the container does."""

    def nothing(_: Path) -> None: ...

    def some(root: Path) -> None:
        for number in range(0, files, max(1, files // 100)):
            (root / "srv" / f"d{number // _DIRECTORY_FILES}" / f"f{number}").write_text("changed")

    return {
        "small": (nothing, lambda root: fill(root / "srv", files)),
        "base": (lambda root: fill(root / "srv", files), some),
        "removed": (lambda root: fill(root / "srv", files), lambda root: shutil.rmtree(root / "srv")),
        "replaced": (lambda root: fill(root / "srv", files), lambda root: fill(root / "srv", files)),
        "dense": (nothing, lambda root: big(root / "file", size_bytes, sparse=False)),
        "sparse": (nothing, lambda root: big(root / "file", size_bytes, sparse=True)),
    }


def timed(action: Callable[[], object]) -> float:
    """Seconds."""
    start = time.monotonic()
    action()
    return time.monotonic() - start


def on_overlay(place: Path, image: Path, change: Change, journal: Path) -> dict[str, float]:
    """One run on overlays."""
    layer = place / "layer.tar"
    first, second, peer = (Overlay(place / name, image) for name in ("first", "second", "peer"))
    try:
        change(first.merged)
        settle(place)
        row = {"diff_s": timed(lambda: diff_overlay(first.upper, [image], layer, exclude=()))}
        row |= applied(layer, second.merged, journal)
        archive = place / "peer.tar"
        create = ["tar", "--xattrs", "--xattrs-include=*", "-S", "-C", str(first.upper), "-cf", str(archive), "."]
        row["tar_create_s"] = timed(lambda: subprocess.run(create, check=True, stderr=subprocess.DEVNULL))
        extract = ["tar", "--xattrs", "--xattrs-include=*", "-C", str(peer.merged), "-xf", str(archive)]
        row["tar_extract_s"] = timed(lambda: subprocess.run(extract, check=False, stderr=subprocess.DEVNULL))
        return row
    finally:
        for overlay in (first, second, peer):
            overlay.close()


def on_copy(place: Path, image: Path, change: Change, journal: Path) -> dict[str, float]:
    """One run on copies of the image."""
    layer, first, second = place / "layer.tar", place / "first", place / "second"
    for copy in (first, second):
        subprocess.run(["cp", "-a", str(image), str(copy)], check=True)
    time.sleep(0.05)
    since = time.time_ns() - 20_000_000
    change(first)
    settle(place)
    row = {"diff_s": timed(lambda: diff_tree(first, image, layer, since_ns=since, exclude=()))}
    return row | applied(layer, second, journal)


def applied(layer: Path, root: Path, journal: Path) -> dict[str, float]:
    """Apply, undo, apply again as it would be for good."""
    row: dict[str, float] = {"tar_bytes": layer.stat().st_size}
    settle(layer.parent)
    undo = journal / "undo"
    found = mount_of(root)
    row["apply_s"] = timed(lambda: apply_layer(layer, root, undo, layers=found))
    row["journal_bytes"] = sum(file.stat().st_size for file in undo.iterdir())
    row["undo_s"] = timed(lambda: undo_from(undo, root))
    return row


def mount_of(root: Path) -> Layers | None:
    """What a restore tells the journal of a root."""
    return Layers(upper=root.with_name("upper"), lowers=(root.parents[1] / "image",)) if root.name == "merged" else None


def settle(place: Path) -> None:
    """What was written is on disk, so that nobody pays for another's writes."""
    fd = os.open(place, os.O_RDONLY)
    try:
        ctypes.CDLL(None).syncfs(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def places(above: str) -> Iterator[tuple[Path, Path]]:
    """A folder below `above`, and one in memory for the journal, as /run is."""
    with tempfile.TemporaryDirectory(dir=above, prefix="bench-rootfs-") as scratch:
        journal = Path(scratch, "journal")
        journal.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "bench", str(journal)], check=True)
        try:
            yield Path(scratch), journal
        finally:
            subprocess.run(["umount", str(journal)], check=True)


def measure(case: str, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """The rows of one case."""
    make_image, change = cases(options.files, options.gib << 30)[case]
    roots = {"overlay": on_overlay, "copy": on_copy}
    for root, run in roots.items():
        found: list[dict[str, float]] = []
        for _ in range(options.runs):
            with places(options.place) as (scratch, journal):
                image = scratch / "image"
                image.mkdir()
                make_image(image)
                settle(scratch)
                found.append(run(scratch, image, change, journal))
        yield {"case": case, "root": root, **{key: round(statistics.median(row[key] for row in found), 4) for key in found[0]}}


def main() -> int:
    """Print the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.rootfs", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--files", type=int, default=20000, help="small files (default 20000)")
    parser.add_argument("--gib", type=int, default=4, help="size of the one file (default 4)")
    parser.add_argument("--runs", type=int, default=3, help="of each case (default 3)")
    parser.add_argument("--place", default="/var/tmp", help="a folder that can be an overlay's upper (default /var/tmp)")
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    options = parser.parse_args()
    rows = []
    for row in (row for case in options.cases.split(",") for row in measure(case, options)):
        rows.append(row)
        if not options.json:
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if options.json:
        machine = describe({"tar": ["tar", "--version"]})
        print(json.dumps({"machine": machine, "files": options.files, "gib": options.gib, "runs": options.runs, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
