"""CRIU's side: which one, its options on their two ways, its log; the options and hints of a dump."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from smr.proto.annotations import Annotations, Tcp
from smr.proto.checkpoint import Connections
from smr.proto.errors import Code, SmrError
from smr.shim import criu, dump
from smr.shim.config import Config
from smr.shim.runtime_restore import criu_options
from tests.unit.test_preflight import CONFIG

Versions = Callable[[str], Config]


class FakeImage:
    """As much of an image as options need."""

    reference = "llama:warm"

    def __init__(self, *options: str, tcp: str = "close") -> None:
        self.config = replace(CONFIG, criu_options=options, tcp=tcp)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Programs that were asked for their version."""
    return []


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Path]) -> Versions:
    """Make a node with a criu that prints the given text for --version."""

    def make(text: str) -> Config:
        program = tmp_path / "criu"
        program.write_text(f"#!/bin/sh\n# {text}")
        program.chmod(0o755)

        def run(argv: list[Path | str], **_: object) -> subprocess.CompletedProcess[str]:
            assert argv == [program, "--version"]
            asked.append(program)
            return subprocess.CompletedProcess([], 0, text, "")

        monkeypatch.setattr(criu, "run", run)
        return Config(criu=str(program), run=tmp_path / "run")

    return make


@pytest.mark.parametrize(
    ("text", "version", "shown"),
    [
        ("Version: 4.1\n", (4, 1, 0), "4.1"),
        ("Version: 4.1.1\nGitID: v4.1.1\n", (4, 1, 1), "4.1.1"),
        ("Version: 4.2-12-gabcdef\n", (4, 2, 0), "4.2"),
        ("Version: v5.0\n", (5, 0, 0), "5.0"),
    ],
)
def test_version(node: Versions, text: str, version: tuple[int, int, int], shown: str) -> None:
    """As releases and builds from git print it."""
    found = criu.find(node(text))
    assert (found.version, found.version_text) == (version, shown)


@pytest.mark.parametrize("text", ["Version: 3.17.1\n", "Version: 4.0\n"])
def test_too_old(node: Versions, text: str) -> None:
    """What was found, where, what is needed, and how to get it."""
    config = node(text)
    with pytest.raises(SmrError) as caught:
        criu.find(config)
    assert caught.value.code is Code.CRIU_TOO_OLD
    assert text.split()[1] in caught.value.message
    assert config.criu in caught.value.message
    assert "4.1 or newer" in caught.value.message
    assert "install.sh" in caught.value.hint


def test_something_else_by_that_name(node: Versions) -> None:
    """A program that prints no version is no CRIU."""
    with pytest.raises(SmrError) as caught:
        criu.find(node("usage: criu"))
    assert caught.value.code is Code.CRIU_MISSING
    assert "usage: criu" in caught.value.message


def test_version_is_asked_once(node: Versions, asked: list[Path]) -> None:
    """It is remembered until the program changes."""
    config = node("Version: 4.1\n")
    assert criu.find(config) == criu.find(config)
    assert len(asked) == 1
    assert criu.find(node("Version: 4.2.1\n")).version == (4, 2, 1)
    assert len(asked) == 2


@pytest.mark.parametrize("content", ["", "garbage", "/other:1:2:3\nVersion: 9.9\n"])
def test_memory_of_another_program_is_not_believed(node: Versions, content: str) -> None:
    """A file of another CRIU, or a broken one, is written anew."""
    config = node("Version: 4.1\n")
    config.run.mkdir()
    (config.run / "criu-version").write_text(content)
    assert criu.find(config).version == (4, 1, 0)


def test_version_without_a_place_to_remember(node: Versions, tmp_path: Path) -> None:
    """A state directory that cannot be written costs time, nothing else."""
    (tmp_path / "run").write_text("a file in its place")
    assert criu.find(node("Version: 4.1\n")).version == (4, 1, 0)


def test_missing(tmp_path: Path) -> None:
    """The path that was looked for is named."""
    with pytest.raises(SmrError) as caught:
        criu.find(Config(criu=str(tmp_path / "criu")))
    assert caught.value.code is Code.CRIU_MISSING
    assert str(tmp_path / "criu") in caught.value.message


