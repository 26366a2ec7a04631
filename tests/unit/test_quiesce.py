"""The grammar of `smr.quiesce` and `smr.resume`, and what /run/smr/restored.json says."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from smr.proto.errors import Code, SmrError
from smr.shim import inside, restored
from smr.shim.inside import Endpoint
from smr.shim.presets import PRESETS
from smr.shim.quiesce import Exec, Http, Known, Place, Signal, parse_hook, parse_hooks, run_hook
from smr.shim.restored import Restored, environment_of


def one(text: str) -> object:
    """The action of a hook of one step."""
    (step,) = parse_hook(text, "quiesce").steps
    return step.action


@pytest.mark.parametrize("text", ["", "none", " none "])
def test_no_steps(text: str) -> None:
    """No value and `none` are hooks that do nothing, whatever the place."""
    hook = parse_hook(text, "resume")
    assert hook.steps == ()
    run_hook(hook, Place(pid=0, container="none"))


@pytest.mark.parametrize(
    ("text", "port", "options"),
    [
        ("vllm", 8000, {"level": "1", "drain": "keep"}),
        ("vllm:level=2", 8000, {"level": "2", "drain": "keep"}),
        ("vllm:level=1,port=8001,drain=abort", 8001, {"level": "1", "drain": "abort"}),
        ("sglang", 30000, {"tags": "kv_cache", "drain": "wait"}),
        ("sglang:port=1", 1, {"tags": "kv_cache", "drain": "wait"}),
        ("sglang:tags=weights+kv_cache", 30000, {"tags": "weights+kv_cache", "drain": "wait"}),
    ],
)
def test_a_preset_has_its_options_or_their_defaults(text: str, port: int, options: dict[str, str]) -> None:
    """The first value of an option is its default, and the port is the server's usual one."""
    assert one(text) == Known(name=text.partition(":")[0], port=port, options=options)


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("http://:8000/a", Http(method="POST", endpoint=Endpoint(port=8000), path="/a")),
        ("http://localhost:8000/a", Http(method="POST", endpoint=Endpoint(port=8000), path="/a")),
        ("http://:8000", Http(method="POST", endpoint=Endpoint(port=8000), path="/")),
        ("http:///a", Http(method="POST", endpoint=Endpoint(port=80), path="/a")),
        ("GET http://10.0.0.1:1/a?x=y", Http(method="GET", endpoint=Endpoint(hosts=("10.0.0.1",), port=1), path="/a?x=y")),
        ("get http://[::1]:1/a", Http(method="GET", endpoint=Endpoint(hosts=("::1",), port=1), path="/a")),
        ("http://:1/a some text", Http(method="POST", endpoint=Endpoint(port=1), path="/a", body=b"some text")),
        (
            'PUT http://:1/a json={"tags": ["a ; b"]}',
            Http(method="PUT", endpoint=Endpoint(port=1), path="/a", body=b'{"tags": ["a ; b"]}', is_json=True),
        ),
        ("unix:///run/a.sock:/v1/x?y", Http(method="POST", endpoint=Endpoint(unix="/run/a.sock"), path="/v1/x?y")),
        ("GET unix:///run/a.sock", Http(method="GET", endpoint=Endpoint(unix="/run/a.sock"), path="/")),
        ("exec:/bin/sh -c 'a ; b' \"c d\"", Exec(argv=("/bin/sh", "-c", "a ; b", "c d"))),
        ("signal:USR1", Signal(number=signal.SIGUSR1)),
        ("signal:sigusr2:7", Signal(number=signal.SIGUSR2, target=7)),
        ("signal:HUP:nginx", Signal(number=signal.SIGHUP, target="nginx")),
    ],
)
def test_each_form_of_a_step(text: str, action: object) -> None:
    """Every form that the documentation has, in one line."""
    assert one(text) == action


