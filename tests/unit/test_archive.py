"""Import and export of checkpoint archives, good and hostile."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from smr.images import compression
from smr.images.archive import export_archive, import_archive
from smr.images.image import Image
from smr.images.store import Store
from smr.images.tar import Kind
from smr.images.tar_reader import FileStream, TarReader
from smr.proto.checkpoint import MOUNT_ANNOTATION, LayerType
from smr.proto.errors import Code, SmrError
from tests.tar_support import PODMAN_CONFIG, SPEC, Item, criu_files, directory, file, other, podman_items, tar_bytes, write_tar

NETWORK = {"podman": {"interfaces": {"eth0": {"subnets": [{"ipnet": "10.88.0.5/16", "gateway": "10.88.0.1"}]}}}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")


def imported(store: Store, *items: Item, name: str = "warm:1") -> Image:
    """Import a tar of these entries."""
    return import_archive(write_tar(store.root.parent / "archive.tar", items), store, name)


def refused(store: Store, *items: Item) -> SmrError:
    """What the import raises; the store has no image, no blob and no ingest afterwards."""
    with pytest.raises(SmrError) as caught:
        imported(store, *items)
    assert_empty(store)
    return caught.value


def assert_empty(store: Store) -> None:
    """Nothing is in the store."""
    assert store.images() == []
    assert [path for path in store.root.rglob("*") if path.is_file() and path.name not in ("oci-layout", "lock")] == []
    assert not store.root.exists() or list((store.root / "ingest").iterdir()) == []


def layer_entries(image: Image, kind: LayerType) -> dict[str, bytes]:
    """Names and content of the one layer of a kind."""
    (layer,) = image.layers_of(kind)
    with layer.path.open("rb") as tar:
        reader = TarReader(FileStream(tar.fileno()))
        return {entry.name: reader.read(entry, 1 << 20) if entry.kind is Kind.FILE else b"" for entry in reader}


def full_archive(tmp_path: Path, **fields: object) -> list[Item]:
    """podman's archive with everything that can be in it."""
    rootfs = [directory("data/"), file("data/deep/new", b"n"), file("srv/x", b"hi"), file(".wh.plain", b"")]
    extra = [
        file("rootfs-diff.tar", tar_bytes(tmp_path, rootfs)),
        file("deleted.files", json.dumps(["/data/deep", "/data/one"]).encode()),
        file("devshm-checkpoint.tar", tar_bytes(tmp_path, [directory("./"), file("./sem", b"s"), file("./.wh.y", b"")])),
        file("network.status", json.dumps(NETWORK).encode()),
        file("ctr.log", b"line"),
        file("volumes/data.tar", tar_bytes(tmp_path, [file("v", b"1")])),
        file("dump.log", b"not kept"),
        directory("artifacts/"),
    ]
    return podman_items(extra=extra, **fields)  # type: ignore[arg-type]


def test_a_podman_archive_becomes_an_image(store: Store, tmp_path: Path) -> None:
    """Every part of podman's archive finds its layer, and the facts their place in the config."""
    image = imported(store, *full_archive(tmp_path))
    criu = set(criu_files()) - {"../stats-dump", "pages-1.img"}
    assert set(layer_entries(image, LayerType.CRIU)) == criu
    assert [(layer.title, layer.size_bytes) for layer in image.layers_of(LayerType.PAGES)] == [("pages-1.img", 8192)]
    rootfs = layer_entries(image, LayerType.ROOTFS)
    assert rootfs == {"data/.wh.deep": b"", "data/.wh.one": b"", "data/": b"", "data/deep/new": b"n", "srv/x": b"hi"}
    assert next(iter(rootfs)) == "data/.wh.deep", "what was removed and made again is removed first"
    assert layer_entries(image, LayerType.TMPFS) == {"./": b"", "sem": b"s", ".wh.y": b""}
    assert image.layers_of(LayerType.TMPFS)[0].annotations[MOUNT_ANNOTATION] == "/dev/shm"
    titles = [layer.title for layer in image.layers_of(LayerType.ENGINE)]
    assert titles == ["config.dump", "spec.dump", "network.status", "ctr.log", "volumes/data.tar"]
    config = image.config
    assert (config.source.engine, config.source.container_name, config.source.image) == ("podman", "warm", "localhost/serve:1")
    assert (config.source.container_id, config.source.image_digest) == ("c" * 64, "sha256:" + "a" * 64)
    assert (config.host.architecture, config.host.runtime) == ("x86_64", "runc")
    assert config.external_mounts == ("/etc/hosts", "/dev/shm", "/models")
    assert [(task.pid, task.command) for task in config.tasks] == [(7, "serve")]
    assert (config.addresses, config.tcp, config.memory_bytes) == (("10.88.0.5",), "close", 8192)
    assert config.pause_s == pytest.approx(0.065632)
    assert config.spec == SPEC


