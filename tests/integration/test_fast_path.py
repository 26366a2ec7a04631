"""The sh part of smr-runtime: what does not concern us reaches the real runtime untouched, and never loads Python."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from tests.integration.command import eventually
from tests.integration.recorder import Recorder

ODD = [
    [],
    [""],
    ["", "", ""],
    ["--"],
    ["--", "create", "x"],
    ["list", "*"],
    ["list", "a b", " ", "\t", "a\nb", "\n"],
    ["exec", "c1", "sh", "-c", 'echo "$HOME" `id` $(id) \\ \' ; exit 3'],
    ["exec", "c1", "create", "--bundle", "/annotated"],
    ["--root=/r r", "--log", "/l\n", "state", "c1"],
    ["--root", "", "state", ""],
    ["-root", "/r", "kill", "c1", "TERM"],
    ["--log-level", "error", "delete", "-f", "c1"],
    ["--systemd-cgroup", "start", "c*"],
    ["no-such-verb", "--bundle", "x"],
    ["--version"],
    ["spec", "--help"],
    ["update", "--memory", "1", "c1"],
    ["ps", "c1", "-ef"],
    ["events", "--stats", "é", "\udcff"],
    ["-"],
    ["create"],
    ["create", "--bundle"],
    ["create", "--bundle", "/no/such", "c1"],
    ["create", "--bundle=", "c1"],
    ["create", "--bundle", "-x", "c1"],
    ["create", "-b=/no/such", "--console-socket", "/s", "c1"],
]


@pytest.fixture
def node(tmp_path: Path) -> Recorder:
    """smr-runtime between a fake runtime and a fake interpreter."""
    recorder = Recorder(tmp_path / "node")
    recorder.env["SMR_RUNTIME"] = str(recorder.fake("real-runtime", tmp_path / "node/other"))
    return recorder


def bundle(path: Path, *annotations: str) -> Path:
    """A bundle with these annotations."""
    path.mkdir(parents=True)
    spec = {"ociVersion": "1.0.2", "annotations": dict.fromkeys(annotations, "x"), "process": {"args": ["sh"]}}
    (path / "config.json").write_text(json.dumps(spec))
    return path


def keep(node: Recorder, container: str, *, created: bool) -> None:
    """State as SMR keeps it of a container."""
    folder = node.run_dir / "containers/run/runc" / container
    folder.mkdir(parents=True)
    (folder / "state.json").touch()
    if created:
        (folder / "created").touch()


@pytest.mark.parametrize("words", ODD, ids=repr)
def test_arguments_arrive_untouched(node: Recorder, words: list[str]) -> None:
    """Spaces, empty words, newlines, globs, two dashes, options in every form; stdio and working directory too."""
    done = node("smr-runtime", *words, stdin=b"in\0put", env={"FAKE_STDOUT": "out\\n", "FAKE_STDERR": "err", "FAKE_STATUS": "42"})
    assert (done.returncode, done.stdout, done.stderr) == (42, b"out\n", b"err")
    assert node.all_called() == {"real-runtime"}
    called = node.called("real-runtime")
    assert called is not None
    assert called.argv == words
    assert called.stdin == b"in\0put"
    assert called.cwd == str(node.path)


def test_environment_arrives_untouched(node: Recorder) -> None:
    """What the engine set is the runtime's, and nothing is added."""
    node("smr-runtime", "list", env={"LISTEN_FDS": "1", "NOTIFY_SOCKET": "/n", "IFS": ":"})
    called = node.called("real-runtime")
    assert called is not None
    ours = {**node.env, "LISTEN_FDS": "1", "NOTIFY_SOCKET": "/n"}
    assert {key: value for key, value in called.environ.items() if key not in {"PWD", "OLDPWD", "SHLVL", "_", "IFS"}} == ours


