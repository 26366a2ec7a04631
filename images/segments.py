"""The segments of an image, and the page table that says where their chunks belong. Standard library only."""

from __future__ import annotations

from pathlib import Path

from smr.images.image import Image
from smr.images.pagetable import PageTable, parse_table
from smr.proto.checkpoint import LayerType
from smr.proto.errors import Code, SmrError


def page_table(image: Image) -> PageTable | None:
    """The image's page table, which fits its segments; None when all pages are CRIU's. Raises IMAGE_CORRUPT, IMAGE_VERSION."""
    layers = image.layers_of(LayerType.PAGETABLE)
    if not layers:
        return None
    table = parse_table(layers[0].path.read_bytes(), f"page table of {image.reference}")
    found = [layer.size_bytes for layer in image.layers_of(LayerType.SEGMENT)]
    if list(table.segments) != found:
        raise SmrError(
            f"page table of {image.reference}: needed {len(table.segments)} segments, found {len(found)}, or of other sizes",
            hint="make or import the image again",
            code=Code.IMAGE_CORRUPT,
            image=image.reference,
        )
    return table


def segment_paths(image: Image) -> list[Path]:
    """The image's segments, as the page table counts them."""
    return [layer.path for layer in image.layers_of(LayerType.SEGMENT)]