@pytest.mark.parametrize(("pack", "suffix"), [(gzip.compress, "gz"), (None, "xz"), (None, "bz2")])
def test_compressed_archives_are_read(store: Store, tmp_path: Path, pack: object, suffix: str) -> None:
    """The first bytes tell the compression, not the name."""
    data = tar_bytes(tmp_path, podman_items())
    if pack is None:
        import bz2
        import lzma

        data = (lzma if suffix == "xz" else bz2).compress(data)
    else:
        data = gzip.compress(data)
    (tmp_path / "archive").write_bytes(data)
    assert import_archive(tmp_path / "archive", store, "warm").tag == "latest"


@pytest.mark.parametrize("suffix", ["gz", "xz"])
def test_cut_compressed_archives_are_invalid(store: Store, tmp_path: Path, suffix: str) -> None:
    """A compressed archive that breaks off, or is garbled, is invalid and leaves nothing."""
    import lzma

    data = (gzip if suffix == "gz" else lzma).compress(tar_bytes(tmp_path, podman_items()))
    for broken in (data[:-20], data[: len(data) // 2], data[:60] + b"garbage" + data[67:]):
        (tmp_path / "archive").write_bytes(broken)
        with pytest.raises(SmrError) as caught:
            import_archive(tmp_path / "archive", store, "warm")
        assert caught.value.code is Code.ARCHIVE_INVALID
        assert_empty(store)


def test_zstd_without_a_reader_says_what_to_install(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing reads zstd, the error names the package."""
    (tmp_path / "a.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    monkeypatch.setattr(compression.shutil, "which", lambda _: None)
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    monkeypatch.setitem(__import__("sys").modules, "compression.zstd", None)
    with pytest.raises(SmrError) as caught:
        import_archive(tmp_path / "a.tar.zst", store, "warm")
    assert (caught.value.code, "apt install zstd" in caught.value.hint) == (Code.UNSUPPORTED, True)
    assert_empty(store)


def test_every_truncation_leaves_nothing(store: Store, tmp_path: Path) -> None:
    """Wherever the archive ends too early, the import fails and the store stays empty."""
    data = tar_bytes(tmp_path, full_archive(tmp_path))
    for size in [0, 1, 511, *range(512, len(data) - 1024, 3 * 1024 + 511)]:
        (tmp_path / "cut.tar").write_bytes(data[:size])
        with pytest.raises(SmrError) as caught:
            import_archive(tmp_path / "cut.tar", store, "warm")
        assert caught.value.code is Code.ARCHIVE_INVALID, size
        assert_empty(store)


@pytest.mark.parametrize(
    ("item", "code"),
    [
        (file("../evil", b"x"), Code.ARCHIVE_UNSAFE),
        (file("/etc/evil", b"x"), Code.ARCHIVE_UNSAFE),
        (other("checkpoint/l", Kind.SYMLINK, link="/etc"), Code.ARCHIVE_UNSAFE),
        (other("checkpoint/h", Kind.HARDLINK, link="config.dump"), Code.ARCHIVE_UNSAFE),
        (other("checkpoint/null", Kind.CHAR, device=(1, 3)), Code.ARCHIVE_UNSAFE),
        (other("checkpoint/p", Kind.FIFO), Code.ARCHIVE_UNSAFE),
        (file("config.dump", b"{}"), Code.ARCHIVE_UNSAFE),
        (file("checkpoint", b"x"), Code.ARCHIVE_UNSAFE),
        (file("config.dump/x", b"x"), Code.ARCHIVE_UNSAFE),
        (file("checkpoint/sub/core-1.img", b"x"), Code.ARCHIVE_INVALID),
        (file("checkpoint/n\u00e4me.img", b"x"), Code.ARCHIVE_INVALID),
        (file("checkpoint/a b\n.img", b"x"), Code.ARCHIVE_INVALID),
        (file("checkpoint/pages-x.img", b"x"), Code.ARCHIVE_INVALID),
        (file("deleted.files", b'["/../../etc"]'), Code.ARCHIVE_UNSAFE),
        (file("deleted.files", b'{"no": "array"}'), Code.ARCHIVE_INVALID),
        (file("deleted.files", b"[" * 100_000), Code.ARCHIVE_INVALID),
        (file("network.status", b"[1]"), Code.ARCHIVE_INVALID),
        (file("rootfs-diff.tar", b"no tar" * 200), Code.ARCHIVE_INVALID),
        (file("devshm-checkpoint.tar", b"\1" * 700), Code.ARCHIVE_INVALID),
        (other("checkpoint/parent", Kind.SYMLINK, link="../pre-checkpoint"), Code.UNSUPPORTED),
    ],
    ids=lambda value: value[0].name[:40] if isinstance(value, tuple) else value.value,
)
def test_hostile_entries_are_refused(store: Store, item: Item, code: Code) -> None:
    """What does not belong in a checkpoint archive stops the import with its own code, and leaves nothing."""
    assert refused(store, *podman_items(extra=[item])).code is code


@pytest.mark.parametrize(
    "inner",
    [
        [file("../evil", b"x")],
        [file("/evil", b"x")],
        [other("null", Kind.CHAR, device=(1, 3))],
        [other("h", Kind.HARDLINK, link="../../evil")],
        [file("./", b""), other("", Kind.SYMLINK, link="x")],
    ],
)
@pytest.mark.parametrize("outer", ["rootfs-diff.tar", "devshm-checkpoint.tar"])
def test_hostile_inner_archives_are_refused(store: Store, tmp_path: Path, inner: list[Item], outer: str) -> None:
    """The root's difference and /dev/shm are checked when they are imported, not only when they are applied."""
    error = refused(store, *podman_items(extra=[file(outer, tar_bytes(tmp_path, inner))]))
    assert error.code is Code.ARCHIVE_UNSAFE


@pytest.mark.parametrize(
    "missing", ["config.dump", "spec.dump", "inventory.img", "pstree.img", "core-7.img", "checkpoint/inventory.img"]
)
def test_incomplete_archives_are_invalid(store: Store, missing: str) -> None:
    """Without one of the parts that a restore needs there is no image."""
    assert refused(store, *podman_items(without=[missing])).code is Code.ARCHIVE_INVALID


@pytest.mark.parametrize("spec", [[], "x", {"process": []}, {"mounts": {"no": "array"}}])
def test_a_spec_that_is_none_is_an_error(store: Store, spec: object) -> None:
    """spec.dump has to be an OCI spec."""
    assert refused(store, *podman_items(spec=spec)).code is Code.ARCHIVE_INVALID


def test_other_archives_and_no_archives(store: Store, tmp_path: Path) -> None:
    """A tar of something else, a directory and a missing file each say what was found."""
    assert refused(store, file("README", b"x")).code is Code.UNSUPPORTED
    for path, word in ((tmp_path, "directory"), (tmp_path / "missing", "nothing")):
        with pytest.raises(SmrError) as caught:
            import_archive(path, store, "warm")
        assert (caught.value.code, word in caught.value.message) == (Code.USAGE, True)


def test_an_existing_name_can_be_protected(store: Store) -> None:
    """With `replace` off a name that exists is an error, and its image stays."""
    first = imported(store, *podman_items())
    path = write_tar(store.root.parent / "b.tar", podman_items(extra=[file("ctr.log", b"other")]))
    with pytest.raises(SmrError) as caught:
        import_archive(path, store, "warm:1", replace=False)
    assert caught.value.code is Code.IMAGE_EXISTS
    assert store.resolve("warm:1").digest == first.digest


@pytest.mark.parametrize(
    ("config", "extra", "engine", "digest"),
    [
        (
            {"id": "1" * 64, "rootfsImageRef": "b" * 64, "checkpointedTime": "2026-01-02T03:04:05Z"},
            "bind.mounts",
            "cri-o",
            "b" * 64,
        ),
        (
            {"id": "1" * 64, "rootfsImageRef": "x@sha256:" + "b" * 64, "runtime": "io.containerd.runc.v2"},
            "status",
            "containerd",
            "b" * 64,
        ),
    ],
)
def test_other_engines_are_recognized(
    store: Store, tmp_path: Path, config: Mapping[str, object], extra: str, engine: str, digest: str
) -> None:
    """CRI-O's and containerd's archives have podman's shape; containerd's difference of the root is an OCI layer, compressed."""
    rootfs = gzip.compress(tar_bytes(tmp_path, [file(".wh.gone", b""), file("new", b"1")]))
    image = imported(store, *podman_items(config, extra=[file(extra, b"[]"), file("rootfs-diff.tar", rootfs)]))
    assert image.config.source.engine == engine
    assert image.config.source.image_digest == f"sha256:{digest}"
    if "checkpointedTime" in config:
        assert image.config.created == config["checkpointedTime"]
    assert sorted(layer_entries(image, LayerType.ROOTFS)) == ([".wh.gone", "new"] if engine == "containerd" else ["new"])


def test_an_export_for_podman_gives_the_archive_back(store: Store, tmp_path: Path) -> None:
    """What podman wrote goes out as podman wants it; only what was removed and made again leaves the list of deleted files."""
    image = imported(store, *full_archive(tmp_path))
    assert export_archive(image, tmp_path / "out.tar.gz") == ()
    with tarfile.open(tmp_path / "out.tar.gz", "r:gz") as tar:
        content = {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.isreg()}  # type: ignore[union-attr]
    expected = {f"checkpoint/{name}": data for name, data in criu_files().items() if not name.startswith("..")}
    assert {name: data for name, data in content.items() if name.startswith("checkpoint/")} == expected
    assert json.loads(content["config.dump"]) == PODMAN_CONFIG
    assert json.loads(content["spec.dump"]) == SPEC
    assert json.loads(content["deleted.files"]) == ["/data/one"]
    with tarfile.open(fileobj=io.BytesIO(content["rootfs-diff.tar"])) as inner:
        assert inner.getnames() == ["data", "data/deep/new", "srv/x"]
    assert {"devshm-checkpoint.tar", "network.status", "ctr.log", "volumes/data.tar"} <= set(content)
    again = import_archive(tmp_path / "out.tar.gz", store, "again")
    assert layer_entries(again, LayerType.CRIU) == layer_entries(image, LayerType.CRIU)
    assert again.config.source == image.config.source


def test_an_export_of_another_engines_image_has_a_config_for_podman(store: Store, tmp_path: Path) -> None:
    """config.dump and spec.dump are made up: the source engine's mounts, paths and our annotations are not in them."""
    config = {"id": "1" * 64, "name": "k8s_x", "rootfsImageName": "img:1", "runtime": "crun"}
    image = imported(store, *podman_items(config, extra=[file("bind.mounts", b"[]")]))
    export_archive(image, tmp_path / "out.tar")
    with tarfile.open(tmp_path / "out.tar") as tar:
        made = json.load(tar.extractfile("config.dump"))  # type: ignore[arg-type]
        spec = json.load(tar.extractfile("spec.dump"))  # type: ignore[arg-type]
    assert (made["id"], made["name"], made["runtime"]) == ("1" * 64, "k8s_x", "crun")
    assert (made["rootfsImageName"], made["rootfsImageID"]) == ("img:1", "img:1")
    assert [mount["destination"] for mount in spec["mounts"]] == ["/proc", "/models"]
    assert spec["annotations"] == {"org.test": "kept"}
    assert spec["linux"]["namespaces"] == [{"type": "pid"}, {"type": "network"}]


def test_networks_and_ports_of_a_podman_container_go_out(store: Store, tmp_path: Path) -> None:
    """An image of `smr checkpoint` has podman's inspect document: its networks and ports go out with it."""
    inspect = {
        "Image": "e" * 64,
        "NetworkSettings": {"Networks": {"lan": {}}},
        "HostConfig": {"PortBindings": {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "18000"}], "bad": [{"HostPort": "x"}]}},
    }
    first = imported(store, *podman_items(extra=[file("network.status", json.dumps(NETWORK).encode())]))
    with store.ingest() as ingest:
        for layer in first.layers:
            if layer.kind is not LayerType.ENGINE:
                shutil.copy(layer.path, ingest.path / "layer")
                ingest.add(ingest.path / "layer", layer.kind, title=layer.title)
        (ingest.path / "inspect.json").write_text(json.dumps(inspect))
        ingest.add(ingest.path / "inspect.json", LayerType.ENGINE, title="inspect.json")
        image = ingest.commit("own:1", first.config)
    export_archive(image, tmp_path / "out.tar")
    with tarfile.open(tmp_path / "out.tar") as tar:
        made = json.load(tar.extractfile("config.dump"))  # type: ignore[arg-type]
    assert (made["rootfsImageID"], made["newNetworks"], made["createNetNS"]) == ("e" * 64, {"lan": {}}, True)
    port = {"host_ip": "127.0.0.1", "protocol": "tcp", "container_port": 8000, "host_port": 18000, "range": 1}
    assert made["newPortMappings"] == [port]


def test_our_runtimes_name_does_not_go_out(store: Store, tmp_path: Path) -> None:
    """A container that ran on smr-runtime asks for the real runtime in its export, which every podman knows."""
    image = imported(store, *podman_items(PODMAN_CONFIG | {"runtime": "smr"}))
    export_archive(image, tmp_path / "out.tar")
    with tarfile.open(tmp_path / "out.tar") as tar:
        assert json.load(tar.extractfile("config.dump"))["runtime"] == "runc"  # type: ignore[arg-type]


def test_what_podman_cannot_hold_is_noted(store: Store, tmp_path: Path) -> None:
    """An opaque directory is reported: podman's format has no word for it."""
    rootfs = tar_bytes(tmp_path, [directory("d/"), file("d/.wh..wh..opq", b""), file("d/x", b"1")])
    config = {"id": "1" * 64, "rootfsImageName": "img:1"}
    image = imported(store, *podman_items(config, extra=[file("status", b"{}"), file("rootfs-diff.tar", rootfs)]))
    (note,) = export_archive(image, tmp_path / "out.tar")
    assert "/d was emptied" in note


def test_an_oci_archive_is_the_same_image(store: Store, tmp_path: Path) -> None:
    """Exported and imported as OCI archive the image keeps its digest."""
    image = imported(store, *full_archive(tmp_path))
    export_archive(image, tmp_path / "out.tar", format="oci")
    other_store = Store(tmp_path / "other")
    again = import_archive(tmp_path / "out.tar", other_store, "warm:1")
    assert again.digest == image.digest
    assert other_store.verify(again).ok


def oci_items(image: Image, tmp_path: Path) -> dict[str, bytes]:
    """The files of the image's OCI archive."""
    export_archive(image, tmp_path / "out.tar", format="oci")
    with tarfile.open(tmp_path / "out.tar") as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["layer", "manifest", "config", "missing"])