@pytest.mark.parametrize("verb", ["create", "run"])
@pytest.mark.parametrize("form", ["--bundle {}", "--bundle={}", "-b {}", "-b={}", "-bundle {}", "-bundle={}"])
@pytest.mark.parametrize("before", ["", "--root=/run/runc", "--root /run/runc --log /l --log-format json --systemd-cgroup"])
def test_annotation_decides(node: Recorder, verb: str, form: str, before: str) -> None:
    """A bundle with an annotation of ours goes to Python with the same words; one without to the real runtime."""
    for annotation, program in (("smr.restore", "python3"), ("xsmr.restore", "real-runtime"), ("io.smr.restore", "real-runtime")):
        folder = bundle(node.path / annotation, annotation)
        words = [*before.split(), verb, *form.format(folder).split(), "--pid-file", "/p", "c1"]
        node("smr-runtime", *words)
        assert node.all_called() == {program}
        called = node.called(program)
        assert called is not None
        assert called.argv == (["-I", "-m", "smr.shim.runtime", *words] if program == "python3" else words)


def test_bundle_is_the_current_directory_by_default(node: Recorder) -> None:
    """create ID in the bundle itself."""
    node("smr-runtime", "create", "c1", cwd=bundle(node.path / "b", "smr.restore"))
    assert node.all_called() == {"python3"}


def test_last_bundle_counts(node: Recorder) -> None:
    """As for the real runtime."""
    ours, other = bundle(node.path / "ours", "smr.restore"), bundle(node.path / "other-bundle")
    node("smr-runtime", "create", "--bundle", str(ours), "-b", str(other), "c1")
    assert node.all_called() == {"real-runtime"}


@pytest.mark.parametrize("word", ["--pid-file", "--console-socket", "--pidfd-socket", "--preserve-fds", "--config", "-f"])
def test_value_that_looks_like_an_option(node: Recorder, word: str) -> None:
    """What follows an option with a value is that value."""
    folder = bundle(node.path / "b", "smr.restore")
    node("smr-runtime", "create", word, "--bundle", str(folder), "c1")
    assert node.all_called() == {"real-runtime"}
    node("smr-runtime", "create", word, "x", "--bundle", str(folder), "c1")
    assert node.all_called() == {"python3"}


@pytest.mark.parametrize(("created", "ours"), [(True, {"start", "state", "kill", "delete"}), (False, {"delete"})])
@pytest.mark.parametrize("verb", ["start", "state", "kill", "delete", "exec", "pause", "resume", "ps", "update", "events"])
def test_state_decides(node: Recorder, verb: str, created: bool, ours: set[str]) -> None:
    """Between create and start our container is ours; afterwards only its delete is; others never are."""
    keep(node, "c1", created=created)
    for words, known in ((["c1"], True), (["c2"], False), (["c1", "TERM"], True)):
        node("smr-runtime", "--root", "/run/runc", verb, *words)
        assert node.all_called() == ({"python3"} if known and verb in ours else {"real-runtime"})
    node("smr-runtime", "--root", "/run/other", verb, "c1")
    assert node.all_called() == {"real-runtime"}


def test_force_of_delete_is_no_id(node: Recorder) -> None:
    """The id stands behind the flags."""
    keep(node, "c1", created=False)
    for flag in ("-f", "--force"):
        node("smr-runtime", "--root=/run/runc", "delete", flag, "c1")
        assert node.all_called() == {"python3"}


def test_empty_folder_of_the_state_is_no_container(node: Recorder) -> None:
    """delete without an id, or with one that is a folder above containers."""
    keep(node, "c1", created=True)
    for container in ("", ".", "..", "../.."):
        node("smr-runtime", "--root", "/run/runc", "delete", container)
        assert node.all_called() == {"real-runtime"}


@pytest.mark.parametrize("verb", ["checkpoint", "restore"])
def test_checkpoint_and_restore_are_ours(node: Recorder, verb: str) -> None:
    """They need SMR's CRIU, whatever the container."""
    node("smr-runtime", verb, "--image-path", "/i", "c1")
    assert node.all_called() == {"python3"}


