"""An image of a node's store with CRIU's small files edited: as from another machine, or as from one that writes garbage."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from smr.images import criutar
from smr.images.store import Store
from smr.proto.checkpoint import LayerType
from tests.integration.node import Node


def edited(node: Node, source: str, name: str, edit: Callable[[Path], None], process: Mapping[str, object] | None = None) -> None:
    """Commit `name`: the image `source` after `edit` has worked on the directory of its small files. All digests are right.

    `process`: more members of `process` in its spec.
    """
    store = Store(node.store)
    with store.leased(source) as image, store.ingest() as ingest:
        folder = ingest.path / "criu"
        folder.mkdir()
        for number, layer in enumerate(image.layers):
            copy = ingest.path / f"layer{number}"
            shutil.copyfile(layer.path, copy)
            if layer.kind is LayerType.CRIU:
                with copy.open("rb") as tar:
                    criutar.unpack(tar, folder)
                edit(folder)
                copy = ingest.path / "criu.tar"
                criutar.pack(folder.iterdir(), copy)
            ingest.add(copy, layer.kind, title=layer.title, annotations=dict(layer.annotations))
        spec = image.config.spec
        had = spec["process"]
        assert isinstance(had, dict)
        ingest.commit(name, replace(image.config, spec={**spec, "process": {**had, **(process or {})}}))