def test_steps_are_separated_outside_of_quotes() -> None:
    """A command's own semicolons are its own; each step may have its own timeout."""
    hook = parse_hook("exec:sh -c 'a ; b' ; timeout=2.5 http://:1/x ; timeout=90 vllm", "quiesce")
    assert [step.timeout_s for step in hook.steps] == [0.0, 2.5, 90.0]
    assert [type(step.action) for step in hook.steps] == [Exec, Http, Known]
    assert hook.steps[0].action == Exec(argv=("sh", "-c", "a ; b"))
    assert hook.steps[1].text == "timeout=2.5 http://:1/x"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("vlm", "neither a preset", "did you mean vllm?"),
        ("restart", "neither a preset", "needed a preset (vllm, sglang)"),
        ("vllm:level=3", "level cannot be '3'", "level=1|2"),
        ("vllm:lvl=1", "no option 'lvl'", "port, level, drain"),
        ("vllm:port=0", "'0' is not a port", "1 to 65535"),
        ("vllm:port=", "'' is not a port", "1 to 65535"),
        ("vllm:", "", ""),
        ("sglang:tags=kv_cache+wieghts", "tags cannot be 'wieghts'", "kv_cache+weights+cuda_graph"),
        ("https://:1/x", "https cannot be spoken", "exec:curl"),
        ("http://example.com/x", "'example.com' is not an IP address", "http://:8000/path"),
        ("http://:99999/x", "'99999' is not a port", "1 to 65535"),
        ("http://:1x", "is not a URL", "http://:8000/path"),
        ("http://:1/x\r\nHost:y", "is not a URL", "http://:8000/path"),
        ("GET", "'' is not a URL", "http://:8000/path"),
        ("unix://run/a.sock:/x", "is not a URL", "unix:///run/a.sock:/path"),
        ('http://:1/x json={"a"', "not JSON", 'json={"level": 1}'),
        ("exec:", "no command", "exec:/app/quiesce"),
        ("exec:sh -c 'a", "No closing quotation", "quote it as for a shell"),
        ("signal:USR9", "no signal is named 'USR9'", "did you mean USR"),
        ("signal:KILL", "SIGKILL cannot be handled", "signal:USR1"),
        ("signal:USR1:", "nothing after the colon", "signal:USR1:7"),
        ("timeout=x vllm", "not a number of seconds", "timeout=60"),
        ("timeout=0 vllm", "not a number of seconds", "timeout=60"),
        ("timeout=5", "not a number of seconds", "timeout=60"),
        ("vllm ; ", "neither a preset", "needed"),
    ],
)
def test_what_is_wrong_says_what_is_right(text: str, message: str, hint: str) -> None:
    """ANNOTATION_INVALID, with the annotation's name and what to write instead."""
    if text == "vllm:":  # nothing after the colon is no option, and so all defaults
        assert one(text) == one("vllm")
        return
    with pytest.raises(SmrError) as failure:
        parse_hook(text, "resume")
    assert failure.value.code is Code.ANNOTATION_INVALID
    assert "smr.resume" in failure.value.message
    assert message in failure.value.message
    assert hint in failure.value.hint


def test_presets_of_a_quiesce_are_undone_without_being_asked_to() -> None:
    """In reverse, with their options; what is no preset has no opposite."""
    _, resume = parse_hooks("vllm:level=2 ; http://:1/x ; sglang:port=7", "")
    assert [step.text for step in resume.steps] == ["sglang:port=7", "vllm:level=2"]
    assert parse_hooks("http://:1/x", "")[1].steps == ()


@pytest.mark.parametrize(("resume", "steps"), [("none", []), ("signal:USR2", ["signal:USR2"])])
def test_a_resume_that_is_given_is_all_that_happens(resume: str, steps: list[str]) -> None:
    """Also `none`."""
    assert [step.text for step in parse_hooks("vllm", resume)[1].steps] == steps


def test_every_example_of_the_documentation_is_a_hook() -> None:
    """Each line of docs/annotations.md that shows one parses, and each option of each preset is in its tables."""
    text = (Path(__file__).parents[2] / "docs/annotations.md").read_text()
    examples = [line.strip() for line in text.splitlines() if line.startswith("    smr.quiesce=")]
    assert len(examples) >= 9
    for example in examples:
        assert parse_hook(example.removeprefix("smr.quiesce="), "quiesce").steps
    for preset in PRESETS.values():
        assert f"`port={preset.port}`" in text
        for name, values in preset.options.items():
            assert f"`{name}={values[0]}`" in text
            assert all(f"`{value}`" in text for value in values[1:])