def test_python_is_told_the_real_runtime(node: Recorder) -> None:
    """Whichever way the sh part found it."""
    del node.env["SMR_RUNTIME"]
    found = node.fake("runc", node.path / "usr")
    node.env["PATH"] = f"{node.path}/usr:/usr/bin:/bin"
    node("smr-runtime", "checkpoint", "c1")
    called = node.called("python3")
    assert called is not None
    if not Path("/etc/smr/runtime").exists():
        assert called.environ["SMR_RUNTIME"] == str(found)


@pytest.mark.skipif(Path("/etc/smr/runtime").exists(), reason="this machine names its runtime in /etc/smr/runtime")
def test_runtime_on_path_is_never_ourselves(node: Recorder) -> None:
    """The shim's folder, and any link to this script, are passed over; crun serves where there is no runc."""
    del node.env["SMR_RUNTIME"]
    for folder in ("smr-path", "links"):
        (node.path / folder).mkdir()
        (node.path / folder / "runc").symlink_to(node.bin / "smr-runtime")
    node.fake("crun", node.path / "usr")
    node.env["PATH"] = f"{node.path}/smr-path:{node.path}/links:{node.path}/usr:{node.bin}"
    (node.bin / "env").symlink_to("/usr/bin/env")
    for name in ("cat", "mkdir", "sh"):
        (node.bin / name).symlink_to(f"/bin/{name}")
    node("smr-runtime", "list")
    assert node.all_called() == {"crun"}


def test_setting_that_names_ourselves_does_not_go_round(node: Recorder) -> None:
    """SMR_RUNTIME=smr-runtime is a mistake that must end."""
    node.fake("runc", node.path / "usr")
    link = node.path / "link"
    link.symlink_to(node.bin / "smr-runtime")
    for named in (node.bin / "smr-runtime", link):
        node("smr-runtime", "list", env={"SMR_RUNTIME": str(named), "PATH": f"{node.path}/usr:/usr/bin:/bin"})
        assert node.all_called() == {"runc"}


@pytest.mark.parametrize("named", ["/no/such/runtime", "/etc/passwd"])
def test_runtime_that_is_not_there_is_said_by_python(node: Recorder, named: str) -> None:
    """In the log that the engine reads, not by the shell."""
    node("smr-runtime", "--log", "/l", "list", env={"SMR_RUNTIME": named})
    assert node.all_called() == {"python3"}


def test_start_wakes_the_tree_without_python(node: Recorder) -> None:
    """The marker names the processes: they get SIGCONT before the call ends; the record follows in the background."""
    keep(node, "c1", created=True)
    marker = node.run_dir / "containers/run/runc/c1/created"
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            process.send_signal(signal.SIGSTOP)
            eventually(lambda: fields_of(process.pid)[0] == "T")
            marker.write_text(f"{fields_of(process.pid)[19]}\n{process.pid}\n")
            done = node("smr-runtime", "--root", "/run/runc", "start", "c1")
            assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
            assert fields_of(process.pid)[0] != "T"
            assert not marker.exists()
            argv = node.path / "called/python3/argv"
            words = eventually(lambda: argv.read_text().count("\0") == 6 and argv.read_text().split("\0"))
            assert words[:3] == ["-I", "-m", "smr.shim.resume"]
            assert Path(words[3]) == marker.parent
            assert float(words[4]) <= float(words[5])
        finally:
            process.kill()


@pytest.mark.parametrize("began", [b"1", b"", b"x"])
def test_start_never_wakes_another_process(node: Recorder, began: bytes) -> None:
    """A pid that is used again, or a marker that is cut short: Python looks into it, and nobody is signalled."""
    keep(node, "c1", created=True)
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            process.send_signal(signal.SIGSTOP)
            eventually(lambda: fields_of(process.pid)[0] == "T")
            marker = node.run_dir / "containers/run/runc/c1/created"
            marker.write_bytes(began + b"\n" + str(process.pid).encode())
            node("smr-runtime", "--root", "/run/runc", "start", "c1")
            called = node.called("python3")
            assert called is not None
            assert called.argv[2] == "smr.shim.runtime"
            assert fields_of(process.pid)[0] == "T"
            assert marker.exists()
        finally:
            process.kill()


def fields_of(pid: int) -> list[str]:
    """/proc/PID/stat from the state letter on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
