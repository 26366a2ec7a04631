"""Which GPU of the new container takes the place of which of the checkpoint's: the pairs that the driver's restore wants.

The driver wants every GPU of the checkpoint in the pairs once it is given any, so a map is whole or an error. GPUs are lists in
the order in which the container's processes see them; an index counts in that order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from smr.proto.annotations import GPU_MAP
from smr.proto.checkpoint import Gpu
from smr.proto.errors import Code, SmrError

Pairs = tuple[tuple[str, str], ...]

_UUID = re.compile(r"GPU-([0-9a-f]{8})-([0-9a-f]{4})-([0-9a-f]{4})-([0-9a-f]{4})-([0-9a-f]{12})", re.IGNORECASE)
# Fewer digits of a UUID would pass for an index, or fit by chance.
_INDEX = re.compile(r"\d{1,3}")
_PREFIX = re.compile(r"GPU-[0-9a-f-]+|[0-9a-f]{4}[0-9a-f-]*", re.IGNORECASE)


def pairs(old: Sequence[Gpu], new: Sequence[Gpu], gpu_map: str = "auto") -> Pairs:
    """(old UUID, new UUID) for every GPU of `old`, in its order.

    `auto`: each its own where all are there, else by order. Raises GPU_MISSING for too few or absent GPUs, GPU_MISMATCH where a
    map names a GPU that is not there, ANNOTATION_INVALID for a map that is none.
    """
    if gpu_map == "auto":
        gpu_map = "identity" if _all_there(old, new) else "order"
    if gpu_map == "identity":
        return _identity(old, new)
    if gpu_map == "order":
        return _order(old, new)
    return _explicit(old, new, gpu_map)


def needed(found: Pairs) -> Pairs:
    """The pairs to give to the driver: none when every GPU takes its own place."""
    return found if any(old != new for old, new in found) else ()


def uuid_bytes(uuid: str) -> bytes:
    """The 16 raw bytes of a GPU's UUID, as the driver has them (CUuuid)."""
    match = _UUID.fullmatch(uuid)
    if match is None:
        raise SmrError(f"not the UUID of a GPU: {uuid!r}", hint="needed GPU-xxxxxxxx-xxxx-...", code=Code.GPU_MISMATCH)
    return bytes.fromhex("".join(match.groups()))


def uuid_text(raw: bytes) -> str:
    """The text of 16 raw bytes, as NVML writes it."""
    if len(raw) != 16:
        raise ValueError(f"a UUID has 16 bytes, not {len(raw)}")
    digits = raw.hex()
    return f"GPU-{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def too_few(old: int, new: int) -> SmrError:
    """The error of a container with fewer GPUs than the checkpoint has."""
    has = {0: "no GPU", 1: "1 GPU"}.get(new, f"{new} GPUs")
    return SmrError(
        f"checkpoint has {old} {'GPU' if old == 1 else 'GPUs'}, this container has {has}",
        hint=f"give the container {old}, for example with --device nvidia.com/gpu=all",
        code=Code.GPU_MISSING,
    )


def _all_there(old: Sequence[Gpu], new: Sequence[Gpu]) -> bool:
    return {gpu.uuid for gpu in old} <= {gpu.uuid for gpu in new}


def _identity(old: Sequence[Gpu], new: Sequence[Gpu]) -> Pairs:
    there = {gpu.uuid for gpu in new}
    absent = [gpu.uuid for gpu in old if gpu.uuid not in there]
    if absent:
        raise SmrError(
            f"{absent[0]} of the checkpoint is not among this container's GPUs ({_listed(new)})",
            hint=f"give the container that GPU, or set {GPU_MAP}=order",
            code=Code.GPU_MISSING,
        )
    return tuple((gpu.uuid, gpu.uuid) for gpu in old)


def _order(old: Sequence[Gpu], new: Sequence[Gpu]) -> Pairs:
    if len(new) < len(old):
        raise too_few(len(old), len(new))
    return tuple((before.uuid, now.uuid) for before, now in zip(old, new, strict=False))


def _explicit(old: Sequence[Gpu], new: Sequence[Gpu], gpu_map: str) -> Pairs:
    found: dict[str, str] = {}
    for entry in gpu_map.split(","):
        before, equals, now = (part.strip() for part in entry.partition("="))
        if not (equals and before and now):
            raise _invalid(gpu_map, f"'{entry.strip()}' is not OLD=NEW")
        key = _find(old, before, gpu_map, "the checkpoint's GPUs")
        value = _find(new, now, gpu_map, "this container's GPUs")
        if key in found:
            raise _invalid(gpu_map, f"{key} of the checkpoint is there twice")
        if value in found.values():
            raise _invalid(gpu_map, f"{value} is given twice")
        found[key] = value
    left = [gpu.uuid for gpu in old if gpu.uuid not in found]
    if left:
        raise _invalid(gpu_map, f"{left[0]} of the checkpoint has no new GPU: the driver needs all of them")
    return tuple((gpu.uuid, found[gpu.uuid]) for gpu in old)


def _find(gpus: Sequence[Gpu], word: str, gpu_map: str, whose: str) -> str:
    if word.upper().startswith("MIG-"):
        raise _invalid(gpu_map, f"{word} is a MIG device, which cannot be restored to")
    if _INDEX.fullmatch(word):
        if int(word) < len(gpus):
            return gpus[int(word)].uuid
        raise _absent(gpus, word, whose)
    if not _PREFIX.fullmatch(word):
        raise _invalid(gpu_map, f"{word!r} is neither an index nor the beginning of a UUID")
    start = word.lower().removeprefix("gpu-")
    fits = [gpu.uuid for gpu in gpus if gpu.uuid.lower().removeprefix("gpu-").startswith(start)]
    if len(fits) > 1:
        raise _invalid(gpu_map, f"{word} fits several of {whose}: {', '.join(fits)}")
    if not fits:
        raise _absent(gpus, word, whose)
    return fits[0]


def _absent(gpus: Sequence[Gpu], word: str, whose: str) -> SmrError:
    return SmrError(
        f"{GPU_MAP}: {word} is not among {whose} ({_listed(gpus)})",
        hint="nvidia-smi -L lists a node's GPUs, smr inspect an image's; an index counts the container's GPUs from 0",
        code=Code.GPU_MISMATCH,
    )


def _invalid(gpu_map: str, why: str) -> SmrError:
    return SmrError(
        f"annotation {GPU_MAP}={gpu_map}: {why}",
        hint=f"use {GPU_MAP}=auto|identity|order, or OLD=NEW[,OLD=NEW...] by UUID or index",
        code=Code.ANNOTATION_INVALID,
        annotation=GPU_MAP,
    )


def _listed(gpus: Sequence[Gpu]) -> str:
    return ", ".join(gpu.uuid for gpu in gpus) or "none"
