"""containerd-shim-smr-v1 in front of a fake stock shim: the protocol passes through, and what an annotation adds."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from smr.shim.state import Status, all_states
from tests.integration.command import eventually
from tests.integration.recorder import Called, Recorder
from tests.unit.test_containerd_options import any_of, options

START = ["-namespace", "k8s.io", "-address", "/run/c.sock", "-publish-binary", "/usr/bin/containerd", "-id", "c1", "start"]
DELETE = [*START[:-1], "-bundle", "/b", "delete"]
SHIMS = pytest.mark.parametrize("shim", ["containerd-shim-smr-v1", "containerd-shim-smr-v2"])


@pytest.fixture
def node(tmp_path: Path) -> Recorder:
    """The shim with the interpreter of these tests, a fake stock shim and a fake runtime."""
    recorder = Recorder(tmp_path / "node", python=Path(sys.executable))
    recorder.fake("containerd-shim-runc-v2")
    recorder.fake("runc", tmp_path / "node/usr")
    recorder.env["PATH"] = f"{recorder.bin}:{tmp_path}/node/usr:/usr/bin:/bin"
    recorder.env["SMR_RUNTIME"] = f"{tmp_path}/node/usr/runc"
    return recorder


def bundle(node: Recorder, **annotations: str) -> Path:
    """A bundle of containerd, STATE/io.containerd.runtime.v2.task/NAMESPACE/ID."""
    folder = node.path / "io.containerd.runtime.v2.task/k8s.io/c1"
    folder.mkdir(parents=True)
    names = {key.replace("__", "."): value for key, value in annotations.items()}
    (folder / "config.json").write_text(json.dumps({"ociVersion": "1.0.2", "annotations": names}))
    return folder


def stock(node: Recorder) -> Called:
    """How the stock shim was called."""
    called = node.called("containerd-shim-runc-v2")
    assert called is not None
    return called


@SHIMS
@pytest.mark.parametrize("words", [START, DELETE, ["-v"], ["-info"], ["-namespace", "k8s.io", "-id", "c1"], []])
@pytest.mark.parametrize("annotated", [False, True])
def test_protocol_passes_through(node: Recorder, shim: str, words: list[str], annotated: bool) -> None:
    """Words, stdin and stdout byte for byte, exit status; stderr, which containerd reads into the same reply, stays empty."""
    folder = bundle(node, **({"smr__restore": "llama:warm"} if annotated else {}))
    data = any_of(options("")) + b"\0\xff\n" * 100_000
    done = node(shim, *words, cwd=folder, stdin=data, env={"FAKE_STDOUT": "\\000reply\\n", "FAKE_STATUS": "5"})
    assert (done.returncode, done.stdout, done.stderr) == (5, b"\0reply\n", b"")
    called = stock(node)
    assert (called.argv, called.stdin, called.cwd) == (words, data, str(folder))


@pytest.mark.parametrize("words", [START, DELETE, ["-v"], ["-info"]])
def test_without_an_annotation_it_is_the_stock_shim_on_another_path(node: Recorder, words: list[str]) -> None:
    """Python is not loaded; our folder is first on PATH all the same, so that the engine's own checkpoint verb comes to us."""
    (node.bin / "python3").write_text("#!/bin/sh\nexit 77\n")
    assert node("containerd-shim-smr-v1", *words, cwd=bundle(node, other="1")).returncode == 0
    folder = node.run_dir / "smr-path"
    ours = {**node.env, "PATH": f"{folder}:{node.env['PATH']}"}
    assert {key: value for key, value in stock(node).environ.items() if key not in {"PWD", "OLDPWD", "SHLVL", "_"}} == ours
    made = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    assert made == (["crun", "runc"] if words in (START, DELETE) else [])
    assert all((folder / name).samefile(node.bin / "smr-runtime") for name in made)


def test_runc_is_ours_in_the_stock_shim(node: Recorder) -> None:
    """For an empty BinaryName, and for what finds runc by itself: our folder is first on PATH, and the real runtime is told."""
    node("containerd-shim-smr-v1", *START, cwd=bundle(node, smr__restore="llama"))
    environ = stock(node).environ
    folder = node.run_dir / "smr-path"
    assert environ["PATH"] == f"{folder}:{node.env['PATH']}"
    assert environ["SMR_RUNTIME"] == f"{node.path}/usr/runc"
    for name in ("runc", "crun"):
        assert (folder / name).resolve().name == "smr-runtime"
        assert os.access(folder / name, os.X_OK)


def test_second_start_makes_the_same_folder(node: Recorder) -> None:
    """Links that are there and right stay; wrong ones are replaced; nothing temporary is left."""
    work = bundle(node, smr__restore="llama")
    node("containerd-shim-smr-v1", *START, cwd=work)
    folder = node.run_dir / "smr-path"
    target = (folder / "runc").readlink()
    (folder / "crun").unlink()
    (folder / "crun").symlink_to("/bin/false")
    node("containerd-shim-smr-v1", *START, cwd=work)
    assert sorted(path.name for path in folder.iterdir()) == ["crun", "runc"]
    assert {(folder / name).readlink() for name in ("runc", "crun")} == {target}


