"""How the pages of a restore reach memory: the strategy, and the fill of the tree that CRIU has made.

    criu    the pages are put back into CRIU's files, and CRIU reads them
    fill    CRIU makes the tree without them, and they are written into it before it runs; `auto` is this
    lazy    CRIU makes the tree without them, and a server of ours brings them while it runs (smr.images.lazy)

An image without segments has no choice: all its pages are CRIU's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from smr.images.budget import Limits, Slot, fill_slot, pending_bytes
from smr.images.fill import Source, fill
from smr.images.image import Image
from smr.images.pagecache import node_available_bytes
from smr.images.pagetable import PAGE_BYTES, PageTable, Run
from smr.images.prefetch import Way, plan
from smr.images.segments import page_table, segment_paths
from smr.images.spans import Span
from smr.proto.annotations import Pages
from smr.proto.checkpoint import LayerType
from smr.proto.errors import Code, SmrError
from smr.shim import cgroups, procs
from smr.shim.config import Config
from smr.shim.run import run

if TYPE_CHECKING:
    from smr.shim.gpu.gate import Gate


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """The pages of one image that are not CRIU's, and how they come. `table` is None when there are none."""

    strategy: Pages
    table: PageTable | None
    table_path: Path = Path()
    segments: tuple[Path, ...] = ()

    def prepare(self, folder: Path, work: Path) -> None:
        """Before CRIU begins: give it all pages, or start the server of pages, or nothing. `work` is CRIU's work directory."""
        if self.table is None:
            return
        if self.strategy is Pages.CRIU:
            from smr.images.join import join

            join(folder, self.table, self.segments)
        if self.strategy is Pages.LAZY:
            with ThreadPoolExecutor(max_workers=1) as beside:
                serving = beside.submit(_serve, self.table_path, self.segments, work)
                from smr.images.lazy_folder import load_all

                load_all(folder)
                serving.result()

    @property
    def options(self) -> dict[str, str]:
        """CRIU's options that the strategy needs. runc has a flag for it, which it always sends; crun knows nothing of it."""
        return {"lazy-pages": ""} if self.strategy is Pages.LAZY else {}


def choose(image: Image, wanted: Pages) -> Delivery:
    """The strategy for an image. Raises IMAGE_CORRUPT for a page table that lies."""
    table = page_table(image)
    if table is None:
        return Delivery(strategy=Pages.CRIU, table=None)
    strategy = Pages.FILL if wanted is Pages.AUTO else wanted
    (blob,) = image.layers_of(LayerType.PAGETABLE)
    return Delivery(strategy=strategy, table=table, table_path=blob.path, segments=tuple(segment_paths(image)))


def _serve(table: Path, segments: tuple[Path, ...], work: Path) -> None:
    """Start the server of pages; when this returns its socket listens, where CRIU looks for it."""
    (work / "segments").write_text("".join(f"{path}\n" for path in segments))
    files = ("--table", table, "--segments", work / "segments", "--socket", work / "lazy-pages.socket")
    argv: list[str | Path] = [sys.executable, "-I", "-m", "smr.images.lazy", *files, "--status", lazy_status(work)]
    run(argv, timeout_s=20, code=Code.RESTORE_FAILED)


def lazy_status(work: Path) -> Path:
    """Where the server of pages says how far it is, and how it ended."""
    return work / "lazy.json"


def lazy_progress(work: Path) -> dict[str, object] | None:
    """What is known of a lazy restore; None when it was none."""
    try:
        found = json.loads(lazy_status(work).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


class Beside(Protocol):
    """What goes on with the tree while the last of its pages are on their way (smr.shim.gpu.revive)."""

    def keeps(self, pid: int, address: int) -> bool:
        """Whether a page of a process of the image is to be filled last."""

    def run(self, rest: Callable[[Mapping[int, Gate]], None], spans: Callable[[int], Sequence[Span]]) -> None:
        """Called when all others are there; `rest` fills these, each where the gate of its process says.

        `spans` are those of one process that are filled at all, sorted.
        """


def fill_tree(
    delivery: Delivery, image: Image, root_pid: int, config: Config, beside: Beside | None = None
) -> dict[str, str | int]:
    """Fill the stopped tree below `root_pid`, if that is how its pages come; returns what there is to tell of it.

    Raises MEMORY_LIMIT before a page is written when the container's limit or the node has no room, and what `fill` raises.
    """
    if delivery.table is None or delivery.strategy is Pages.CRIU:
        return {"strategy": Pages.CRIU.value}
    size_bytes = delivery.table.memory_bytes
    check_limit(root_pid, size_bytes)
    if delivery.strategy is Pages.LAZY:
        return {"strategy": Pages.LAZY.value, "memory_bytes": size_bytes}
    pids = {process.ns_pid: process.pid for process in procs.tree(root_pid)}
    way = plan(image, node_available_bytes() - pending_bytes(config.run), share=config.cache_share).way
    with fill_slot(config.run, size_bytes, Limits(fills=config.fills, wait_s=config.fill_wait_s)) as slot:
        job = _Fill(delivery=delivery, pids=pids, slot=slot, source=Source.CACHE if way is Way.CACHE else Source.DIRECT)
        if beside is None:
            job.fill(delivery.table)
        else:
            job.fill(delivery.table.part(lambda run: None if beside.keeps(run.pid, run.address) else run))
            beside.run(job.rest, job.spans)
    return {"strategy": Pages.FILL.value, "memory_bytes": job.bytes, "read_bytes": job.read_bytes, "source": way.value}


@dataclass(slots=True, kw_only=True)
class _Fill:
    delivery: Delivery
    pids: Mapping[int, int]
    slot: Slot
    source: Source
    bytes: int = 0
    read_bytes: int = 0

    def fill(self, table: PageTable, delivered: Callable[[int, Sequence[Span]], object] | None = None) -> None:
        """Fill what is in a part of the table."""
        before = self.bytes
        filled = fill(
            table,
            self.delivery.segments,
            self.pids,
            threads=self.slot.threads,
            source=self.source,
            progress=lambda written: self.slot.populated(before + written),
            delivered=delivered,
        )
        self.bytes += filled.bytes
        self.read_bytes += filled.read_bytes

    def spans(self, pid: int) -> list[Span]:
        """What the table has of one process."""
        table = self.delivery.table
        assert table is not None
        return [(run.address, run.address + table.pages(run) * PAGE_BYTES) for run in table.runs if run.pid == pid]

    def rest(self, gates: Mapping[int, Gate]) -> None:
        """Fill what is behind gates, by the image's pids."""

        def moved(run: Run) -> Run | None:
            away = gates[run.pid].away(run.address) if run.pid in gates else None
            return None if away is None else run._replace(address=away)

        assert self.delivery.table is not None
        self.fill(self.delivery.table.part(moved), lambda pid, spans: gates[pid].delivered(spans))


def check_limit(pid: int, size_bytes: int) -> None:
    """Raise MEMORY_LIMIT when the memory limit of a process's cgroups leaves less than `size_bytes`: the kernel would kill it."""
    room = cgroups.memory_room(pid)
    if room is not None and room < size_bytes:
        raise SmrError(
            f"the container's memory limit leaves {room >> 20} MiB: its image needs {size_bytes >> 20} MiB",
            hint="raise the container's memory limit",
            code=Code.MEMORY_LIMIT,
        )
