"""Images that are not what they were: truncated, altered, missing, newer, or no checkpoints at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from smr.images import blobs
from smr.images.blobs import digest_bytes
from smr.images.image import Image
from smr.images.layout import Layout, new_entry
from smr.images.store import Store
from smr.proto.checkpoint import FORMAT_VERSION, LayerType
from smr.proto.errors import Code, SmrError, exit_status
from tests.store_support import commit, files_needed, files_of, make_config, rewrite_blob

BLOBS: dict[str, Callable[[Image], str]] = {
    "manifest": lambda image: image.digest,
    "config": lambda image: image.manifest.config.digest,
    "criu": lambda image: image.layers_of(LayerType.CRIU)[0].digest,
    "pages": lambda image: image.layers_of(LayerType.PAGES)[0].digest,
    "rootfs": lambda image: image.layers_of(LayerType.ROOTFS)[0].digest,
    "tmpfs": lambda image: image.layers_of(LayerType.TMPFS)[0].digest,
}
DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut": lambda path: rewrite_blob(path, path.read_bytes()[:-1]),
    "longer": lambda path: rewrite_blob(path, path.read_bytes() + b"\0"),
    "empty": lambda path: rewrite_blob(path, b""),
    "altered": lambda path: rewrite_blob(path, bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "missing": Path.unlink,
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")


@pytest.fixture
def target(store: Store) -> Path:
    """An empty directory for a restore."""
    path = store.root / "restore"
    path.mkdir(parents=True)
    return path


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("blob", BLOBS)
def test_verify_finds_every_damage_of_every_blob(store: Store, blob: str, damage: str) -> None:
    """Whatever byte of whatever blob changed, verify names that blob and no other."""
    image = commit(store, "llama")
    DAMAGES[damage](image.blob(BLOBS[blob](image)))
    result = store.verify(image)
    assert [problem.what for problem in result.problems] == [blob]
    with pytest.raises(SmrError) as caught:
        result.check()
    assert (caught.value.code, exit_status(caught.value.code)) == (Code.IMAGE_CORRUPT, 5)
    assert BLOBS[blob](image)[7:19] in caught.value.message


@pytest.mark.parametrize(("blob", "damage"), [(b, d) for b in BLOBS for d in DAMAGES])
def test_restore_refuses_a_damaged_image_before_it_writes(store: Store, target: Path, blob: str, damage: str) -> None:
    """The check before a restore sees every wrong size and every byte that was written: IMAGE_CORRUPT, an empty directory."""
    image = commit(store, "llama")
    DAMAGES[damage](image.blob(BLOBS[blob](image)))
    with pytest.raises(SmrError) as caught:
        store.resolve("llama").materialize(target)
    assert caught.value.code is Code.IMAGE_CORRUPT
    assert list(target.iterdir()) == []


def test_a_blob_written_in_place_is_hashed_and_refused(store: Store, target: Path) -> None:
    """One byte of the pages, overwritten where it lies: the size is right, the bytes are not."""
    path = commit(store, "llama").layers_of(LayerType.PAGES)[0].path
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(bytes([path.read_bytes()[0] ^ 1]))
    with pytest.raises(SmrError, match="pages blob"):
        store.resolve("llama").materialize(target)


def test_a_copied_store_is_hashed_once_and_then_trusted(store: Store, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that a copy changed are no damage; after one restore the marks are there again."""
    image = commit(store, "llama")
    for layer in image.layers:
        os.utime(layer.path)
    hashed: list[Path] = []
    real = blobs.digest_file
    monkeypatch.setattr(blobs, "digest_file", lambda path, progress=None: hashed.append(path) or real(path, progress))
    image.check()
    assert set(hashed) == {layer.path for layer in image.layers}
    hashed.clear()
    image.materialize(target)
    assert hashed == []


def test_damage_between_resolve_and_restore_is_seen(store: Store, target: Path) -> None:
    """An image that was whole when it was resolved is looked at again when it is used."""
    image = commit(store, "llama")
    rewrite_blob(image.blob(image.digest), b"{}")
    with pytest.raises(SmrError) as caught:
        image.materialize(target)
    assert caught.value.code is Code.IMAGE_CORRUPT


def test_several_damages_are_one_error_that_names_all(store: Store) -> None:
    """`check` does not stop at the first."""
    image = commit(store, "llama")
    DAMAGES["cut"](image.blob(BLOBS["pages"](image)))
    DAMAGES["missing"](image.blob(BLOBS["rootfs"](image)))
    with pytest.raises(SmrError, match=r"2 of 7 blobs: pages .*, rootfs") as caught:
        store.verify(image).check()
    assert caught.value.code is Code.IMAGE_CORRUPT


def test_commit_of_the_same_content_heals_a_damaged_blob(store: Store) -> None:
    """Importing an image once more over a damaged one makes it whole."""
    image = commit(store, "llama")
    for blob in ("pages", "config", "manifest"):
        DAMAGES["altered"](image.blob(BLOBS[blob](image)))
    assert store.verify(commit(store, "llama")).ok