def test_altered_oci_archives_are_invalid(store: Store, tmp_path: Path, kind: str) -> None:
    """A blob that is not what its digest says stops the import."""
    image = imported(store, *podman_items())
    files = oci_items(image, tmp_path)
    digests = {"layer": image.layers[0].digest, "manifest": image.digest, "config": image.manifest.config.digest}
    name = "blobs/" + digests.get(kind, image.layers[0].digest).replace(":", "/")
    files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
    if kind == "missing":
        del files[name]
    empty = Store(tmp_path / "empty")
    with pytest.raises(SmrError) as caught:
        import_archive(write_tar(tmp_path / "bad.tar", [file(n, d) for n, d in files.items()]), empty, "warm")
    assert caught.value.code is Code.ARCHIVE_INVALID
    assert_empty(empty)


@pytest.mark.parametrize(
    ("index", "code"),
    [
        (b"{}", Code.UNSUPPORTED),
        (b"[]", Code.ARCHIVE_INVALID),
        (b'{"manifests": 1}', Code.ARCHIVE_INVALID),
        (b'{"manifests": [{"mediaType": "x", "digest": "sha256:../../etc/passwd", "size": 1}]}', Code.ARCHIVE_INVALID),
        (b"\xff", Code.ARCHIVE_INVALID),
    ],
)
def test_bad_indexes_are_refused(store: Store, index: bytes, code: Code) -> None:
    """An index that is none, or whose digests are paths."""
    assert refused(store, file("oci-layout", b"{}"), file("index.json", index)).code is code


