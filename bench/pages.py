"""How fast pages come back: `python -m bench.pages --size-gib N [--json] [--cases A,B] [--runs N] [--criu PATH] [--dir DIR]`.

A process with N GiB of memory, no two pages alike, is dumped by CRIU, outside any container. Stock CRIU restores the dump; then
the dump is split, and SMR restores it: stock CRIU on what is left, and the fill. Each time ends when the tree is there with all
its pages, stopped; both are the same version of CRIU, on the same machine, one after the other. Times are medians of `--runs`.

    warm          the files are in the page cache
    cold          they are not; beside it the device's own rate for the same files, read past the page cache with as many threads
    compressed    cold, the memory is bf16 weights and the segments are compressed
    lazy          SMR's page server: from the start of CRIU until the process has answered a request
    split         what splitting adds to a dump
    many          ten restores of one image of 1 GiB at once, against one of N GiB

    {"machine": {..}, "criu": "4.3", "cases": [{"strategy": "fill", "source": "warm", "size_gib": 4, "stock_s": .., "smr_s": ..,
     "ratio": .., "gb_per_s": .., "device_gb_per_s": ..}]}

`gb_per_s` is memory (GB) over `smr_s`; `criu_s` is CRIU's part of it. `extra_mib` is the most anonymous memory of the process
that fills beyond what it had before, seen by looking every 2 ms: buffers and decoded chunks, not the page cache, which it maps.
After each kind of restore up to 200,000 pages are compared with what they were; then the process is continued and asked.

Needs root, memory for twice the size (page cache and process) and disk for 1.25 times the size in `--dir` (default /var/tmp;
removed at the end, after Ctrl-C too), which has to be a real one for the cold cases.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.machine import describe
from bench.overhead import REPOSITORY, find_criu
from bench.pages_files import device_gb_per_s, drop, threads, warm
from bench.pages_process import PAGE_BYTES, Content
from smr.images.split import split
from smr.proto.errors import SmrError

CASES = ("warm", "cold", "compressed", "lazy", "split", "many")
MANY = 10
MANY_GIB = 1
_ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))}
Row = dict[str, Any]


class Worker:
    """A process that restores, and the most anonymous memory that it had."""

    def __init__(self) -> None:
        argv = [sys.executable, "-m", "bench.pages_worker"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(argv, cwd=REPOSITORY, env=_ENVIRONMENT, stdin=pipe, stdout=pipe, text=True)
        self.send({"do": "end"})
        self.receive()

    def send(self, order: Mapping[str, object]) -> None:
        """Give an order."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def receive(self) -> Row:
        """Its answer."""
        assert self._process.stdout is not None
        answer: Row = json.loads(self._process.stdout.readline() or '{"error": "the worker ended"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def call(self, order: Mapping[str, object]) -> Row:
        """Order and answer, with `extra_bytes` of memory."""
        before, peak, done = self._anonymous_bytes(), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, self._anonymous_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            self.send(order)
            answer = self.receive()
        finally:
            done.set()
            watcher.join()
        return {**answer, "extra_bytes": max(peak - before, 0)}

    def close(self) -> None:
        """End it and what it restored."""
        self._process.communicate()

    def _anonymous_bytes(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


@dataclass(slots=True, kw_only=True)
class Image:
    """A dump, whole or split."""

    folder: Path
    size_gib: float
    kind: str
    pid: int
    address: int
    dump_s: float
    table: Path | None = None
    segments: list[Path] = field(default_factory=list)
    memory_bytes: int = 0

    @property
    def files(self) -> list[Path]:
        """All that a restore reads."""
        return [
            *(path for path in self.images.iterdir() if path.is_file()),
            *([self.table] if self.table else []),
            *self.segments,
        ]

    @property
    def images(self) -> Path:
        """CRIU's directory."""
        return self.folder / "criu"

    @property
    def stored_bytes(self) -> int:
        """Size of the segments."""
        return sum(path.stat().st_size for path in self.segments)

    def order(self, criu: str, number: int = 0) -> Row:
        """Tells a worker to restore it."""
        parts = {"table": str(self.table or ""), "segments": [str(path) for path in self.segments]}
        return {"do": "restore", "criu": criu, "folder": str(self.images), "work": str(self.folder / f"work{number}"), **parts}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where it is measured and with what."""

    criu: str
    folder: Path
    runs: int

    @contextmanager
    def process(self, size_gib: float, kind: str) -> Iterator[Image]:
        """A process with its memory filled; it is there until a dump ends it."""
        folder = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=self.folder))
        size_bytes = int(size_gib * 2**30) >> 21 << 21
        argv = [sys.executable, "-m", "bench.pages_process", str(folder), str(size_bytes), kind]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(argv, cwd=REPOSITORY, env=_ENVIRONMENT, start_new_session=True, **quiet)
        try:
            while not (folder / "ready").exists() or not (folder / "ready").read_text():
                if process.poll() is not None:
                    raise RuntimeError(f"the process of {size_gib} GiB ended with {process.returncode}: is there memory for it?")
                time.sleep(0.01)
            address = int((folder / "ready").read_text(), 16)
            yield Image(folder=folder, size_gib=size_gib, kind=kind, pid=process.pid, address=address, dump_s=0)
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(folder)

    def dump(self, image: Image, *options: str) -> None:
        """Have CRIU dump it."""
        shutil.rmtree(image.images, ignore_errors=True)
        image.images.mkdir()
        image.table, image.segments = None, []
        argv = [
            self.criu,
            "dump",
            "-t",
            str(image.pid),
            "-D",
            str(image.images),
            "-W",
            str(image.folder),
            "-o",
            "dump.log",
            *options,
        ]
        begin = time.perf_counter()
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        image.dump_s = time.perf_counter() - begin
        if done.returncode:
            log = (image.folder / "dump.log").read_text(errors="replace").splitlines()
            raise RuntimeError(f"criu dump ended with {done.returncode}: {[line for line in log if 'Error' in line][-3:]}")

    def split(self, image: Image, *, compress: bool = False) -> float:
        """Split it; returns the seconds that it took."""
        out = image.folder / "segments"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        begin = time.perf_counter()
        result = split(image.images, out, compress=compress)
        took = time.perf_counter() - begin
        image.table = image.folder / "table"
        image.table.write_bytes(result.table.to_bytes())
        image.segments = [segment.path for segment in result.segments]
        image.memory_bytes = result.table.memory_bytes
        return took

    def restores(self, image: Image, prepare: Callable[[Sequence[Path]], object]) -> list[Row]:
        """`runs` restores, each after `prepare`; what it returns stands in `prepared`."""
        answers = []
        with _workers(1) as (worker,):
            for _ in range(self.runs):
                prepared = prepare(image.files)
                answers.append({**worker.call(image.order(self.criu)), "prepared": prepared})
                if len(answers) == self.runs:
                    check(image, answers[-1]["pid"])
                worker.call({"do": "end"})
        return answers


@contextmanager
def _workers(count: int) -> Iterator[list[Worker]]:
    with ExitStack() as stack:
        workers = []
        for _ in range(count):
            workers.append(Worker())
            stack.callback(workers[-1].close)
        yield workers


def check(image: Image, pid: int) -> None:
    """Every page of a restored process is what it was, then it goes on and answers. Raises RuntimeError."""
    content = Content(image.kind)
    pages = (int(image.size_gib * 2**30) >> 21 << 21) // PAGE_BYTES
    step = max(1, pages // 200_000)
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for page in range(0, pages, step):
            if os.pread(memory.fileno(), PAGE_BYTES, image.address + page * PAGE_BYTES) != content.page(page):
                raise RuntimeError(f"page {page} of the restored process is not what it was")
    answer = image.folder / "answer"
    answer.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR1)
    os.kill(pid, signal.SIGCONT)
    give_up = time.monotonic() + 60
    while not answer.exists():
        if time.monotonic() > give_up:
            raise RuntimeError("the restored process does not answer")
        time.sleep(0.001)
    if "right" not in answer.read_text():
        raise RuntimeError("the restored process finds wrong pages")


def fill_case(source: str, image: Image, stock: Sequence[Row], ours: Sequence[Row], **more: object) -> Row:
    """A row of the table."""
    stock_s, smr_s = _median(stock, "s"), _median(ours, "s")
    return {
        "strategy": "fill",
        "source": source,
        "size_gib": image.size_gib,
        "stock_s": round(stock_s, 3),
        "smr_s": round(smr_s, 3),
        "ratio": round(stock_s / smr_s, 2),
        "gb_per_s": round(image.memory_bytes / smr_s / 1e9, 2),
        "criu_s": round(_median(ours, "criu_s"), 3),
        "stock_runs_s": [round(run["s"], 3) for run in stock],
        "smr_runs_s": [round(run["s"], 3) for run in ours],
        "extra_mib": round(max(run["extra_bytes"] for run in ours) / 2**20),
        **more,
    }


def _device(ours: Sequence[Row]) -> Row:
    rates = [run["prepared"] for run in ours if run["prepared"]]
    if not rates:
        return {"device_gb_per_s": None, "note": "no O_DIRECT on this file system"}
    return {"device_gb_per_s": round(statistics.median(rates), 2)}


def _drop_and_measure(paths: Sequence[Path]) -> float | None:
    segments = [path for path in paths if path.name.startswith("segment")]
    drop(segments)
    rate = device_gb_per_s(segments)
    drop(paths)
    return rate


def measure_fill(bench: Bench, size_gib: float, cases: Sequence[str]) -> Iterator[Row]:
    """warm, cold, split, lazy: of memory that does not compress."""
    with bench.process(size_gib, "random") as image:
        if "split" in cases:
            yield measure_split(bench, image)
        bench.dump(image)
        stock = {
            source: bench.restores(image, warm if source == "warm" else drop) for source in ("warm", "cold") if source in cases
        }
        bench.split(image)
        if "warm" in cases:
            yield fill_case("warm", image, stock["warm"], bench.restores(image, warm))
        if "cold" in cases:
            ours = bench.restores(image, _drop_and_measure)
            yield fill_case("cold", image, stock["cold"], ours, **_device(ours))
        if "lazy" in cases:
            yield measure_lazy(image)


def measure_lazy(image: Image) -> Row:
    """Until the first answer."""
    return {"strategy": "lazy", "size_gib": image.size_gib, "skipped": "no page server yet"}


def measure_split(bench: Bench, image: Image) -> Row:
    """Dumps of a process that goes on, each split."""
    dumps, splits = [], []
    for _ in range(bench.runs):
        bench.dump(image, "--leave-running")
        dumps.append(image.dump_s)
        splits.append(bench.split(image))
        shutil.rmtree(image.folder / "segments")
    dump_s, split_s = statistics.median(dumps), statistics.median(splits)
    rate = round(image.memory_bytes / split_s / 1e9, 2)
    row = {
        "strategy": "split",
        "size_gib": image.size_gib,
        "dump_s": round(dump_s, 3),
        "split_s": round(split_s, 3),
        "gb_per_s": rate,
    }
    return {**row, "more_than_dump_s": round(split_s - dump_s, 3), "split_runs_s": [round(run, 3) for run in splits]}


def measure_compressed(bench: Bench, size_gib: float) -> Row:
    """Cold, of weights in bf16."""
    with bench.process(size_gib, "bf16") as image:
        bench.dump(image)
        stock = bench.restores(image, drop)
        split_s = bench.split(image, compress=True)
        ours = bench.restores(image, _drop_and_measure)
        compressed = {"stored_ratio": round(image.memory_bytes / image.stored_bytes, 3), "split_s": round(split_s, 3)}
        return fill_case("cold", image, stock, ours, compressed=True, memory=image.kind, **compressed, **_device(ours))


def measure_many(bench: Bench, one_gb_per_s: float | None) -> Row:
    """Ten at once; the clock runs until the last is there."""
    with bench.process(MANY_GIB, "random") as image:
        bench.dump(image)
        stock = _at_once(bench, image)
        bench.split(image)
        ours = _at_once(bench, image)
    rate = MANY * image.memory_bytes / ours / 1e9
    row: Row = {
        "strategy": "fill",
        "source": "warm",
        "many": MANY,
        "size_gib": MANY_GIB,
        "stock_s": round(stock, 3),
        "smr_s": round(ours, 3),
    }
    row |= {"ratio": round(stock / ours, 2), "gb_per_s": round(rate, 2), "one_gb_per_s": one_gb_per_s}
    return {**row, "of_one": round(rate / one_gb_per_s, 2) if one_gb_per_s else None}


def _at_once(bench: Bench, image: Image) -> float:
    took = []
    with _workers(MANY) as workers:
        for _ in range(bench.runs):
            warm(image.files)
            begin = time.perf_counter()
            for number, worker in enumerate(workers):
                worker.send(image.order(bench.criu, number))
            for worker in workers:
                worker.receive()
            took.append(time.perf_counter() - begin)
            for worker in workers:
                worker.send({"do": "end"})
            for worker in workers:
                worker.receive()
    return statistics.median(took)


def _median(runs: Sequence[Row], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def measure(bench: Bench, size_gib: float, cases: Sequence[str]) -> Iterator[Row]:
    """The rows of all the cases."""
    one: float | None = None
    if {"warm", "cold", "lazy", "split"}.intersection(cases):
        for row in measure_fill(bench, size_gib, cases):
            one = row["gb_per_s"] if row.get("source") == "warm" else one
            yield row
    if "compressed" in cases:
        yield measure_compressed(bench, size_gib)
    if "many" in cases:
        yield measure_many(bench, one)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.pages", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--size-gib", type=float, default=4, help="memory of the process (default 4)")
    parser.add_argument("--runs", type=int, default=5, help="restores of each kind (default 5)")
    parser.add_argument("--cases", default=",".join(CASES), help=f"which (default {','.join(CASES)})")
    parser.add_argument("--criu", default="", help="CRIU (default $SMR_CRIU, SMR's, dev/provision's, PATH's)")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where the images go (default /var/tmp)")
    options = parser.parse_args()
    options.cases = options.cases.split(",")
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if os.geteuid() != 0:
        parser.error("needs root, for CRIU")
    needed, free = int(options.size_gib * 1.25 * 2**30), shutil.disk_usage(options.dir).free
    if free < needed:
        parser.error(
            f"{options.dir} has {free >> 30} GiB free, {-(-needed >> 30)} GiB are needed: another --dir, or less --size-gib"
        )
    return options


def main() -> int:
    """Print the result."""
    options = _options()
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    criu = find_criu(options.criu)
    with tempfile.TemporaryDirectory(prefix="smr-bench-pages-", dir=options.dir) as folder:
        bench = Bench(criu=criu, folder=Path(folder), runs=options.runs)
        rows = []
        for row in measure(bench, options.size_gib, options.cases):
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    version = subprocess.run([criu, "--version"], capture_output=True, text=True, check=False).stdout.split("\n")[0]
    machine = {**describe({}), "threads": threads()}
    if options.json:
        print(json.dumps({"machine": machine, "criu": version.removeprefix("Version: "), "runs": options.runs, "cases": rows}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, SmrError) as error:
        sys.exit(f"bench.pages: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
