"""The chain id of a container's image, from podman's own files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from smr.shim.engines.image_layers import layers_of_bundle

BASE, TOP = "sha256:" + "1" * 64, "sha256:" + "2" * 64


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A storage with an image of two layers, and a container of it."""
    files: dict[str, list[dict[str, object]]] = {
        "overlay-containers/volatile-containers.json": [{"id": "c", "image": "i", "layer": "own"}],
        "overlay-images/images.json": [{"id": "i", "layer": "top", "names": ["moved:1"]}],
        "overlay-layers/layers.json": [
            {"id": "base", "diff-digest": BASE},
            {"id": "top", "parent": "base", "diff-digest": TOP},
            {"id": "own", "parent": "top"},
        ],
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def test_the_chain_is_that_of_the_specification(graph: Path) -> None:
    """Each digest is hashed behind the chain below it, with a blank between; the container's own layer is not the image's."""
    expected = "sha256:" + hashlib.sha256(f"{BASE} {TOP}".encode()).hexdigest()
    assert layers_of_bundle(graph / "overlay-containers/c/userdata", "c") == expected


@pytest.mark.parametrize("damage", ["overlay-containers/volatile-containers.json", "overlay-layers/layers.json"])
def test_what_cannot_be_read_is_not_known(graph: Path, damage: str) -> None:
    """No error of an engine's files fails a restore."""
    (graph / damage).write_text("[{}, 7")
    assert layers_of_bundle(graph / "overlay-containers/c/userdata", "c") == ""


def test_a_layer_without_a_digest_is_not_known(graph: Path) -> None:
    """Layers that were pulled in part have none."""
    layers = json.loads((graph / "overlay-layers/layers.json").read_text())
    del layers[0]["diff-digest"]
    (graph / "overlay-layers/layers.json").write_text(json.dumps(layers))
    assert layers_of_bundle(graph / "overlay-containers/c/userdata", "c") == ""


def test_other_bundles_have_none(tmp_path: Path) -> None:
    """A bundle that no engine has made."""
    assert layers_of_bundle(tmp_path, "c") == ""