def blob(files: dict[str, bytes], data: bytes, media_type: str, **fields: object) -> dict[str, object]:
    """Put a blob into a layout; its descriptor."""
    from smr.images.blobs import digest_bytes

    digest = digest_bytes(data)
    files["blobs/" + digest.replace(":", "/")] = data
    return {"mediaType": media_type, "digest": digest, "size": len(data), **fields}


def containerd_layout(tmp_path: Path, *, spec: bytes | None = None) -> list[Item]:
    """What `ctr images export` makes of a containerd checkpoint."""
    files: dict[str, bytes] = {"oci-layout": b"{}"}
    criu = [file(name, data) for name, data in criu_files().items() if "/" not in name]
    value = json.dumps(SPEC).encode()
    length = bytes([len(value) & 0x7F | 0x80, len(value) >> 7])
    index = {
        "schemaVersion": 2,
        "manifests": [
            blob(files, b"{}", "application/vnd.oci.image.manifest.v1+json"),
            blob(files, tar_bytes(tmp_path, criu), "application/vnd.containerd.container.criu.checkpoint.criu.tar"),
            blob(
                files,
                b"\x0a\x05types\x12" + length + value if spec is None else spec,
                "application/vnd.containerd.container.checkpoint.config.v1+proto",
            ),
            blob(
                files,
                gzip.compress(tar_bytes(tmp_path, [file("d/.wh.gone", b""), file("d/new", b"1")])),
                "application/vnd.oci.image.layer.v1.tar+gzip",
            ),
        ],
        "annotations": {
            "io.containerd.checkpoint.runtime": "io.containerd.runc.v2",
            "org.opencontainers.image.ref.name": "docker.io/library/serve:1",
        },
    }
    top = blob(files, json.dumps(index).encode(), "application/vnd.oci.image.index.v1+json")
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [top]}).encode()
    return [file(name, data) for name, data in files.items()]


