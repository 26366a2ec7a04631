"""A CRIU image directory as layers of an image, and layers as such a directory: pages that SMR delivers itself apart.

segment, pagetable    what `smr.images.split` takes out; none when the dump is small
pages                 pages-N.img, as CRIU is to read them
criu                  all other files, in one tar
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from smr.images.criutar import is_criu_image, pack
from smr.images.image import Image
from smr.images.ingest import Ingest
from smr.images.segments import page_table, segment_paths
from smr.images.split import Split, split
from smr.proto.checkpoint import LayerType


def add_criu_layers(folder: Path, ingest: Ingest, *, compress: bool = False, done: Split | None = None) -> None:
    """Split the dump in `folder`, which is used up, and hand all of it to `ingest`; `done`: it was split already.

    Raises IMAGE_CORRUPT, DISK_FULL.
    """
    result = done if done is not None else split(folder, segments_folder(ingest), compress=compress)
    for segment in result.segments:
        ingest.add(segment.path, LayerType.SEGMENT, digest=segment.digest)
    if result.segments:
        table = ingest.path / "pagetable"
        table.write_bytes(result.table.to_bytes())
        ingest.add(table, LayerType.PAGETABLE)
    for pages in sorted(folder.glob("pages-*.img")):
        ingest.add(pages, LayerType.PAGES, title=pages.name)
    tar = ingest.path / "criu.tar"
    pack((file for file in sorted(folder.iterdir()) if is_criu_image(file.name)), tar)
    ingest.add(tar, LayerType.CRIU)


def segments_folder(ingest: Ingest) -> Path:
    """The directory of `ingest` for the segments of a dump."""
    folder = ingest.path / "segments"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def whole_directory(image: Image, parent: Path) -> TemporaryDirectory[str]:
    """A temporary directory in `parent` with CRIU's files as they were before the split. Raises DISK_FULL, IMAGE_CORRUPT."""
    import shutil

    from smr.images import criutar
    from smr.images.files import writing
    from smr.images.join import join

    scratch = TemporaryDirectory(dir=parent, prefix=".criu.")
    try:
        folder = Path(scratch.name)
        (small,) = image.layers_of(LayerType.CRIU)
        with writing(folder, image.size_bytes):
            with small.path.open("rb") as tar:
                criutar.unpack(tar, folder)
            for pages in image.layers_of(LayerType.PAGES):
                shutil.copyfile(pages.path, folder / pages.title)
        table = page_table(image)
        if table is not None:
            join(folder, table, segment_paths(image))
    except BaseException:
        scratch.cleanup()
        raise
    return scratch
