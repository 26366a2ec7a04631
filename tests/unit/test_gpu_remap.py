"""Which GPU takes the place of which: by itself, by order, by hand; a map is whole or an error."""

from __future__ import annotations

import pytest

from smr.proto.checkpoint import Gpu
from smr.proto.errors import Code, SmrError
from smr.shim.gpu import remap
from tests.fakes.nvml import uuid

A, B, C, D = (uuid(digit) for digit in (0xA, 0xB, 0xC, 0xD))


def gpus(*uuids: str) -> list[Gpu]:
    """GPUs of one model."""
    return [Gpu(uuid=one, name="NVIDIA H200", memory_bytes=1) for one in uuids]


def failure(old: list[Gpu], new: list[Gpu], gpu_map: str) -> SmrError:
    """The error of a map that must not do."""
    with pytest.raises(SmrError) as caught:
        remap.pairs(old, new, gpu_map)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("old", "new", "gpu_map", "expected"),
    [
        ((A, B), (B, A), "auto", ((A, A), (B, B))),
        ((A, B), (C, B, A), "auto", ((A, A), (B, B))),
        ((A, B), (B, C), "auto", ((A, B), (B, C))),
        ((A,), (C, D), "auto", ((A, C),)),
        ((A, B), (B, A), "order", ((A, B), (B, A))),
        ((A, B), (B, A), "identity", ((A, A), (B, B))),
        ((A, B), (C, D), "1=0,0=1", ((A, D), (B, C))),
        ((A, B), (C, D), f" {B} = {C} , {A}={D}", ((A, D), (B, C))),
        ((A, B), (C, D), "gpu-aaaa=dddd,GPU-BB=0", ((A, D), (B, C))),
        ((), (C,), "auto", ()),
    ],
)
def test_maps(old: tuple[str, ...], new: tuple[str, ...], gpu_map: str, expected: remap.Pairs) -> None:
    """Every old GPU has a pair, in the old order."""
    assert remap.pairs(gpus(*old), gpus(*new), gpu_map) == expected


@pytest.mark.parametrize(
    ("old", "new", "gpu_map", "code", "message"),
    [
        ((A, B), (C,), "auto", Code.GPU_MISSING, "checkpoint has 2 GPUs, this container has 1 GPU"),
        ((A,), (), "order", Code.GPU_MISSING, "checkpoint has 1 GPU, this container has no GPU"),
        ((A,), (C,), "identity", Code.GPU_MISSING, f"{A} of the checkpoint is not among"),
        ((A,), (C,), "0=1", Code.GPU_MISMATCH, "1 is not among this container's GPUs"),
        ((A,), (C,), f"{B}=0", Code.GPU_MISMATCH, "is not among the checkpoint's GPUs"),
        ((A, B), (C, D), "0=0", Code.ANNOTATION_INVALID, f"{B} of the checkpoint has no new GPU"),
        ((A, B), (C, D), "0=0,1=0", Code.ANNOTATION_INVALID, f"{C} is given twice"),
        ((A, B), (C, D), "0=0,0=1", Code.ANNOTATION_INVALID, f"{A} of the checkpoint is there twice"),
        ((A,), (C,), "0", Code.ANNOTATION_INVALID, "'0' is not OLD=NEW"),
        ((A,), (C,), "0=", Code.ANNOTATION_INVALID, "is not OLD=NEW"),
        ((A,), (C,), "", Code.ANNOTATION_INVALID, "is not OLD=NEW"),
        ((A,), (C,), "0=0,", Code.ANNOTATION_INVALID, "'' is not OLD=NEW"),
        ((A,), (C,), "0=nvidia1", Code.ANNOTATION_INVALID, "neither an index nor"),
        ((A,), (C,), "0=-1", Code.ANNOTATION_INVALID, "neither an index nor"),
        ((A,), (C,), f"0=MIG-{C[4:]}", Code.ANNOTATION_INVALID, "MIG device"),
        ((A,), (C, C[:-1] + "d"), "0=cccc", Code.ANNOTATION_INVALID, "fits several"),
        ((A,), (C,), "random", Code.ANNOTATION_INVALID, "'random' is not OLD=NEW"),
    ],
)
def test_maps_that_do_not_do(old: tuple[str, ...], new: tuple[str, ...], gpu_map: str, code: Code, message: str) -> None:
    """What is wrong is named: too few GPUs, one that is not there, a map that is none."""
    error = failure(gpus(*old), gpus(*new), gpu_map)
    assert error.code is code
    assert message in error.message


def test_pairs_for_the_driver() -> None:
    """None when every GPU takes its own place, all as soon as one moves."""
    assert remap.needed(((A, A), (B, B))) == ()
    assert remap.needed(((A, A), (B, C))) == ((A, A), (B, C))


def test_bytes_of_a_uuid() -> None:
    """As the driver has them, there and back."""
    text = "GPU-5f9c1e2a-0b1c-2d3e-4f50-61728394a5b6"
    raw = remap.uuid_bytes(text)
    assert raw == bytes.fromhex("5f9c1e2a0b1c2d3e4f5061728394a5b6")
    assert remap.uuid_text(raw) == text
    assert remap.uuid_bytes(text.upper()) == raw


@pytest.mark.parametrize("text", ["", "GPU-5f9c1e2a", "MIG-5f9c1e2a-0b1c-2d3e-4f50-61728394a5b6", "GPU-" + "0" * 32])
def test_what_is_no_uuid(text: str) -> None:
    """An image may say anything."""
    with pytest.raises(SmrError) as caught:
        remap.uuid_bytes(text)
    assert caught.value.code is Code.GPU_MISMATCH
    with pytest.raises(ValueError, match="16 bytes"):
        remap.uuid_text(b"short")