def test_a_containerd_checkpoint_becomes_an_image(store: Store, tmp_path: Path) -> None:
    """The index that `ctr` exports: CRIU's tar, the spec in its protobuf, the writable layer, the image's name."""
    image = imported(store, *containerd_layout(tmp_path))
    assert image.config.spec == SPEC
    source = image.config.source
    assert (source.engine, source.container_id, source.image) == ("containerd", "c1", "docker.io/library/serve:1")
    assert source.image_digest.startswith("sha256:")
    assert image.config.host.runtime == "runc"
    assert layer_entries(image, LayerType.ROOTFS) == {"d/.wh.gone": b"", "d/new": b"1"}
    assert [layer.title for layer in image.layers_of(LayerType.PAGES)] == ["pages-1.img"]


@pytest.mark.parametrize("spec", [b"", b"\x12\x02[]", b"\x12\x05{", b"\xff" * 20, b"\x0a\x05types"])
def test_a_containerd_checkpoint_without_a_spec_is_invalid(store: Store, tmp_path: Path, spec: bytes) -> None:
    """The spec's protobuf has to hold a JSON object."""
    assert refused(store, *containerd_layout(tmp_path, spec=spec)).code is Code.ARCHIVE_INVALID


def test_a_checkpoint_image_of_podman_becomes_an_image(store: Store, tmp_path: Path) -> None:
    """`podman container checkpoint --create-image` puts the archive into an OCI image; its annotations say more."""
    files: dict[str, bytes] = {"oci-layout": b"{}"}
    annotations = {
        "io.podman.annotations.checkpoint.name": "warm",
        "io.podman.annotations.checkpoint.criu.version": "40101",
        "io.podman.annotations.checkpoint.host.arch": "arm64",
        "io.podman.annotations.checkpoint.host.kernel": "6.1.0",
        "io.podman.annotations.checkpoint.runtime.version": "runc version 1.1.5\ncommit: x",
    }
    layer = gzip.compress(tar_bytes(tmp_path, podman_items()))
    manifest = {
        "schemaVersion": 2,
        "config": blob(files, b"{}", "application/vnd.oci.image.config.v1+json"),
        "layers": [blob(files, layer, "application/vnd.oci.image.layer.v1.tar+gzip")],
        "annotations": annotations,
    }
    top = blob(files, json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [top]}).encode()
    image = imported(store, *[file(name, data) for name, data in files.items()])
    host = image.config.host
    assert (host.architecture, host.kernel, host.criu, host.runtime) == ("aarch64", "6.1.0", "4.1.1", "runc version 1.1.5")


def test_an_export_appears_whole_or_not_at_all(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed export leaves the file that was there, and no other."""
    image = imported(store, *podman_items())
    out = tmp_path / "out" / "a.tar.gz"
    out.parent.mkdir()
    out.write_text("old")
    blob_path = image.layers_of(LayerType.PAGES)[0].path
    monkeypatch.setattr("smr.images.archive_export._tmpfs", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_archive(image, out)
    monkeypatch.undo()
    assert out.read_text() == "old"
    shutil.copy(blob_path, tmp_path / "kept")
    blob_path.chmod(0o600)
    os.truncate(blob_path, 100)
    with pytest.raises(SmrError) as caught:
        export_archive(image, out)
    assert caught.value.code is Code.IMAGE_CORRUPT
    assert [path.name for path in out.parent.iterdir()] == ["a.tar.gz"]


@pytest.mark.parametrize("out", ["missing/a.tar", "."])
def test_an_export_needs_a_place(store: Store, tmp_path: Path, out: str) -> None:
    """A directory, or a name in none, is a usage error."""
    image = imported(store, *podman_items())
    for form in ("oci", "podman"):
        with pytest.raises(SmrError) as caught:
            export_archive(image, tmp_path / out, format=form)
        assert caught.value.code is Code.USAGE