def test_verify_reports_the_bytes_it_read(store: Store) -> None:
    """Progress adds up to the image, for a bar that ends at 100%."""
    image = commit(store, "llama")
    seen: list[int] = []
    store.verify(image, progress=seen.append)
    assert sum(seen) == image.size_bytes


def test_newer_config_is_refused_as_newer(store: Store, target: Path) -> None:
    """A format version above ours is IMAGE_VERSION with the way out, not damage."""
    commit(store, "llama", config=replace(make_config(), version=FORMAT_VERSION + 1))
    with pytest.raises(SmrError) as caught:
        store.resolve("llama").materialize(target)
    assert caught.value.code is Code.IMAGE_VERSION
    assert "newer SMR" in caught.value.hint
    assert [problem.error.code for problem in store.verify(store.resolve("llama")).problems] == [Code.IMAGE_VERSION]


def put_manifest(store: Store, change: Callable[[dict[str, object]], None]) -> str:
    """Put a changed manifest beside a good one, as another tool would; returns its digest."""
    image = commit(store, "good")
    document = json.loads(image.blob(image.digest).read_bytes())
    change(document)
    data = json.dumps(document).encode()
    digest = digest_bytes(data)
    layout = Layout(store.root)
    layout.blob(digest).write_bytes(data)
    layout.save([*layout.entries(), new_entry("odd", "latest", digest, len(data))])
    return digest


def layer_of(document: dict[str, object], number: int) -> dict[str, object]:
    """One layer of a manifest."""
    layers = document["layers"]
    assert isinstance(layers, list)
    found = layers[number]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("code", "change"),
    [
        (Code.IMAGE_VERSION, lambda d: d.update(artifactType="application/vnd.smr.checkpoint.v2")),
        (Code.IMAGE_VERSION, lambda d: layer_of(d, 0).update(mediaType="application/vnd.smr.vram.v1")),
        (Code.UNSUPPORTED, lambda d: d.update(artifactType="application/vnd.other")),
        (Code.UNSUPPORTED, lambda d: d.pop("artifactType")),
        (Code.IMAGE_CORRUPT, lambda d: d.update(config={"mediaType": "x", "digest": "sha256:../../etc/passwd", "size": 1})),
        (Code.IMAGE_CORRUPT, lambda d: layer_of(d, 0).update(digest="sha256:" + "A" * 64)),
        (Code.IMAGE_CORRUPT, lambda d: layer_of(d, 0).update(size=-1)),
        (Code.IMAGE_CORRUPT, lambda d: layer_of(d, 0).update(annotations=[])),
        (Code.IMAGE_CORRUPT, lambda d: d.update(layers="none")),
        (Code.ARCHIVE_INVALID, lambda d: d.update(layers=[])),
        (Code.ARCHIVE_INVALID, lambda d: layer_of(d, 0).update(annotations={"org.opencontainers.image.title": "../x"})),
        (Code.ARCHIVE_INVALID, lambda d: layer_of(d, 1).update(annotations=layer_of(d, 0)["annotations"])),
    ],
)
def test_manifest_that_is_not_ours_is_refused_for_what_it_is(
    store: Store, code: Code, change: Callable[[dict[str, object]], None]
) -> None:
    """Newer, foreign, garbled and hostile manifests give each their code, and the good image beside them goes on."""
    put_manifest(store, change)
    with pytest.raises(SmrError) as caught:
        store.resolve("odd")
    assert caught.value.code is code
    assert [image.name for image in store.images()] == ["good"]
    assert [item.reference for item in store.broken()] == ["odd:latest"]
    store.remove("odd")
    assert files_of(store) == files_needed(store)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"manifests": 1}', '{"manifests": [{"digest": "x"}]}', "\xff"])
def test_damaged_index_is_said_and_kept(store: Store, text: str) -> None:
    """An index.json that is no index is IMAGE_CORRUPT for reader and writer alike, and nobody overwrites it."""
    commit(store, "llama")
    index = store.root / "index.json"
    index.write_bytes(text.encode("latin-1"))
    for use in (store.images, store.gc, lambda: commit(store, "other"), lambda: store.remove("llama")):
        with pytest.raises(SmrError) as caught:
            use()
        assert caught.value.code is Code.IMAGE_CORRUPT
        assert "index.json" in caught.value.message
    assert index.read_bytes() == text.encode("latin-1")


def test_index_written_by_another_tool_is_read(store: Store) -> None:
    """A name without a tag means latest, one with a registry keeps its port, and an entry without a name has its digest."""
    image = commit(store, "llama")
    index = store.root / "index.json"
    document = json.loads(index.read_bytes())
    plain = {"mediaType": "x", "digest": image.digest, "size": image.manifest_size_bytes}
    names = ({}, {"org.opencontainers.image.ref.name": "copy"}, {"org.opencontainers.image.ref.name": "host:5000/llama:1"})
    document["manifests"] = [plain | ({"annotations": name} if name else {}) for name in names]
    index.write_text(json.dumps(document))
    assert {found.reference for found in store.images()} == {image.digest, "copy:latest", "host:5000/llama:1"}
    assert store.resolve("copy").digest == store.resolve(image.digest[:16]).digest == image.digest