@pytest.mark.parametrize("annotations", [{"smr__resotre": "llama"}, {"smr__restore": "Not A Name"}, {"smr__tcp": "close"}])
def test_bad_annotation_is_for_create_to_report(node: Recorder, annotations: dict[str, str]) -> None:
    """The shim starts, so that the error reaches the user by way of the runtime."""
    done = node("containerd-shim-smr-v1", *START, cwd=bundle(node, **annotations))
    assert (done.returncode, done.stderr) == (0, b"")
    assert stock(node).environ["PATH"].startswith(f"{node.run_dir}/smr-path:")


def test_bad_settings_are_for_create_to_report(node: Recorder) -> None:
    """A settings file with an error."""
    (node.path / "smr.toml").write_text("[smr")
    done = node("containerd-shim-smr-v1", *START, cwd=bundle(node, smr__restore="llama"))
    assert (done.returncode, done.stderr) == (0, b"")
    assert stock(node).argv == START


def test_stock_shim_that_is_missing_is_a_sentence(node: Recorder) -> None:
    """containerd shows stderr of a start that failed."""
    done = node(
        "containerd-shim-smr-v1", *START, cwd=bundle(node, smr__restore="a"), env={"SMR_CONTAINERD_SHIM": "/no/such/shim"}
    )
    assert done.returncode == 1
    assert done.stdout == b""
    assert done.stderr.startswith(b"smr: cannot start /no/such/shim: ")
    assert done.stderr.count(b"\n") == 1


def test_prefetch_is_of_the_annotated_image(node: Recorder) -> None:
    """It begins at start, in a process that holds none of the shim's pipes, and not at delete."""
    log = node.path / "python.log"
    (node.bin / "python3").write_text(f'#!/bin/sh\necho "$*" >>{log}\nexec {sys.executable} "$@"\n')
    (node.path / "wrapped").write_text(
        "import sys, pathlib\n"
        "from smr.shim import containerd_shim as shim\n"
        f"shim.sys.executable = {str(node.bin / 'python3')!r}\n"
        "sys.exit(shim.main(sys.argv[1:]))\n"
    )
    (node.bin / "shim").write_text(f'#!/bin/sh\nexec {sys.executable} -I {node.path}/wrapped containerd-shim-runc-v2 "$@"\n')
    (node.bin / "shim").chmod(0o755)
    work = bundle(node, smr__restore="llama:warm")
    node("shim", *START, cwd=work)
    assert eventually(log.read_text) == f"-I -m smr.images.prefetch {node.path}/store llama:warm --while {work} --share 0.5\n"
    node("shim", *DELETE, cwd=work)
    assert log.read_text().count("smr.images.prefetch") == 1


@pytest.mark.parametrize("runtime", ["/usr/bin/runc", "/opt/x/crun"])
def test_absolute_runtime_that_goes_past_us_is_said(node: Recorder, runtime: str) -> None:
    """In the log, and in a record that `smr ps` shows: started cold, and why. The request itself is not changed."""
    data, work = any_of(options(runtime, root=f"{node.path}/runc")), bundle(node, smr__restore="llama")
    for _ in range(2):
        done = node("containerd-shim-smr-v1", *START, cwd=work, stdin=data)
        assert (done.returncode, done.stderr) == (0, b"")
        assert stock(node).stdin == data
    line = json.loads((node.path / "smr.log").read_text().splitlines()[0])
    assert (line["event"], line["level"], line["container"], line["runtime"]) == ("runtime_bypassed", "warning", "c1", runtime)
    (state,) = all_states(node.run_dir)
    assert state.record.status is Status.COLD
    assert (state.record.id, state.record.root, state.record.image) == ("c1", f"{node.path}/runc/k8s.io", "llama")
    assert runtime in state.record.reason
    assert state.record.reason_code == "unsupported"


@pytest.mark.parametrize(
    "runtime", ["", "runc", "crun", "nvidia-container-runtime", "/usr/bin/nvidia-container-runtime", "/opt/smr/bin/smr-runtime"]
)
def test_runtimes_that_come_by_us_are_no_bypass(node: Recorder, runtime: str) -> None:
    """A name is looked up on PATH, and a wrapper finds runc there."""
    node("containerd-shim-smr-v1", *START, cwd=bundle(node, smr__restore="llama"), stdin=any_of(options(runtime)))
    assert all_states(node.run_dir) == []
    assert not (node.path / "smr.log").exists()


def test_client_that_asks_for_crun_gets_crun(node: Recorder) -> None:
    """At start by the options on stdin, at delete by those in the bundle."""
    crun = node.fake("crun", node.path / "usr")
    work = bundle(node, smr__restore="llama")
    node("containerd-shim-smr-v1", *START, cwd=work, stdin=any_of(options("crun")))
    assert stock(node).environ["SMR_RUNTIME"] == str(crun)
    (work / "options.json").write_text('{"binary_name": "crun"}')
    node("containerd-shim-smr-v1", *DELETE, cwd=work)
    assert stock(node).environ["SMR_RUNTIME"] == str(crun)


def test_sandbox_of_an_annotated_pod(node: Recorder) -> None:
    """Its shim serves the pod's containers, so it must have our PATH; nothing is prefetched or recorded for itself."""
    work = bundle(node, **{"smr__restore": "llama", "io__kubernetes__cri__container-type": "sandbox"})
    node("containerd-shim-smr-v1", *START, cwd=work, stdin=any_of(options("/usr/bin/runc")))
    assert stock(node).environ["PATH"].startswith(f"{node.run_dir}/smr-path:")
    assert all_states(node.run_dir) == []
