"""The image store: commit, resolve, lease, remove, collect."""

from __future__ import annotations

import ast
import json
import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from smr.images import store as store_module
from smr.images.store import Store
from smr.proto.checkpoint import ARTIFACT_TYPE, CONFIG_TYPE, LayerType
from smr.proto.errors import Code, SmrError
from tests.store_support import CRIU_FILES, PAGES, commit, files_needed, files_of, fill, is_digest_of, make_config


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")


def error_of(store: Store, ref: str) -> SmrError:
    """What resolving `ref` raises."""
    with pytest.raises(SmrError) as caught:
        store.resolve(ref)
    return caught.value


def test_missing_root_is_an_empty_store_and_stays_missing(store: Store) -> None:
    """Readers of a store that nobody wrote to make nothing, and say how to get an image."""
    assert store.images() == []
    assert store.gc().blobs == 0
    assert "smr checkpoint" in error_of(store, "llama").hint
    with pytest.raises(SmrError) as caught:
        store.remove("llama")
    assert caught.value.code is Code.IMAGE_NOT_FOUND
    assert not store.root.exists()


def test_commit_gives_an_image_with_its_layers_in_order(store: Store) -> None:
    """A committed image has what was added, under its name, and its config back."""
    made = commit(store, "llama:warm")
    found = store.resolve("llama:warm")
    assert (found.name, found.tag, found.digest) == ("llama", "warm", made.digest)
    assert [layer.kind for layer in found.layers] == [*[LayerType.PAGES] * 2, LayerType.CRIU, LayerType.ROOTFS, LayerType.TMPFS]
    assert {layer.title: layer.path.read_bytes() for layer in found.layers_of(LayerType.PAGES)} == dict(PAGES)
    assert found.layers_of(LayerType.TMPFS)[0].annotations["vnd.smr.mount"] == "/dev/shm"
    assert found.config == make_config()
    assert found.created == make_config().created
    assert found.size_bytes == sum(path.stat().st_size for path in (store.root / "blobs/sha256").iterdir())


