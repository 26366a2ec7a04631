"""What chunks of pages compress to, and how fast: `python -m bench.codec [--json] [--size-mib N] [--runs N]`.

Every way of storing is tried on chunks of 2 MiB of four kinds of memory, on one core; the last two of each kind are what
`smr.images.codec` chooses, without and with planes, and what all cores decode in threads of one process. Speeds are of pages, in
GB/s, medians of `--runs`.

    {"machine": {..}, "size_mib": 8, "rows": [{"memory": "bf16", "how": "zstd 1", "ratio": .., "encode_gb_per_s": ..,
     "decode_gb_per_s": ..}, .., {.., "how": "chosen, planes", "codecs": {"ZSTD_PLANES": 4}, "decode_threads_gb_per_s": ..}]}

`long` is zstd's long mode: within a chunk nothing is further away than the chunk, so it is there to show that it gains nothing.
`whole, long` is all of the memory as one frame, which shows what independent chunks cost. Chunks that stay raw are not decoded:
their speed is null.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import starmap
from pathlib import Path
from random import Random
from typing import Any

from bench.machine import describe
from bench.pages_process import bf16
from smr.images import codec
from smr.images.pagetable import PAGE_BYTES, Codec

LEVELS = (1, 3, 6, 9)
HEAP_PROGRAM = """
import asyncio, decimal, email, http.client, json, logging, sqlite3, sys, unittest
rows = [{"id": n, "name": "user %d" % n, "tags": [n % 97, n * 0.5], "body": "line %d of text " % n * 3} for n in range(SIZE)]
print("ready", flush=True)
sys.stdin.read()
"""
CHUNK = codec.CHUNK_BYTES


def memories(size_bytes: int) -> Iterator[tuple[str, bytes]]:
    """The kinds of memory: seeded, but for the heap, which is a real process's."""
    draw = Random(1)
    yield "random", draw.randbytes(size_bytes)
    yield "bf16", bf16(draw, size_bytes)
    yield "python heap", python_heap(size_bytes)
    words = [draw.randbytes(draw.randrange(2, 9)).hex().encode() for _ in range(4000)]
    text = b" ".join(draw.choice(words) for _ in range(size_bytes // 16))
    half = CHUNK // 2
    yield "zeros and text", b"".join(bytes(half) + text[at : at + half] for at in range(0, size_bytes // 2, half))


def python_heap(size_bytes: int) -> bytes:
    """Writable private anonymous memory of a Python process that has libraries and some data, without its zero pages."""
    argv = [sys.executable, "-c", HEAP_PROGRAM.replace("SIZE", str(size_bytes // 500))]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        pages = b"".join(_anonymous_pages(process.pid))
    if len(pages) < size_bytes:
        raise SystemExit(f"bench.codec: the Python process had {len(pages)} bytes, {size_bytes} were needed")
    return pages[:size_bytes]


def _anonymous_pages(pid: int) -> Iterator[bytes]:
    zero = bytes(PAGE_BYTES)
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            fields = line.split()
            if fields[1] != "rw-p" or fields[4] != "0" or fields[5:] == ["[stack]"]:
                continue
            begin, end = (int(address, 16) for address in fields[0].split("-"))
            memory.seek(begin)
            data = memory.read(end - begin)
            yield from (page for at in range(0, len(data), PAGE_BYTES) if (page := data[at : at + PAGE_BYTES]) != zero)


def ways() -> Mapping[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes | bytearray]]]:
    """How a chunk may be stored: what packs it and what unpacks it."""
    import zstandard

    unpack = zstandard.ZstdDecompressor().decompress
    plain = {f"zstd {level}": zstandard.ZstdCompressor(level=level).compress for level in LEVELS}
    long_mode = zstandard.ZstdCompressionParameters.from_level(3, enable_ldm=True, window_log=21)
    plain["zstd 3, long"] = zstandard.ZstdCompressor(compression_params=long_mode).compress
    found: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes | bytearray]]] = {}
    for name, pack in plain.items():
        found[name] = pack, unpack
        if "long" not in name:
            found[f"planes, {name}"] = _through_planes(pack, unpack)
    found["planes"] = _through_planes(codec._planes_compressor().compress, unpack)
    return found


def _through_planes(
    pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes]
) -> tuple[Callable[[bytes], bytes], Callable[[bytes], bytearray]]:
    return lambda pages: pack(codec.split_planes(pages)), lambda stored: codec.join_planes(unpack(stored))


def timed(runs: int, call: Callable[[], Sequence[bytes | memoryview]]) -> tuple[float, Sequence[bytes | memoryview]]:
    """Median of its durations, and what it returned last."""
    took, result = [], call()
    for _ in range(runs):
        begin = time.perf_counter()
        result = call()
        took.append(time.perf_counter() - begin)
    return statistics.median(took), result


def _each(call: Callable[[Any], bytes | bytearray], chunks: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    return [memoryview(call(chunk)) for chunk in chunks]


def measure(memory: str, data: bytes, runs: int) -> Iterator[dict[str, object]]:
    """The rows of one kind of memory."""
    chunks = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    for how, (pack, unpack) in ways().items():
        encode_s, stored = timed(runs, partial(_each, pack, chunks))
        decode_s, back = timed(runs, partial(_each, unpack, stored))
        if b"".join(back) != data:
            raise SystemExit(f"bench.codec: {how} of {memory} did not come back")
        yield _row(memory, how, data, sum(map(len, stored)), encode_s, decode_s)
    yield _whole(memory, data, runs)
    yield _chosen(memory, data, chunks, runs, planes=False)
    yield _chosen(memory, data, chunks, runs, planes=True)


def _whole(memory: str, data: bytes, runs: int) -> dict[str, object]:
    import zstandard

    parameters = zstandard.ZstdCompressionParameters.from_level(3, enable_ldm=True, window_log=27)
    packer, unpacker = zstandard.ZstdCompressor(compression_params=parameters), zstandard.ZstdDecompressor()
    encode_s, (stored,) = timed(runs, lambda: [packer.compress(data)])
    decode_s, _ = timed(runs, lambda: [unpacker.decompress(stored)])
    return _row(memory, "whole, long", data, len(stored), encode_s, decode_s)


def _chosen(memory: str, data: bytes, chunks: Sequence[bytes], runs: int, *, planes: bool) -> dict[str, object]:
    packed = [codec.encode(chunk, planes=planes) for chunk in chunks]
    jobs = [(int(kind), stored, len(chunk)) for (kind, stored), chunk in zip(packed, chunks, strict=True)]
    encode_s, _ = timed(runs, lambda: [codec.encode(chunk, planes=planes)[1] for chunk in chunks])
    decode_s, back = timed(runs, lambda: list(starmap(codec.decode, jobs)))
    if b"".join(back) != data:
        raise SystemExit(f"bench.codec: {memory} did not come back")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        threads_s, _ = timed(runs, lambda: list(pool.map(lambda job: codec.decode(*job), jobs)))
    decoded = any(kind != Codec.RAW for kind, _ in packed)
    taken = sum(-(-len(stored) // PAGE_BYTES) * PAGE_BYTES for _, stored in packed)
    return {
        **_row(memory, "chosen, planes" if planes else "chosen", data, taken, encode_s, decode_s),
        **({} if decoded else {"decode_gb_per_s": None}),
        "codecs": collections.Counter(kind.name for kind, _ in packed),
        "decode_threads_gb_per_s": _rate(data, threads_s) if decoded else None,
    }


def _row(memory: str, how: str, data: bytes, stored: int, encode_s: float, decode_s: float) -> dict[str, object]:
    rates = {"encode_gb_per_s": _rate(data, encode_s), "decode_gb_per_s": _rate(data, decode_s)}
    return {"memory": memory, "how": how, "ratio": round(len(data) / stored, 3), **rates}


def _rate(data: bytes, seconds: float) -> float:
    return round(len(data) / seconds / 1e9, 2)


def main() -> int:
    """Print the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.codec", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--size-mib", type=int, default=16, help="of each kind of memory (default 16)")
    parser.add_argument("--runs", type=int, default=5, help="of each way (default 5)")
    options = parser.parse_args()
    size_bytes = max(options.size_mib << 20, 2 * CHUNK)
    rows = [row for memory, data in memories(size_bytes) for row in measure(memory, data, options.runs)]
    if options.json:
        import zstandard

        versions = {"zstd": ".".join(map(str, zstandard.ZSTD_VERSION)), "zstandard": zstandard.__version__}
        print(
            json.dumps(
                {"machine": {**describe({}), **versions}, "size_mib": size_bytes >> 20, "runs": options.runs, "rows": rows}
            )
        )
        return 0
    for row in rows:
        print("{memory:15} {how:16} {ratio} to 1  encode {encode_gb_per_s} GB/s  decode {decode_gb_per_s} GB/s".format(**row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
