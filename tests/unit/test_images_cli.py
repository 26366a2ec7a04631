"""`smr images` and `smr prefetch`, as a user and as a program call them."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from smr.images.pagecache import cached_bytes_of
from smr.images.store import Store
from smr.proto.checkpoint import CudaTask, Gpu, GpuState, Hooks, LayerType
from smr.shim.cli import main
from tests.store_support import commit, make_config, rewrite_blob


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store that the commands use."""
    monkeypatch.setenv("SMR_CONFIG", str(tmp_path / "none.toml"))
    monkeypatch.setenv("SMR_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("SMR_RUN", str(tmp_path / "run"))
    return Store(tmp_path / "store")


class Smr:
    """Runs the command in this process and keeps what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str, status: int = 0) -> str:
        """Standard output of `smr WORDS`, which must exit with `status`."""
        with pytest.raises(SystemExit) as caught:
            main(list(words))
        out, self.err = self._capsys.readouterr()
        assert caught.value.code == status, self.err
        return out

    def json(self, *words: str, status: int = 0) -> object:
        """What `smr WORDS --json` printed."""
        return json.loads(self(*words, "--json", status=status))


@pytest.fixture
def smr(capsys: pytest.CaptureFixture[str]) -> Smr:
    """The command."""
    return Smr(capsys)


def test_ls_lists_names_sizes_and_origin(store: Store, smr: Smr) -> None:
    """One line an image; the same as JSON."""
    image = commit(store, "team/llama:warm")
    line = smr("images", "ls").splitlines()[1]
    assert line.split()[:2] == ["team/llama:warm", image.digest[7:19]]
    assert "podman llama" in line
    assert smr.json("images", "ls") == [
        {
            "reference": "team/llama:warm",
            "name": "team/llama",
            "tag": "warm",
            "digest": image.digest,
            "created": image.created,
            "size_bytes": image.size_bytes,
            "cached_share": 1.0,
            "pinned": False,
        }
    ]


def test_ls_shows_the_share_that_is_in_memory(store: Store, smr: Smr) -> None:
    """A percentage a line, segments counted by their bytes."""
    image = commit(store, "llama", pages={"pages-1.img": os.urandom(1 << 20), "pages-2.img": os.urandom(3 << 20)})
    assert "100%" in smr("images", "ls").splitlines()[1].split()
    large = max(image.layers, key=lambda layer: layer.size_bytes)
    fd = os.open(large.path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    if cached_bytes_of(large.path):
        pytest.skip("this file system keeps files in memory (tmpfs)")
    (line,) = smr("images", "ls").splitlines()[1:]
    assert {"25%", "26%"} & set(line.split())
    found = smr.json("images", "ls")
    assert isinstance(found, list)
    assert found[0]["cached_share"] == pytest.approx(0.25, abs=0.02)


def test_pin_list_of_nothing(store: Store, smr: Smr) -> None:
    """No pin is not an error; an image that is not there is one."""
    assert smr.json("pin", "--list") == []
    smr("pin", "lama", status=3)
    smr("unpin", "lama", status=3)


def test_ls_of_an_empty_store(store: Store, smr: Smr) -> None:
    """No image is not an error."""
    assert smr.json("images", "ls") == []
    assert not store.root.exists()


def test_ls_goes_on_past_damaged_images(store: Store, smr: Smr) -> None:
    """A manifest or a config that cannot be read is said in its line, and the others are listed."""
    good, config, manifest = (commit(store, name, config=make_config(f"2025-01-01T00:00:0{n}Z")) for n, name in enumerate("abc"))
    rewrite_blob(config.blob(config.manifest.config.digest), b"x")
    rewrite_blob(manifest.blob(manifest.digest), b"x")
    text = smr("images", "ls")
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["b:latest", "a:latest", "c:latest"]
    assert text.count("image_corrupt") == 2
    found = smr.json("images", "ls")
    assert isinstance(found, list)
    assert found[2]["error"]["code"] == "image_corrupt"
    assert good.digest == found[1]["digest"]


def test_inspect_shows_container_host_and_layers(store: Store, smr: Smr) -> None:
    """What a user asks of an image stands there; the JSON has all of the config."""
    image = commit(store, "llama")
    text = smr("images", "inspect", "llama")
    for part in (image.digest, "docker.io/library/llama:1", "CRIU 4.1.1", "1 serve", "pages-2.img", "rootfs", "tmpfs"):
        assert part in text
    found = smr.json("images", "inspect", "llama")
    assert isinstance(found, dict)
    assert found["config"]["source"]["container_name"] == "llama"
    assert [layer["size"] for layer in found["layers"]] == [layer.size_bytes for layer in image.layers]
    assert found["annotations"]["io.podman.annotations.checkpoint.name"] == "llama"
    assert 0 <= found["cached_share"] <= 1


def test_inspect_shows_gpus_and_hooks(store: Store, smr: Smr) -> None:
    """GPUs by model, the driver, the GPU memory of each process on each GPU, and the hooks; none of it for others."""
    state = GpuState(
        driver="580.159.04",
        gpus=(
            Gpu(uuid="GPU-1", name="NVIDIA H200", memory_bytes=140 << 30),
            Gpu(uuid="GPU-2", name="NVIDIA H200", memory_bytes=140 << 30),
        ),
        tasks=(CudaTask(pid=1, vram_bytes={"GPU-1": 8 << 30, "GPU-2": 512 << 20}), CudaTask(pid=7)),
    )
    hooks = Hooks(quiesce="vllm", resume="POST /resume")
    commit(store, "llama:gpu", config=replace(make_config(), gpu=state, hooks=hooks))
    lines = smr("images", "inspect", "llama:gpu").splitlines()
    found = {line[:16].strip(): line[16:] for line in lines}
    assert found["gpus"] == "2 x NVIDIA H200, 140.0 GiB; driver 580.159.04"
    assert found["gpu memory"] == "1 serve: 8.0 GiB + 512.0 MiB, 7: 0 B"
    assert (found["quiesce"], found["resume"]) == ("vllm", "POST /resume")
    commit(store, "llama:cpu")
    without = smr("images", "inspect", "llama:cpu")
    assert not any(word in without for word in ("gpu", "quiesce", "resume"))


def test_unknown_image_exits_3_with_a_suggestion(store: Store, smr: Smr) -> None:
    """Message and hint on stderr; with --json the error on stdout."""
    commit(store, "llama:warm")
    smr("images", "inspect", "lama:warm", status=3)
    assert "no image lama:warm" in smr.err
    assert "did you mean llama:warm?" in smr.err
    found = smr.json("images", "inspect", "lama:warm", status=3)
    assert isinstance(found, dict)
    assert found["error"]["code"] == "image_not_found"


def test_rm_removes_several_and_says_what_was_freed(store: Store, smr: Smr) -> None:
    """Names and freed bytes; the images are gone."""
    image = commit(store, "a")
    commit(store, "b")
    assert smr("images", "rm", "a") == "a:latest: name removed\n"
    assert smr.json("images", "rm", "b") == [{"names": ["b:latest"], "digest": image.digest, "bytes": image.size_bytes}]
    assert store.images() == []


def test_rm_of_an_image_in_use_exits_6_unless_forced(store: Store, smr: Smr) -> None:
    """The hint is the command that does it all the same."""
    commit(store, "llama")
    with store.leased("llama"):
        smr("images", "rm", "llama", status=6)
        assert "smr images rm --force llama:latest" in smr.err
        smr("images", "rm", "--force", "llama")
    assert store.images() == []


def test_verify_exits_0_for_good_and_5_for_damaged_images(store: Store, smr: Smr) -> None:
    """All images when none is named; each damaged blob is listed."""
    commit(store, "good", pages={}, config=make_config("2025-01-02T00:00:00Z"))
    assert "good:latest: good, 5 blobs" in smr("images", "verify")
    bad = commit(store, "bad")
    rewrite_blob(bad.layers_of(LayerType.PAGES)[0].path, b"x" * 15000)
    text = smr("images", "verify", status=5)
    assert "bad:latest: DAMAGED" in text
    assert bad.layers_of(LayerType.PAGES)[0].digest[7:19] in text
    assert smr("images", "verify", "good").count("\n") == 1
    found = smr.json("images", "verify", "bad", status=5)
    assert isinstance(found, list)
    assert [(item["ok"], [problem["blob"] for problem in item["problems"]]) for item in found] == [(False, ["pages"])]


def test_verify_counts_an_image_without_a_readable_manifest(store: Store, smr: Smr) -> None:
    """An image that cannot even be listed is a damaged image of the node."""
    image = commit(store, "bad")
    image.blob(image.digest).unlink()
    assert "bad:latest: DAMAGED" in smr("images", "verify", status=5)
    found = smr.json("images", "verify", status=5)
    assert isinstance(found, list)
    assert found[0]["problems"][0]["error"]["code"] == "image_corrupt"


def test_gc_says_what_it_dropped(store: Store, smr: Smr) -> None:
    """Blobs, bytes and abandoned ingests."""
    commit(store, "llama")
    (store.root / "blobs/sha256" / ("b" * 64)).write_bytes(b"12345")
    (store.root / "ingest/dead").mkdir()
    assert smr.json("images", "gc") == {"blobs": 1, "bytes": 5, "ingests": 1}
    assert smr("images", "gc") == "0 blobs (0 B), 0 abandoned ingests\n"


@pytest.mark.parametrize("words", [("prefetch",), ("images", "prefetch")])
def test_prefetch_says_what_it_read(store: Store, smr: Smr, words: tuple[str, ...]) -> None:
    """Freshly committed, the image is in memory already."""
    image = commit(store, "llama")
    found = smr.json(*words, "llama")
    layers = sum({layer.digest: layer.size_bytes for layer in image.layers}.values())
    assert isinstance(found, dict)
    assert (found["total_bytes"], found["cached_bytes"] + found["read_bytes"], found["left_bytes"]) == (layers, layers, 0)
    assert "in memory" in smr(*words, "llama")


def test_image_names_are_completed(store: Store) -> None:
    """The shell completes the names of the store."""
    from click.shell_completion import ShellComplete

    from smr.shim.cli import cli

    commit(store, "llama:warm")
    commit(store, "mistral")
    complete = ShellComplete(cli, {}, "smr", "_SMR_COMPLETE")
    assert [item.value for item in complete.get_completions(["images", "rm"], "ll")] == ["llama:warm"]
    assert len(complete.get_completions(["images", "inspect"], "")) == 2