def test_program_must_be_named_criu(tmp_path: Path) -> None:
    """Runtimes find it on PATH by that name."""
    program = tmp_path / "criu-4.1"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    with pytest.raises(SmrError) as caught:
        criu.find(Config(criu=str(program)))
    assert caught.value.code is Code.CRIU_MISSING
    assert "must be named criu" in caught.value.message


def test_environment_of_a_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """CRIU's folder comes before PATH, which stays."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    tool = criu.Criu(path=Path("/opt/criu/sbin/criu"), version=(4, 1, 1))
    assert tool.environment(Path("/w/criu.conf")) == {"PATH": "/opt/criu/sbin:/usr/bin:/bin", "CRIU_CONFIG_FILE": "/w/criu.conf"}


def test_options_file(tmp_path: Path) -> None:
    """An option a line, a flag without a value."""
    criu.write_options(tmp_path / "criu.conf", {"ghost-limit": "1G", "tcp-close": ""})
    assert (tmp_path / "criu.conf").read_text() == "ghost-limit 1G\ntcp-close\n"


LOG = """\
(00.000001) Version: 4.1.1
(00.010000) Running pre-restore scripts
(00.011000)      1: Opening /data
(00.012000)      1: Error (criu/files-reg.c:2155): File data/x has bad size 1 (expect 2)
(00.012001)      1: Error (criu/mount.c:10): rlimit: Can't setup core rlimit
(00.013000) Error (criu/cr-restore.c:2605): Restoring FAILED.
"""


def test_log_is_quoted_around_errors(tmp_path: Path) -> None:
    """The lines with Error and two before them, without times, each once, with the log's path."""
    (tmp_path / "restore.log").write_text(LOG)
    assert criu.quote_log(tmp_path / "restore.log") == (
        f"{tmp_path}/restore.log: Running pre-restore scripts | 1: Opening /data"
        " | 1: Error (criu/files-reg.c:2155): File data/x has bad size 1 (expect 2)"
        " | 1: Error (criu/mount.c:10): rlimit: Can't setup core rlimit"
        " | Error (criu/cr-restore.c:2605): Restoring FAILED."
    )


def test_warning_about_limits_is_no_reason_to_quote(tmp_path: Path) -> None:
    """CRIU prints it wherever CAP_SYS_RESOURCE is missing, also when all is well."""
    (tmp_path / "dump.log").write_text("(00.1) 1: Error (criu/x.c:1): rlimit: Can't setup nofile\n(00.2) done\n")
    assert criu.quote_log(tmp_path / "dump.log") == f"{tmp_path}/dump.log: no line with 'Error'"


def test_log_of_many_errors_is_cut(tmp_path: Path) -> None:
    """An engine prints one line."""
    (tmp_path / "x.log").write_text("Error\n" * 500)
    assert criu.quote_log(tmp_path / "x.log", most=3).count("Error") == 3


def test_log_that_is_not_there(tmp_path: Path) -> None:
    """CRIU may fail before it writes one."""
    assert criu.quote_log(tmp_path / "x.log") == f"no log at {tmp_path}/x.log"


def test_dump_without_connections() -> None:
    """Nothing is blocked, so nothing need lock the network."""
    chosen = dump.options()
    assert {"tcp-close", "skip-in-flight"} <= chosen.keys()
    assert chosen["network-lock"] == "skip"
    assert "tcp-established" not in chosen


@pytest.mark.parametrize(
    ("said", "newer"), [("--link-remap  allow\n   --tcp-skip-in-flight  skip", True), ("--file-locks", False)]
)
def test_options_that_a_runtime_has_flags_for(monkeypatch: pytest.MonkeyPatch, said: str, newer: bool) -> None:
    """A newer runc says no to link-remap and tcp-skip-in-flight unless its own flags say yes."""
    monkeypatch.setattr(dump, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, said, ""))
    found = dump.flags_of(f"/usr/bin/runc{newer}")
    assert found.get("skip-in-flight") == ("tcp-skip-in-flight" if newer else None)
    assert ("link-remap" in found) is newer
    assert found.keys() >= criu.RUNTIME_FLAGS


