"""The command line of an OCI runtime, as engines type it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smr.shim.oci_args import RuntimeCall, parse_call

CONTAINERD = (
    "--root /run/containerd/runc/k8s.io --log /b/log.json --log-format json --systemd-cgroup"
    " create --bundle /b --pid-file /b/init.pid c1"
)
CONMON = "--root=/run/runc --systemd-cgroup create --bundle /b --pid-file /p c1"


def call(line: str) -> RuntimeCall:
    """The words of `line`, taken apart."""
    return parse_call(line.split())


def test_create_as_containerd_calls_it() -> None:
    """Global options with values behind a space, a flag, then the verb's own."""
    found = call(CONTAINERD)
    assert (found.root, found.log, found.log_format) == ("/run/containerd/runc/k8s.io", Path("/b/log.json"), "json")
    assert (found.verb, found.id, found.rest) == ("create", "c1", ())
    assert found.bundle == Path("/b")
    assert found.option("pid-file") == "/b/init.pid"
    assert found.global_args == tuple(CONTAINERD.split()[: CONTAINERD.split().index("create")])


def test_create_as_conmon_calls_it() -> None:
    """Values behind an equals sign."""
    found = call(CONMON)
    assert (found.root, found.verb, found.id, found.bundle) == ("/run/runc", "create", "c1", Path("/b"))


@pytest.mark.parametrize("form", ["--bundle /b", "--bundle=/b", "-bundle /b", "-bundle=/b", "-b /b", "-b=/b"])
@pytest.mark.parametrize("verb", ["create", "run", "restore"])
def test_every_form_of_an_option(form: str, verb: str) -> None:
    """One dash or two, a space or an equals sign, as Go's flag packages take them."""
    found = call(f"{verb} {form} c1")
    assert (found.bundle, found.id) == (Path("/b"), "c1")


@pytest.mark.parametrize(
    "option",
    ["--log-level error", "--log=/x", "--criu /usr/sbin/criu", "--rootless true", "--cgroup-manager cgroupfs", "--debug"],
)
def test_global_options_of_runc_and_crun(option: str) -> None:
    """Their values are not taken for the verb."""
    assert call(f"{option} create --bundle /b c1").verb == "create"


@pytest.mark.parametrize(
    "option",
    [
        "--pid-file /p",
        "--console-socket /s",
        "--pidfd-socket /s",
        "--preserve-fds 3",
        "--config /c.json",
        "--no-pivot",
        "-f /c.json",
    ],
)
def test_options_of_create(option: str) -> None:
    """Their values are not taken for the id."""
    assert call(f"create {option} c1").id == "c1"


@pytest.mark.parametrize("option", ["--force", "-f", "--force=true", "--regex"])
def test_force_of_delete_is_a_flag(option: str) -> None:
    """What follows it is the id."""
    found = call(f"delete {option} c1")
    assert (found.verb, found.id) == ("delete", "c1")


def test_signal_follows_the_id() -> None:
    """kill has its signal in the rest."""
    found = call("--root /r kill --all c1 TERM")
    assert (found.id, found.rest) == ("c1", ("TERM",))
    assert found.option("all", "a") == ""
    assert found.option("force") is None


def test_last_value_counts() -> None:
    """As in runc, an option given twice has the last value."""
    assert call("create --bundle /a -b /b c1").bundle == Path("/b")


def test_bundle_defaults_to_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --bundle, and for a relative one."""
    monkeypatch.chdir(tmp_path)
    assert call("create c1").bundle == tmp_path
    assert call("create --bundle sub c1").bundle == tmp_path / "sub"


def test_two_dashes_end_the_options() -> None:
    """What follows is the id, whatever it looks like."""
    assert parse_call(["state", "--", "-c1"]).id == "-c1"
    assert parse_call(["--root", "/r", "--", "create", "c1"]).verb == "create"


@pytest.mark.parametrize("words", [[], [""], ["--root"], ["create"], ["create", "--bundle"], ["-"], ["--"]])
def test_nothing_is_rejected(words: list[str]) -> None:
    """A call without verb, id or value is the real runtime's to judge; the words are kept."""
    found = parse_call(words)
    assert found.argv == tuple(words)
    assert found.id == ""
    assert found.root == ""


@given(st.lists(st.text(max_size=8), max_size=8))
def test_words_are_kept_whatever_they_are(words: list[str]) -> None:
    """The call can be handed on exactly as it came."""
    found = parse_call(words)
    assert list(found.argv) == words
    assert list(found.global_args) == words[: len(found.global_args)]
    assert not found.verb or found.verb in words
