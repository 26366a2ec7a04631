"""How fast pages come back: `python -m bench.pages --size-gib N [--json] [--cases A,B] [--runs N] [--criu PATH] [--dir DIR]`.

A process with N GiB of memory, no two pages alike, is dumped by CRIU, outside any container. Stock CRIU restores the dump; then
the dump is split, and SMR restores it: stock CRIU on what is left, and the fill. Each time ends when the tree is there with all
its pages, stopped; both are the same version of CRIU, on the same machine, one after the other. Times are medians of `--runs`.

    warm          the files are in the page cache
    cold          they are not; beside it the device's own rate for the same files, read past the page cache with as many threads
    compressed    cold, the memory is bf16 weights and the segments are compressed
    lazy          SMR's page server: from its start until the process has answered a request; stock, filled and then asked
    dump          how long a process waits: stock CRIU's dump, and a lazy dump whose pages are taken from the process itself
    split         what splitting adds to a stock dump
    many          ten restores of one image of 1 GiB at once, against one of N GiB

    {"machine": {..}, "criu": "4.3", "cases": [{"strategy": "fill", "source": "warm", "size_gib": 4, "stock_s": .., "smr_s": ..,
     "ratio": .., "gb_per_s": .., "device_gb_per_s": ..}]}

`gb_per_s` is memory (GB) over `smr_s`; `criu_s` is CRIU's part of it. `extra_mib` is the most anonymous memory of the process
that fills beyond what it had before, seen by looking every 2 ms: buffers and decoded chunks, not the page cache, which it maps.
After each kind of restore up to 200,000 pages are compared with what they were, and each restored process is asked whether some
of its pages are right.

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
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.machine import describe
from bench.overhead import find_criu
from bench.pages_dump import live
from bench.pages_files import device_gb_per_s, drop, threads, warm
from bench.pages_restore import Bench, Image, Row, workers
from smr.proto.errors import SmrError

CASES = ("dump", "warm", "cold", "compressed", "lazy", "split", "many")
MANY = 10
MANY_GIB = 1


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
    """dump, split, warm, cold, lazy: of memory that does not compress."""
    with bench.process(size_gib, "random") as image:
        if {"dump", "split"}.intersection(cases):
            yield from measure_dumps(bench, image, cases)
        bench.dump(image)
        stock = {source: bench.restores(image, "stock", warm if source == "warm" else drop) for source in _sources(cases)}
        bench.split(image)
        if "warm" in cases:
            yield fill_case("warm", image, stock["warm"], bench.restores(image, "fill", warm))
        if "cold" in cases:
            ours = bench.restores(image, "fill", _drop_and_measure)
            yield fill_case("cold", image, stock["cold"], ours, **_device(ours))
        if "lazy" in cases:
            yield measure_lazy(bench, image, stock["warm"])


def _sources(cases: Sequence[str]) -> list[str]:
    return [source for source in ("warm", "cold") if source in cases or (source == "warm" and "lazy" in cases)]


def measure_lazy(bench: Bench, image: Image, stock: Sequence[Row]) -> Row:
    """Until the first answer, and until all pages are there."""
    try:
        from smr.images.lazy_folder import load_all

        load_all(image.images)
        ours = bench.restores(image, "lazy", warm)
    except (RuntimeError, ImportError) as error:
        return {"strategy": "lazy", "size_gib": image.size_gib, "skipped": str(error)}
    stock_s, smr_s = _median(stock, "answer_s"), _median(ours, "answer_s")
    return {
        "strategy": "lazy",
        "source": "warm",
        "size_gib": image.size_gib,
        "stock_s": round(stock_s, 3),
        "smr_s": round(smr_s, 3),
        "ratio": round(stock_s / smr_s, 2),
        "criu_s": round(_median(ours, "criu_s"), 3),
        "filled_s": round(_median(ours, "filled_s"), 3),
        "smr_runs_s": [round(run["answer_s"], 3) for run in ours],
    }


def measure_dumps(bench: Bench, image: Image, cases: Sequence[str]) -> Iterator[Row]:
    """Dumps of a process that goes on: by stock CRIU, each split; and with the pages taken from the process."""
    stock, ours, failed = [], [], ""
    for _ in range(bench.runs):
        bench.dump(image, "--leave-running")
        stock.append({"s": image.dump_s, "split_s": bench.split(image)})
        shutil.rmtree(image.folder / "segments")
        if "dump" in cases and not failed:
            try:
                ours.append(live(bench, image))
                shutil.rmtree(image.folder / "segments")
            except RuntimeError as error:
                failed = f"{error}: too few open files? ulimit -Hn, and sysctl fs.pipe-max-size=4194304"
    dump_s, split_s = _median(stock, "s"), _median(stock, "split_s")
    if failed:
        yield {"strategy": "dump", "size_gib": image.size_gib, "skipped": failed}
    elif "dump" in cases:
        smr_s, all_s = _median(ours, "s"), _median(ours, "all_s")
        yield {
            "strategy": "dump",
            "size_gib": image.size_gib,
            "stock_s": round(dump_s, 3),
            "smr_s": round(smr_s, 3),
            "ratio": round(dump_s / smr_s, 2),
            "gb_per_s": round(image.memory_bytes / smr_s / 1e9, 2),
            "criu_s": round(_median(ours, "criu_s"), 3),
            "stock_and_split_s": round(_median([{"s": run["s"] + run["split_s"]} for run in stock], "s"), 3),
            "smr_and_hash_s": round(all_s, 3),
            "stock_runs_s": [round(run["s"], 3) for run in stock],
            "smr_runs_s": [round(run["s"], 3) for run in ours],
        }
    if "split" in cases:
        yield {
            "strategy": "split",
            "size_gib": image.size_gib,
            "dump_s": round(dump_s, 3),
            "split_s": round(split_s, 3),
            "gb_per_s": round(image.memory_bytes / split_s / 1e9, 2),
            "more_than_dump_s": round(split_s - dump_s, 3),
            "split_runs_s": [round(run["split_s"], 3) for run in stock],
        }


def measure_compressed(bench: Bench, size_gib: float) -> Row:
    """Cold, of weights in bf16."""
    with bench.process(size_gib, "bf16") as image:
        bench.dump(image)
        stock = bench.restores(image, "stock", drop)
        split_s = bench.split(image, compress=True)
        ours = bench.restores(image, "fill", _drop_and_measure)
        compressed = {"stored_ratio": round(image.memory_bytes / image.stored_bytes, 3), "split_s": round(split_s, 3)}
        return fill_case("cold", image, stock, ours, compressed=True, memory=image.kind, **compressed, **_device(ours))


def measure_many(bench: Bench, one_gb_per_s: float | None) -> Row:
    """Ten at once; the clock runs until the last is there."""
    with bench.process(MANY_GIB, "random") as image:
        bench.dump(image)
        stock = _at_once(bench, image, "stock")
        bench.split(image)
        ours = _at_once(bench, image, "fill")
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


def _at_once(bench: Bench, image: Image, strategy: str) -> float:
    took = []
    with workers(MANY) as group:
        for _ in range(bench.runs):
            warm(image.files)
            begin = time.perf_counter()
            for number, worker in enumerate(group):
                worker.send(image.order(bench.criu, strategy, number, ask=False))
            for worker in group:
                worker.receive()
            took.append(time.perf_counter() - begin)
            for worker in group:
                worker.send({"do": "end"})
            for worker in group:
                worker.receive()
    return statistics.median(took)


def _median(runs: Sequence[Row], key: str) -> float:
    return statistics.median(float(run[key]) for run in runs)


def measure(bench: Bench, size_gib: float, cases: Sequence[str]) -> Iterator[Row]:
    """The rows of all the cases."""
    one: float | None = None
    if {"dump", "warm", "cold", "lazy", "split"}.intersection(cases):
        for row in measure_fill(bench, size_gib, cases):
            one = row["gb_per_s"] if (row["strategy"], row.get("source")) == ("fill", "warm") else one
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


def _line(row: Row) -> str:
    return "  ".join(f"{key} {value}" for key, value in row.items() if not isinstance(value, list))


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
            print(_line(row), file=sys.stderr if options.json else sys.stdout, flush=True)
    if not options.json:
        return 0
    version = subprocess.run([criu, "--version"], capture_output=True, text=True, check=False).stdout.split("\n")[0]
    machine = {**describe({}), "threads": threads()}
    print(json.dumps({"machine": machine, "criu": version.removeprefix("Version: "), "runs": options.runs, "cases": rows}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, SmrError) as error:
        sys.exit(f"bench.pages: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
