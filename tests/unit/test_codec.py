"""Chunks of pages as they are stored: what is compressed and how, and what is not believed when it is read."""

import random
import struct
import sys
import threading
import tracemalloc

import pytest

from smr.images.codec import CHUNK_BYTES, decode, encode, join_planes, split_planes
from smr.images.pagetable import PAGE_BYTES, Codec
from smr.proto.errors import Code, SmrError

zstandard = pytest.importorskip("zstandard")

DRAW = random.Random(7)
NOISE = DRAW.randbytes(CHUNK_BYTES)
TEXT = (b"".join(b"request %d was answered in %d us\n" % (n, DRAW.randrange(9999)) for n in range(60000)))[:CHUNK_BYTES]
assert len(TEXT) == CHUNK_BYTES


def bf16(count: int) -> bytes:
    """The upper halves of floats, as weights are: noise below, a few exponents above."""
    floats = struct.pack(f"<{count}f", *(DRAW.gauss(0, 0.02) for _ in range(count)))
    words = bytearray(count * 2)
    words[0::2], words[1::2] = floats[2::4], floats[3::4]
    return bytes(words)


WEIGHTS = bf16(CHUNK_BYTES // 2)


def refused(codec: int, stored: bytes, size_bytes: int) -> str:
    with pytest.raises(SmrError) as caught:
        decode(codec, stored, size_bytes)
    assert caught.value.code is Code.IMAGE_CORRUPT
    return caught.value.message


@pytest.mark.parametrize("level", [1, 3, 9])
@pytest.mark.parametrize("wrap", [bytes, memoryview])
@pytest.mark.parametrize(("pages", "codec"), [(NOISE, Codec.RAW), (TEXT, Codec.ZSTD), (WEIGHTS, Codec.ZSTD_PLANES)])
def test_each_kind_of_memory_finds_its_codec_and_comes_back(pages, codec, wrap, level):
    """Noise stays as it is, text becomes a frame, 16-bit weights become planes; at any level all come back byte by byte."""
    found, stored = encode(wrap(pages), level=level, planes=True)
    assert found is codec
    assert len(stored) <= len(pages) * (1 if codec is Codec.RAW else 7 / 8)
    assert bytes(decode(found, stored, len(pages))) == pages


def test_planes_are_for_who_asks():
    """Without, weights are a frame like everything else."""
    codec, stored = encode(WEIGHTS)
    assert codec is Codec.ZSTD
    assert bytes(decode(codec, stored, len(WEIGHTS))) == WEIGHTS


def test_planes_make_weights_smaller_than_zstd_alone_does():
    """They save at least an eighth more than the frame that any level makes of the words as they are."""
    _, stored = encode(WEIGHTS, planes=True)
    for level in (1, 9):
        assert len(stored) < len(zstandard.ZstdCompressor(level=level).compress(WEIGHTS)) * 7 / 8


@pytest.mark.parametrize("pages", [1, 2, 3, 5, 63, 511, 512])
@pytest.mark.parametrize("kind", [NOISE, TEXT, WEIGHTS, bytes(CHUNK_BYTES), NOISE[:PAGE_BYTES] + TEXT[PAGE_BYTES:]])
def test_chunks_of_any_length_come_back(kind, pages):
    """From one page to 512."""
    part = kind[: pages * PAGE_BYTES]
    codec, stored = encode(part, planes=True)
    assert bytes(decode(codec, memoryview(bytes(stored)), len(part))) == part


def test_one_page_stays_raw():
    """Chunks begin at whole pages in a segment, so that a page that shrinks saves nothing."""
    assert encode(bytes(PAGE_BYTES))[0] is Codec.RAW


def test_raw_pages_are_not_copied():
    """What is stored is the memory that was given, and what is read is the memory that was stored."""
    view = memoryview(NOISE)
    assert encode(view)[1] is view
    assert decode(Codec.RAW, view, len(view)) is view


@pytest.mark.parametrize("size", [0, 1, PAGE_BYTES - 1, PAGE_BYTES + 1, CHUNK_BYTES + PAGE_BYTES])
def test_what_is_no_chunk_is_not_encoded(size):
    """Neither part of a page nor more than 512."""
    with pytest.raises(ValueError, match="whole pages"):
        encode(bytes(size))


def test_planes_keep_the_order_of_the_words():
    """Low bytes, then high bytes; and back."""
    assert split_planes(b"aAbBcC") == b"abcABC"
    assert join_planes(b"abcABC") == b"aAbBcC"


@pytest.mark.parametrize("codec", [Codec.ZSTD, Codec.ZSTD_PLANES])
@pytest.mark.parametrize("size", [CHUNK_BYTES - PAGE_BYTES, PAGE_BYTES])
def test_a_frame_of_another_size_is_refused(codec, size):
    """A frame that says more, or less, than the page table."""
    stored = zstandard.compress(TEXT)
    assert f"says {CHUNK_BYTES} bytes" in refused(codec, stored, size)
    assert "says 4096 bytes" in refused(codec, zstandard.compress(TEXT[:PAGE_BYTES]), size + PAGE_BYTES)


def test_a_raw_chunk_of_another_size_is_refused():
    """RAW is as long as its pages."""
    assert "4095 bytes" in refused(Codec.RAW, bytes(4095), 4096)


def test_an_unknown_codec_is_refused():
    """A table from elsewhere may say anything."""
    assert "codec 3" in refused(3, bytes(10), 4096)


@pytest.mark.parametrize(
    "damage",
    [
        lambda frame: frame[:-1],
        lambda frame: frame[: len(frame) // 2],
        lambda frame: frame[:6],
        lambda frame: b"",
        lambda frame: b"\0" * len(frame),
        lambda frame: frame + b"\0",
        lambda frame: frame + frame,
        lambda frame: frame[:40] + bytes(200) + frame[240:],
    ],
    ids=["one short", "half", "header", "empty", "zeros", "one more", "twice", "hole"],
)
@pytest.mark.parametrize("codec", [Codec.ZSTD, Codec.ZSTD_PLANES])
def test_damaged_frames_are_refused(codec, damage):
    """Cut, padded, doubled or overwritten: none becomes pages."""
    refused(codec, damage(zstandard.compress(TEXT)), CHUNK_BYTES)


def test_a_frame_without_its_size_is_refused():
    """Such a frame would have to be decompressed to know it."""
    stored = zstandard.ZstdCompressor(write_content_size=False).compress(TEXT)
    assert "says -1" in refused(Codec.ZSTD, stored, CHUNK_BYTES).replace("18446744073709551615", "-1")


def header(content: int, *, window: int | None = None) -> bytes:
    """The beginning of a zstd frame (RFC 8878) with a content size of 8 bytes, as one segment or with a window of 2**window."""
    magic = 0xFD2FB528.to_bytes(4, "little")
    size = content.to_bytes(8, "little")
    return magic + (b"\xe0" + size if window is None else bytes([0xC0, (window - 10) << 3]) + size)


@pytest.mark.parametrize(
    "head",
    [header(1 << 40), header(1 << 62), header(CHUNK_BYTES), header(CHUNK_BYTES, window=31), header(CHUNK_BYTES, window=21)],
    ids=["1 TiB", "4 EiB", "no content", "window of 2 GiB", "window of 2 MiB"],
)
def test_a_lying_header_allocates_no_more_than_the_chunk(head):
    """Sizes and windows are compared with the page table before anything is allocated by them."""
    tracemalloc.start()
    try:
        before = vm_peak_kib()
        refused(Codec.ZSTD, head + b"\x01\x00\x00", CHUNK_BYTES)
        assert tracemalloc.get_traced_memory()[1] < 2 * CHUNK_BYTES
        assert vm_peak_kib() - before < 64 << 10
    finally:
        tracemalloc.stop()


def vm_peak_kib() -> int:
    """The most address space that this process has had."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmPeak:"))


def test_a_frame_in_a_large_window_is_refused():
    """A window is memory too: what was written with more than a chunk has, was not written by us."""
    parameters = zstandard.ZstdCompressionParameters(window_log=25, write_content_size=True)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    stored = writer.compress(TEXT) + writer.flush()
    refused(Codec.ZSTD, stored, CHUNK_BYTES)


def test_threads_do_not_disturb_each_other():
    """Each has compressors of its own."""
    wrong = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(20):
            begin = draw.randrange(256) * PAGE_BYTES
            part = draw.choice((TEXT, WEIGHTS, NOISE))[begin : begin + 64 * PAGE_BYTES]
            codec, stored = encode(part, level=draw.choice((1, 3)), planes=draw.choice((True, False)))
            if bytes(decode(codec, stored, len(part))) != part:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_zstandard_the_error_names_it(monkeypatch):
    """Compressing and decompressing need a package that is not always there; raw chunks do not."""
    monkeypatch.setitem(sys.modules, "zstandard", None)
    failed = []

    def work() -> None:
        for call in (lambda: encode(TEXT), lambda: decode(Codec.ZSTD, b"x", CHUNK_BYTES)):
            with pytest.raises(SmrError) as caught:
                call()
            failed.append(caught.value)

    thread = threading.Thread(target=work)  # one that has made no compressor yet
    thread.start()
    thread.join()
    assert [error.code for error in failed] == [Code.UNSUPPORTED] * 2
    assert all("zstandard" in str(error) and "pip install" in error.hint for error in failed)
    assert decode(Codec.RAW, NOISE, CHUNK_BYTES) is NOISE