def test_layout_on_disk_is_an_oci_image_layout(store: Store) -> None:
    """index.json names the manifest as OCI tools expect it, and the manifest is an artifact of our type."""
    image = commit(store, "team/llama")
    index = json.loads((store.root / "index.json").read_bytes())
    assert json.loads((store.root / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    (entry,) = index["manifests"]
    assert entry["annotations"] == {"org.opencontainers.image.ref.name": "team/llama:latest"}
    assert (entry["digest"], entry["mediaType"]) == (image.digest, "application/vnd.oci.image.manifest.v1+json")
    manifest = json.loads((store.root / "blobs/sha256" / image.digest[7:]).read_bytes())
    assert (manifest["schemaVersion"], manifest["artifactType"], manifest["config"]["mediaType"]) == (
        2,
        ARTIFACT_TYPE,
        CONFIG_TYPE,
    )
    assert manifest["annotations"]["io.podman.annotations.checkpoint.name"] == "llama"
    assert manifest["annotations"]["io.kubernetes.cri-o.annotations.checkpoint.name"] == "llama"
    assert manifest["annotations"]["org.criu.checkpoint.container.name"] == "llama"
    assert manifest["annotations"]["org.opencontainers.image.created"] == image.config.created


def test_blobs_are_read_only_and_directories_private(store: Store) -> None:
    """Memory of a process is nobody else's to read, and a committed blob nobody's to write."""
    commit(store, "llama")
    blobs = list((store.root / "blobs/sha256").iterdir())
    assert len(blobs) == 7
    assert {stat.S_IMODE(blob.stat().st_mode) for blob in blobs} == {0o444}
    assert all(is_digest_of(blob) for blob in blobs)
    directories = [store.root, store.root / "blobs", store.root / "blobs/sha256", store.root / "ingest"]
    assert {stat.S_IMODE(directory.stat().st_mode) for directory in directories} == {0o700}


def test_same_content_is_stored_once(store: Store) -> None:
    """Two images of equal pages share the blobs; an image of equal layers counts them once."""
    commit(store, "a", pages={"pages-1.img": b"same", "pages-2.img": b"same"})
    commit(store, "b", pages={"pages-1.img": b"same"}, config=make_config("2025-03-02T00:00:00Z"))
    assert sum(path.read_bytes() == b"same" for path in (store.root / "blobs/sha256").iterdir()) == 1
    assert store.resolve("a").size_bytes == sum(
        size for size in {d.digest: d.size_bytes for _, d in store.resolve("a").contents()}.values()
    )


def test_ingest_without_commit_leaves_nothing(store: Store) -> None:
    """Leaving the block without a commit, and by an exception, both drop all that was added."""
    commit(store, "llama")
    before = files_of(store)
    with store.ingest() as ingest:
        fill(ingest, pages={"pages-7.img": b"unseen"})
    with pytest.raises(RuntimeError), store.ingest() as ingest:
        fill(ingest, pages={"pages-8.img": b"unseen"})
        raise RuntimeError
    assert files_of(store) == before


def test_ingest_takes_one_commit_and_nothing_after(store: Store) -> None:
    """After the commit neither a file nor a second commit is taken."""
    with store.ingest() as ingest:
        fill(ingest)
        ingest.commit("llama", make_config())
        (ingest.path / "late").write_bytes(b"")
        with pytest.raises(SmrError, match="done"):
            ingest.add(ingest.path / "late", LayerType.ENGINE)
        with pytest.raises(SmrError, match="done"):
            ingest.commit("again", make_config())
    assert [image.reference for image in store.images()] == ["llama:latest"]


def test_add_moves_the_file_and_takes_no_link(store: Store, tmp_path: Path) -> None:
    """What was added is gone from where it was; a symbolic link could name any file of the host."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"x")
    (tmp_path / "link").symlink_to(outside)
    with store.ingest() as ingest:
        with pytest.raises(SmrError, match="not a regular file"):
            ingest.add(tmp_path / "link", LayerType.ENGINE)
        ingest.add(outside, LayerType.ENGINE, title="x")
    assert not outside.exists()


@pytest.mark.parametrize("count", [0, 2])
def test_commit_needs_exactly_one_criu_layer(store: Store, count: int) -> None:
    """A checkpoint without CRIU's images, or with two sets of them, is refused before it is visible."""
    with pytest.raises(SmrError) as caught, store.ingest() as ingest:
        for number in range(count):
            (ingest.path / str(number)).write_bytes(bytes(1024))
            ingest.add(ingest.path / str(number), LayerType.CRIU)
        ingest.commit("llama", make_config())
    assert caught.value.code is Code.ARCHIVE_INVALID
    assert f"found {count}" in caught.value.message
    assert store.images() == []


@pytest.mark.parametrize("title", ["", "../pages-1.img", "pages-1.img/x", "core-1.img", "pages-x.img"])
def test_commit_refuses_pages_under_another_name(store: Store, title: str) -> None:
    """The title becomes a file name beside CRIU's images, so it is one that CRIU gives."""
    with pytest.raises(SmrError) as caught, store.ingest() as ingest:
        fill(ingest, pages={})
        (ingest.path / "p").write_bytes(b"x")
        ingest.add(ingest.path / "p", LayerType.PAGES, title=title)
        ingest.commit("llama", make_config())
    assert caught.value.code is Code.ARCHIVE_INVALID


def test_replace_gives_the_new_image_and_drops_the_old(store: Store) -> None:
    """The name is the new image's at once; what only the old one needed goes."""
    old = commit(store, "llama", pages={"pages-1.img": b"old"})
    new = commit(store, "llama", pages={"pages-1.img": b"new"})
    assert store.resolve("llama").digest == new.digest != old.digest
    assert files_of(store) == files_needed(store)
    assert error_of(store, old.digest).code is Code.IMAGE_NOT_FOUND


def test_commit_without_replace_keeps_the_first(store: Store) -> None:
    """IMAGE_EXISTS leaves the store as it was."""
    first = commit(store, "llama")
    with pytest.raises(SmrError) as caught:
        commit(store, "llama", pages={}, replace=False)
    assert caught.value.code is Code.IMAGE_EXISTS
    assert store.resolve("llama").digest == first.digest
    assert files_of(store) == files_needed(store)


def test_commit_by_a_digest_is_refused(store: Store) -> None:
    """Nobody chooses a digest."""
    with pytest.raises(SmrError) as caught:
        commit(store, "sha256:" + "a" * 64)
    assert caught.value.code is Code.ANNOTATION_INVALID


def test_resolve_takes_tags_digests_and_prefixes(store: Store) -> None:
    """All forms of a reference lead to the image."""
    image = commit(store, "llama")
    tagged = commit(store, "llama:other", config=make_config("2025-03-05T00:00:00Z"))
    assert store.resolve("llama").digest == image.digest
    assert store.resolve("llama:latest").digest == image.digest
    assert store.resolve("llama:other").digest == tagged.digest
    assert store.resolve(tagged.digest).reference == "llama:other"
    assert store.resolve(tagged.digest[:20]).digest == tagged.digest
    assert store.resolve(f"llama@{image.digest}").reference == "llama:latest"
    assert error_of(store, f"mistral@{image.digest}").code is Code.IMAGE_NOT_FOUND


def test_ambiguous_digest_prefix_is_refused(store: Store) -> None:
    """A prefix that begins two digests is an error that shows longer ones, never a guess."""
    commit(store, "llama")
    index = store.root / "index.json"
    document = json.loads(index.read_bytes())
    first = document["manifests"][0]
    twin = dict(first, digest=first["digest"][:-1] + ("0" if first["digest"][-1] != "0" else "1"))
    document["manifests"].append(twin | {"annotations": {"org.opencontainers.image.ref.name": "twin:latest"}})
    index.write_text(json.dumps(document))
    error = error_of(store, first["digest"][:20])
    assert error.code is Code.IMAGE_NOT_FOUND
    assert "ambiguous" in error.message
    assert first["digest"][:24] in error.hint


@pytest.mark.parametrize(
    ("ref", "hint"),
    [
        ("lama:warm", "did you mean llama:warm"),
        ("llama", "did you mean llama:warm"),
        ("llama:cold", "did you mean llama:warm"),
        ("zebra", "smr images ls"),
        ("sha256:0123456789ab", "smr images ls"),
    ],
)
def test_unknown_image_suggests_what_is_near(store: Store, ref: str, hint: str) -> None:
    """IMAGE_NOT_FOUND names other tags of the name, or similar names, or the command that lists."""
    commit(store, "llama:warm")
    error = error_of(store, ref)
    assert error.code is Code.IMAGE_NOT_FOUND
    assert hint in error.hint


def test_images_are_listed_newest_first(store: Store) -> None:
    """`images` sorts by the time of the checkpoint, not of the commit."""
    for name, day in (("b", 2), ("c", 3), ("a", 1)):
        commit(store, name, config=make_config(f"2025-03-0{day}T00:00:00Z"))
    assert [image.name for image in store.images()] == ["c", "b", "a"]


def test_remove_of_one_name_keeps_the_image_under_the_other(store: Store) -> None:
    """An image of two names loses one; with the last it goes, and its blobs."""
    image = commit(store, "llama:a")
    commit(store, "llama:b")
    first = store.remove("llama:a")
    assert (first.names, first.digest) == (("llama:a",), "")
    assert store.verify(store.resolve("llama:b")).ok
    last = store.remove("llama:b")
    assert (last.digest, last.size_bytes) == (image.digest, image.size_bytes)
    assert files_of(store) == {"oci-layout", "index.json"}


def test_remove_by_digest_takes_all_names(store: Store) -> None:
    """By its digest the image goes, whatever it was called."""
    image = commit(store, "llama:a")
    commit(store, "llama:b")
    assert set(store.remove(image.digest[:20]).names) == {"llama:a", "llama:b"}
    assert store.images() == []


def test_remove_keeps_blobs_that_another_image_needs(store: Store) -> None:
    """Shared pages stay as long as one image has them."""
    commit(store, "a")
    commit(store, "b", config=make_config("2025-03-02T00:00:00Z"))
    store.remove("a")
    assert store.verify(store.resolve("b")).ok
    assert files_of(store) == files_needed(store)


def test_leased_image_is_not_removed_but_may_lose_a_name(store: Store) -> None:
    """IMAGE_IN_USE while somebody holds a lease; afterwards it goes."""
    commit(store, "llama:a")
    commit(store, "llama:b")
    with store.leased("llama:a") as image, store.lease(image):
        store.remove("llama:b")
        with pytest.raises(SmrError) as caught:
            store.remove("llama:a")
        assert caught.value.code is Code.IMAGE_IN_USE
        assert store.verify(store.resolve("llama:a")).ok
    assert store.remove("llama:a").digest == image.digest


def test_forced_removal_of_a_leased_image_keeps_its_blobs_until_the_lease_ends(store: Store) -> None:
    """Name and listing are gone at once; gc takes the data when the last user is done."""
    commit(store, "llama")
    with store.leased("llama") as image:
        store.remove("llama", force=True)
        assert store.images() == []
        assert store.gc().blobs == 0
        assert store.verify(image).ok
    assert store.gc().blobs == 7
    assert files_of(store) == {"oci-layout", "index.json"}


def test_replaced_image_stays_whole_for_who_leased_it(store: Store) -> None:
    """A restore that runs from the old image is not disturbed by a commit under its name."""
    commit(store, "llama", pages={"pages-1.img": b"old"})
    with store.leased("llama") as old:
        new = commit(store, "llama", pages={"pages-1.img": b"new"})
        store.gc()
        assert store.verify(old).ok
    assert store.gc().blobs > 0
    assert store.verify(new).ok


def test_lease_of_an_image_that_was_removed_meanwhile_fails(store: Store) -> None:
    """Between resolve and lease the image may go: IMAGE_NOT_FOUND, never a lease on nothing."""
    image = commit(store, "llama")
    store.remove("llama")
    with pytest.raises(SmrError) as caught, store.lease(image):
        pass
    assert caught.value.code is Code.IMAGE_NOT_FOUND


def test_lease_by_name_follows_a_replacement(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """`leased` looks again when the image it resolved was replaced before it was leased."""
    commit(store, "llama", pages={"pages-1.img": b"old"})
    resolve = Store.resolve
    calls = []

    def slow_resolve(self: Store, ref: str) -> object:
        found = resolve(self, ref)
        if not calls:
            calls.append(commit(self, "llama", pages={"pages-1.img": b"new"}).digest)
        return found

    monkeypatch.setattr(Store, "resolve", slow_resolve)
    with store.leased("llama") as image:
        assert image.digest == calls[0]


def test_gc_leaves_an_ingest_in_flight_alone(store: Store) -> None:
    """What is being added is neither a dead ingest nor garbage; its commit succeeds after the gc."""
    with store.ingest() as ingest:
        fill(ingest)
        collected = store.gc()
        assert (collected.blobs, collected.ingests) == (0, 0)
        image = ingest.commit("llama", make_config())
    assert store.verify(image).ok


def test_gc_between_the_commits_of_shared_blobs_loses_none(store: Store) -> None:
    """A blob that an ingest shares with an image that is removed before the commit is there after it."""
    commit(store, "first")
    with store.ingest() as ingest:
        fill(ingest)
        store.remove("first")
        store.gc()
        image = ingest.commit("second", make_config())
    assert store.verify(image).ok


def test_dead_ingests_and_stray_files_are_swept(store: Store) -> None:
    """What a killed maker left goes with gc, and dead ingests with the next ingest."""
    commit(store, "llama")
    dead = store.root / "ingest" / "dead"

    def ingest() -> None:
        with store.ingest():
            assert not dead.exists()

    for sweep in (store.gc, ingest):
        (dead / "work/deep").mkdir(parents=True)
        (dead / "work/deep/file").write_bytes(b"x")
        sweep()
        assert not dead.exists()
    (store.root / "blobs/sha256" / ("a" * 64)).write_bytes(b"orphan")
    (store.root / ".index.json.tmp").write_bytes(b"half")
    assert store.gc().size_bytes == len(b"orphan")
    assert files_of(store) == files_needed(store)


def test_gc_drops_nothing_while_an_image_cannot_be_read(store: Store) -> None:
    """With a damaged manifest nobody knows what its image needs: gc says so, rm of it helps."""
    commit(store, "good", config=make_config("2025-04-01T00:00:00Z"))
    bad = commit(store, "bad")
    (store.root / "blobs/sha256" / bad.digest[7:]).unlink()
    before = files_of(store)
    with pytest.raises(SmrError) as caught:
        store.gc()
    assert caught.value.code is Code.IMAGE_CORRUPT
    assert files_of(store) == before
    assert [(item.reference, item.error.code) for item in store.broken()] == [("bad:latest", Code.IMAGE_CORRUPT)]
    assert [image.name for image in store.images()] == ["good"]
    store.remove("bad")
    assert files_of(store) == files_needed(store)


def test_concurrent_commits_all_succeed(store: Store) -> None:
    """Makers in several threads, of different names and of one, disturb neither each other nor a gc."""
    barrier = Barrier(6)

    def make(number: int) -> None:
        barrier.wait()
        for turn in range(4):
            commit(store, f"own-{number}", config=make_config(f"2025-03-{number + 1:02}T00:00:{turn:02}Z"))
            commit(store, "shared", config=make_config(f"2025-04-{number + 1:02}T00:00:{turn:02}Z"))
            store.gc()

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(make, range(6))) == [None] * 6
    assert {image.name for image in store.images()} == {"shared", *(f"own-{number}" for number in range(6))}
    assert all(store.verify(image).ok for image in store.images())
    assert files_of(store) == files_needed(store)


def test_materialize_gives_criu_its_directory(store: Store) -> None:
    """CRIU's files are copies, free to edit; pages are there by name; the image stays as it was."""
    image = commit(store, "llama")
    target = store.root / "restore"
    target.mkdir()
    image.materialize(target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {**CRIU_FILES, **PAGES}
    assert all((target / layer.title).samefile(layer.path) for layer in image.layers_of(LayerType.PAGES))
    (target / "core-1.img").write_bytes(b"edited")
    assert store.verify(image).ok


def test_materialize_needs_an_empty_directory(store: Store) -> None:
    """Nothing is mixed with what is there, and nothing of it is removed."""
    image = commit(store, "llama")
    target = store.root / "restore"
    target.mkdir()
    (target / "kept").write_bytes(b"")
    with pytest.raises(SmrError, match="not empty"):
        image.materialize(target)
    assert os.listdir(target) == ["kept"]


def test_restore_path_imports_the_standard_library_only() -> None:
    """Resolving and materializing must not load click, rich, structlog or protobuf, nor threads it does not use."""
    folder = Path(store_module.__file__).parent
    names = ("store", "layout", "image", "manifest", "blobs", "files", "reference", "criutar", "prefetch", "pagecache")
    heads = set()
    for name in names:
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            heads |= {module.partition(".")[0] for module in modules}
    assert heads - set(sys.stdlib_module_names) == {"smr"}
