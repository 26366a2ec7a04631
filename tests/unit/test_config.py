"""Settings of a node: file, then environment; what is wrong in them is said, with a suggestion."""

from __future__ import annotations

from pathlib import Path

import pytest

from smr.proto.errors import Code, SmrError
from smr.shim.config import Config, defaults, load


def write(tmp_path: Path, text: str) -> Path:
    """A settings file."""
    file = tmp_path / "smr.toml"
    file.write_text(text)
    return file


def failure(tmp_path: Path, text: str) -> SmrError:
    """The error of a settings file that must be refused."""
    file = write(tmp_path, text)
    with pytest.raises(SmrError) as caught:
        load(file, {})
    assert caught.value.code is Code.CONFIG_INVALID
    assert str(file) in caught.value.message
    assert caught.value.hint
    return caught.value


def test_missing_file_gives_the_defaults(tmp_path: Path) -> None:
    """A node where nothing was configured works."""
    assert load(tmp_path / "none.toml", {}) == Config()


def test_every_setting_of_the_file(tmp_path: Path) -> None:
    """Paths are paths."""
    text = '[smr]\nstore = "/s"\ncriu = "/c/criu"\nruntime = "crun"\nlog = "/l"\n'
    text += "cache_share = 0.25\nfills = 4\nfill_wait_s = 5\ngpu_timeout_s = 2.5\n"
    expected = Config(
        store=Path("/s"),
        criu="/c/criu",
        runtime="crun",
        log=Path("/l"),
        cache_share=0.25,
        fills=4,
        fill_wait_s=5.0,
        gpu_timeout_s=2.5,
    )
    assert load(write(tmp_path, text), {}) == expected


def test_environment_comes_after_the_file(tmp_path: Path) -> None:
    """SMR_* override it; an empty one does not."""
    file = write(tmp_path, '[smr]\nstore = "/s"\nruntime = "crun"\n')
    env = {"SMR_STORE": "/e", "SMR_RUNTIME": "", "SMR_RUN": "/r", "SMR_CRIU": "/c", "SMR_LOG": "/l"}
    assert load(file, env) == Config(store=Path("/e"), run=Path("/r"), criu="/c", runtime="crun", log=Path("/l"))


def test_file_by_the_environment(tmp_path: Path) -> None:
    """SMR_CONFIG names another file."""
    assert load(environ={"SMR_CONFIG": str(write(tmp_path, '[smr]\nruntime = "crun"\n'))}).runtime == "crun"


def test_relative_path_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the caller's, whatever folder a later step works in."""
    monkeypatch.chdir(tmp_path)
    assert load(tmp_path / "none.toml", {"SMR_STORE": "store"}).store == tmp_path / "store"


@pytest.mark.parametrize(("key", "meant"), [("stroe", "store"), ("runtimes", "runtime"), ("crui", "criu"), ("logs", "log")])
def test_mistyped_key_is_an_error_with_a_suggestion(tmp_path: Path, key: str, meant: str) -> None:
    """A setting that is not read must not pass for one that is."""
    error = failure(tmp_path, f'[smr]\n{key} = "/x"\n')
    assert f"'{key}'" in error.message
    assert error.hint == f"did you mean {meant}?"


def test_unlike_key_lists_the_known_ones(tmp_path: Path) -> None:
    """Without a close match."""
    assert failure(tmp_path, '[smr]\nzzz = "/x"\n').hint == (
        "known: store, criu, runtime, log, cache_share, fills, fill_wait_s, restore_attempts, restore_settled_s, "
        "pod_names_wait_s, capture_free_share, image_namespaces, gpu_timeout_s, agent_socket, agent_listen, agent_events"
    )


def test_state_directory_is_no_setting_of_the_file(tmp_path: Path) -> None:
    """The sh part of smr-runtime reads no TOML, so it would look elsewhere."""
    assert "'run'" in failure(tmp_path, '[smr]\nrun = "/r"\n').message


def test_setting_outside_its_table(tmp_path: Path) -> None:
    """It would not be read; the hint says where it belongs."""
    assert failure(tmp_path, 'store = "/x"\n').hint == "put it under [smr]: store"
    assert failure(tmp_path, '[smrr]\nstore = "/x"\n').hint == "did you mean smr?"


@pytest.mark.parametrize(
    "text", ["[smr", "smr = 3", "[smr]\nstore = 3\n", '[smr]\nstore = "relative"\n', "[smr]\nruntime = []\n", "\x00"]
)
def test_bad_values(tmp_path: Path, text: str) -> None:
    """No TOML, no table, no string, no absolute path."""
    failure(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        *("cache_share = 1.5", "cache_share = -0.1", 'cache_share = "0.5"', "cache_share = nan", "cache_share = true"),
        *("fills = 0", "fills = 2.5", "fills = [1]", "fill_wait_s = -1", "fill_wait_s = inf", "gpu_timeout_s = -1"),
    ],
)
def test_numbers_out_of_their_range(tmp_path: Path, text: str) -> None:
    """The message says what is needed."""
    assert "needed a" in failure(tmp_path, f"[smr]\n{text}\n").message


def test_numbers_of_the_environment(tmp_path: Path) -> None:
    """As text; one that is none is named."""
    assert load(tmp_path / "none", {"SMR_FILLS": "3", "SMR_CACHE_SHARE": "0.1"}) == Config(fills=3, cache_share=0.1)
    for bad in ("x", "0", "1.5"):
        with pytest.raises(SmrError, match=f"SMR_FILLS = '{bad}': needed a whole number from 1 to 1000"):
            load(tmp_path / "none", {"SMR_FILLS": bad})


def test_file_that_is_no_text(tmp_path: Path) -> None:
    """Bytes that are no UTF-8."""
    file = tmp_path / "smr.toml"
    file.write_bytes(b"[smr]\nstore = '\xff'\n")
    with pytest.raises(SmrError) as caught:
        load(file, {})
    assert caught.value.code is Code.CONFIG_INVALID


def test_defaults_pass_over_the_file(tmp_path: Path) -> None:
    """Who must go on where the file is bad still hears the environment."""
    file = write(tmp_path, "[smr")
    assert defaults({"SMR_CONFIG": str(file), "SMR_RUN": "/r"}) == Config(run=Path("/r"))