def test_options_that_a_container_asks_for_at_its_dump() -> None:
    """Those that count at a dump, in place of ours; TCP and cgroups are not theirs to say. A wrong one is told."""
    asked = {
        "smr.criu.ghost-limit": "4G",
        "smr.criu.cpu-cap": "none",
        "smr.criu.tcp-established": "",
        "smr.criu.weak-sysctls": "",
    }
    found = dump.asked_options({**asked, "smr.criu.manage-cgroups": "soft", "smr.quiesce": "vllm", "app": "x"})
    assert found == {"ghost-limit": "4G", "cpu-cap": "none"}
    assert (dump.options() | found)["ghost-limit"] == "4G"
    with pytest.raises(SmrError) as caught:
        dump.asked_options({"smr.criu.ghost-limit": "much"})
    assert caught.value.code is Code.ANNOTATION_INVALID


def test_first_process_that_leads_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """CRIU must be told of it; of one that leads its session it must not."""
    monkeypatch.setattr(dump.os, "getsid", lambda pid: 7)
    assert dump.session_options(7) == {}
    assert dump.session_options(8) == {"shell-job": ""}


@pytest.mark.parametrize("iptables", ["/usr/sbin/iptables-restore", None])
def test_engine_checkpoint(monkeypatch: pytest.MonkeyPatch, iptables: str | None) -> None:
    """Without iptables the network is locked by nftables, since CRIU fails to lock it otherwise; nothing else is changed."""
    monkeypatch.setattr(dump.shutil, "which", lambda _: iptables)
    chosen = dump.engine_options()
    assert ("network-lock" in chosen) is (iptables is None)
    assert chosen["ghost-limit"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('Error: For Go programs, consider using "GODEBUG=multipathtcp=0" to disable MPTCP', "GODEBUG"),
        ("Error: io_uring is not supported: io_uring fd", "UV_USE_IO_URING"),
        ("Error (criu/sockets.c:628): sockets: Can't get 1:16 opt: Operation not supported", "4.2"),
        ("Error: Can't lookup mount=7 for fd=3", "volume"),
        ("nothing that we know", "goes on running"),
    ],
)
def test_hint_of_a_failed_dump(text: str, word: str) -> None:
    """The remedy for what the log says, where one is known."""
    assert word in dump.hint_for(text)


def test_options_of_a_restore() -> None:
    """What the dump needed, closed connections, the user's options, stopped tasks."""
    asked = Annotations(restore="llama", criu={"ghost-limit": "2M"})
    assert criu_options(FakeImage("file-locks"), asked) == {  # type: ignore[arg-type]
        "file-locks": "",
        "tcp-close": "",
        "ghost-limit": "2M",
        "leave-stopped": "",
    }


def test_criu_restores_connections_that_it_has_dumped() -> None:
    """Of images of others, and of older ones; those that SMR saved are closed sockets for CRIU."""
    asked = Annotations(restore="llama", tcp=Tcp.ESTABLISHED)
    image = FakeImage(tcp="established")
    assert "tcp-established" in criu_options(image, asked)  # type: ignore[arg-type]
    image.config = replace(image.config, connections=Connections(saved=1, outer=1))
    assert "tcp-established" not in criu_options(image, asked)  # type: ignore[arg-type]
    closed = criu_options(FakeImage("tcp-established", tcp="established"), Annotations(restore="llama"))  # type: ignore[arg-type]
    assert "tcp-close" in closed
    assert "tcp-established" not in closed


@pytest.mark.parametrize("option", ["action-script", "link-remap\naction-script /tmp/x", "libdir /tmp", "exec-cmd", ""])
def test_image_cannot_give_criu_other_options(option: str) -> None:
    """An image may come from anywhere; some options run programs as root."""
    with pytest.raises(SmrError) as caught:
        criu_options(FakeImage(option), Annotations(restore="llama"))  # type: ignore[arg-type]
    assert caught.value.code is Code.UNSUPPORTED
    assert repr(option) in caught.value.message
