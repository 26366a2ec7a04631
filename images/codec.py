"""How a chunk of pages is written into a segment: as it is, as a zstd frame, or in byte planes and then as one.

Planes are for weights in bf16 and fp16: the low bytes of such words are noise and the high ones repeat, so zstd finds little
while they take turns (1.28 to 1), and more once the low bytes of a chunk stand before its high ones (1.49 to 1). Nothing there
repeats at any length, so planes have parameters of their own, in which the search for matches is all but off: nearly twice as
fast as level 1, and smaller (`python -m bench.codec`). A sample of each chunk is tried both ways. zstd runs without the
interpreter's lock, sorting into planes and back does not: one process, with however many threads, undoes no more than 2.4 GB/s
of planes. So they are for who asks: where bytes are dear, as on a slow disk, or where several processes decode.

A chunk stays raw unless compressing saves an eighth of the pages that it takes in a segment. To decode 1 GB takes 0.7 s of a
core and to read it from a disk of 2.4 GB/s 0.4 s: with 16 cores an eighth is where decoding takes as long as the reading that
it saves. From the page cache raw is always faster. So random bytes, quantized weights and single pages stay raw. Level 1: level 3
makes a heap 5% smaller, at two thirds of the speed, and 6 takes five times as long for a tenth more.

`decode` gives exactly as many bytes as were asked for or IMAGE_CORRUPT, and allocates no more, whatever a frame's header says.
Whether they are the right ones is what the chunk's digest is for. Both functions may be called from any thread. `zstandard` is
imported where it is used.
"""

from __future__ import annotations

import threading
from types import ModuleType
from typing import TYPE_CHECKING

from smr.images.pagetable import CHUNK_PAGES, PAGE_BYTES, Codec
from smr.proto.errors import Code, SmrError

if TYPE_CHECKING:
    import zstandard

LEVEL = 1
CHUNK_BYTES = CHUNK_PAGES * PAGE_BYTES
# Shares of a chunk's pages: what compressing has to save of them, and planes besides what zstd saves without them.
SAVES = 1 / 8
PLANES_SAVE = 1 / 16
_SAMPLES = 4
_SAMPLE_BYTES = 4 * PAGE_BYTES
# Of zstd's; a block has one code, so planes that share it are no better than words.
_BLOCK_BYTES = 128 << 10

_own = threading.local()


def encode(pages: bytes | memoryview, *, level: int = LEVEL, planes: bool = False) -> tuple[Codec, bytes | memoryview]:
    """A chunk of at most 512 pages as it is to be stored; `pages` itself where that is best. UNSUPPORTED without zstandard.

    `planes` allows ZSTD_PLANES, where a sample of the chunk says that it saves more.
    """
    if not 0 < len(pages) <= CHUNK_BYTES or len(pages) % PAGE_BYTES:
        raise ValueError(f"a chunk is 1 to {CHUNK_PAGES} whole pages, not {len(pages)} bytes")
    if len(pages) == PAGE_BYTES:
        return Codec.RAW, pages
    if planes and _planes_pay(pages, level):
        codec, stored = Codec.ZSTD_PLANES, _planes_compressor().compress(split_planes(pages))
    else:
        codec, stored = Codec.ZSTD, _compressor(level).compress(pages)
    taken = -(-len(stored) // PAGE_BYTES) * PAGE_BYTES
    return (codec, stored) if taken <= len(pages) * (1 - SAVES) else (Codec.RAW, pages)


def decode(codec: int, stored: bytes | memoryview, size_bytes: int) -> bytes | memoryview:
    """The pages of a chunk: exactly `size_bytes`, of RAW the stored ones themselves. IMAGE_CORRUPT for anything else."""
    if codec == Codec.RAW:
        if len(stored) != size_bytes:
            raise _corrupt(f"has {len(stored)} bytes for {size_bytes} of pages")
        return stored
    if codec not in (Codec.ZSTD, Codec.ZSTD_PLANES):
        raise _corrupt(f"has codec {codec}")
    plain = _decompress(stored, size_bytes)
    return plain if codec == Codec.ZSTD else memoryview(join_planes(plain))


def split_planes(pages: bytes | memoryview) -> bytes:
    """The low bytes of all 16-bit words (little endian), then the high ones."""
    flat = bytes(pages)  # a memoryview's slices are five times slower
    return flat[0::2] + flat[1::2]


def join_planes(planes: bytes) -> bytearray:
    """What `split_planes` was given."""
    pages, half = bytearray(len(planes)), len(planes) // 2
    view = memoryview(planes)
    pages[0::2] = view[:half]
    pages[1::2] = view[half:]
    return pages


def _planes_pay(pages: bytes | memoryview, level: int) -> bool:
    if len(pages) < 2 * _BLOCK_BYTES:
        return False
    view, step = memoryview(pages), len(pages) // _SAMPLES // PAGE_BYTES * PAGE_BYTES
    sample = b"".join(view[begin : begin + _SAMPLE_BYTES] for begin in range(0, len(view), step))
    compressor = _planes_compressor()
    planes = len(compressor.compress(sample[0::2])) + len(compressor.compress(sample[1::2]))
    words = min(len(_compressor(level).compress(sample)), len(sample))
    return planes <= min(words - PLANES_SAVE * len(sample), (1 - SAVES) * len(sample))


def _decompress(stored: bytes | memoryview, size_bytes: int) -> bytes:
    zstd = _zstandard()
    try:
        frame = zstd.get_frame_parameters(stored)
        # zstandard allocates what the header says. In frames of ours the window is the content.
        if frame.content_size != size_bytes or not 0 < size_bytes <= CHUNK_BYTES or frame.window_size > CHUNK_BYTES:
            raise _corrupt(f"says {frame.content_size} bytes in windows of {frame.window_size}, for {size_bytes} of pages")
        pages = _decompressor().decompress(stored, allow_extra_data=False)
    except zstd.ZstdError as error:
        raise _corrupt(f"cannot be decompressed: {error}") from error
    if len(pages) != size_bytes:
        raise _corrupt(f"holds {len(pages)} bytes for {size_bytes} of pages")
    return pages


def _compressor(level: int) -> zstandard.ZstdCompressor:
    made: dict[int, zstandard.ZstdCompressor] = _own.__dict__.setdefault("compressors", {})
    if level not in made:
        made[level] = _zstandard().ZstdCompressor(level=level, write_checksum=False)
    return made[level]


def _planes_compressor() -> zstandard.ZstdCompressor:
    """Entropy coding and little else: matches of 7 bytes, looked for in 64 places."""
    if not hasattr(_own, "planes"):
        zstd = _zstandard()
        parameters = zstd.ZstdCompressionParameters(
            strategy=zstd.STRATEGY_FAST, min_match=7, hash_log=6, chain_log=6, search_log=1, target_length=0, window_log=21
        )
        _own.planes = zstd.ZstdCompressor(compression_params=parameters)
    planes: zstandard.ZstdCompressor = _own.planes
    return planes


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_own, "decompressor"):
        _own.decompressor = _zstandard().ZstdDecompressor(max_window_size=CHUNK_BYTES)
    decompressor: zstandard.ZstdDecompressor = _own.decompressor
    return decompressor


def _zstandard() -> ModuleType:
    try:
        import zstandard
    except ImportError as error:
        raise SmrError(
            "compressed pages need the Python package zstandard, which is not installed here",
            hint="pip install zstandard",
            code=Code.UNSUPPORTED,
        ) from error
    return zstandard


def _corrupt(found: str) -> SmrError:
    return SmrError(f"a chunk of pages {found}", hint="import the image again, or `smr images verify`", code=Code.IMAGE_CORRUPT)