def test_presets_list_their_default_first() -> None:
    """Every default is a value that the option may have, and no port is another server's."""
    assert all(values for preset in PRESETS.values() for values in preset.options.values())
    assert len({preset.port for preset in PRESETS.values()}) == len(PRESETS)


def test_restored_json_has_what_its_readers_were_promised() -> None:
    """The members of version 1, in JSON."""
    facts = Restored(
        image="a:1", digest="sha256:0", created="2026-01-01T00:00:00.000+00:00", container="c", gpus={"GPU-1": "GPU-2"}
    )
    document = json.loads(facts.to_json())
    promised = "addresses container created digest environment gpus hostname image old_addresses restored version"
    assert sorted(document) == promised.split()
    assert (document["version"], document["gpus"]) == (1, {"GPU-1": "GPU-2"})
    assert document["restored"].endswith("+00:00")


def test_the_environment_of_a_spec() -> None:
    """The last of two wins, as in the runtime; a value may have a "="; what is no pair is left out."""
    assert environment_of({"process": {"env": ["A=1", "B=x=y", "A=2", "C"]}}) == {"A": "2", "B": "x=y"}
    assert environment_of({}) == {}


@pytest.mark.parametrize("place", ["run", "run/smr"])
def test_no_symbolic_link_is_followed(tmp_path: Path, place: str) -> None:
    """Neither where the folder goes nor above it; nothing is written behind the link."""
    root, aim = tmp_path / "root", tmp_path / "root/etc"
    aim.mkdir(parents=True)
    (root / place).parent.mkdir(exist_ok=True)
    (root / place).symlink_to("/etc")
    fd = os.open(root, os.O_PATH)
    try:
        with pytest.raises(OSError, match="symbolic"):
            restored._write(fd, b"{}")
    finally:
        os.close(fd)
    assert list(aim.iterdir()) == []


def test_the_file_is_replaced_whole_and_taken_back(tmp_path: Path) -> None:
    """A link in the file's place is replaced, not written through; a temporary file left behind does not matter."""
    (tmp_path / "run/smr").mkdir(parents=True)
    secret = tmp_path / "secret"
    secret.write_text("kept")
    (tmp_path / "run/smr/restored.json").symlink_to(secret)
    (tmp_path / "run/smr/.restored.json.tmp").symlink_to(secret)
    fd = os.open(tmp_path, os.O_PATH)
    try:
        restored._write(fd, b"{}")
    finally:
        os.close(fd)
    file = tmp_path / "run/smr/restored.json"
    assert not file.is_symlink()
    assert file.read_bytes() == b"{}"
    assert file.stat().st_mode & 0o7777 == 0o644
    assert [entry.name for entry in file.parent.iterdir()] == ["restored.json"]
    assert secret.read_text() == "kept"
    restored.remove_restored(tmp_path)
    assert not file.exists()
    restored.remove_restored(tmp_path)


def test_folders_that_are_missing_are_made(tmp_path: Path) -> None:
    """/run and /run/smr, 0755 whatever the umask is."""
    fd = os.open(tmp_path, os.O_PATH)
    before = os.umask(0o077)
    try:
        restored._write(fd, b"{}")
    finally:
        os.umask(before)
        os.close(fd)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("run", "run/smr", "run/smr/restored.json")] == [
        0o755,
        0o755,
        0o644,
    ]


def test_paths_stay_below_their_root(tmp_path: Path) -> None:
    """Also through ".." and, where links are followed, through absolute ones: they begin at the root that was given."""
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "root/etc/x").write_text("inside")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/x").write_text("outside")
    (tmp_path / "root/link").symlink_to("/etc/x")
    fd = os.open(tmp_path / "root", os.O_PATH)
    try:
        for path in ("../etc/x", "/etc/x", "link"):
            found = inside.open_in_root(fd, path, os.O_RDONLY, symlinks=True)
            with os.fdopen(found) as file:
                assert file.read() == "inside", path
        with pytest.raises(OSError, match="symbolic"):
            inside.open_in_root(fd, "link", os.O_RDONLY)
    finally:
        os.close(fd)
