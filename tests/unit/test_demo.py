"""The demo: command lines and configuration of its engines, what it counts as equal, and what it prints."""

from __future__ import annotations

import json
import threading
import tomllib

import pytest

from smr.proto.errors import Code, SmrError
from smr.shim.demo import engine as engines
from smr.shim.demo import overlay, report, server
from smr.shim.demo.client import CACHED_PROMPT, FRESH_PROMPT, Answer, Client
from smr.shim.demo.demo import Outcome, Plan, Report, Restored, check_state, parse_stages
from smr.shim.demo.engine import Containerd, Node, Podman, Start, containerd_conf, missing, podman_conf, runtime_script
from smr.shim.demo.overlay import volumes
from smr.shim.demo.scratch import mounts_below, scratch
from smr.shim.state import Stage


@pytest.fixture
def node(tmp_path):
    return Node(base=tmp_path / "a b", bin=tmp_path / "bin", criu="/opt/criu", runtime="/usr/sbin/runc")


@pytest.fixture
def start(tmp_path):
    return Start(
        name="web",
        root=tmp_path / "merged",
        command=("python3", "-u", "server.py"),
        pid_file=tmp_path / "web.pid",
        volumes=(tmp_path / "venv",),
        annotations={"smr.restore": "demo:latest", "smr.fallback": "fail"},
    )


def outcome(engine="podman", cold=(9.0, 8.0, 12.0), restored=(1.0, 2.0, 1.5)):
    runs = tuple(
        Restored(
            ttft_s=ttft,
            offset_s=0.25,
            stages=(
                Stage(name="create", start_s=0.01, end_s=0.01 + ttft / 2),
                Stage(name="locate", start_s=0.0, end_s=0.01),
            ),
            tokens_equal=True,
        )
        for ttft in restored
    )
    return Outcome(engine=engine, cold_s=cold, restored=runs, image_bytes=3 << 30, pause_s=2.5)


def whole(*outcomes):
    plan = Plan(params="tiny", runs=3, engines=("podman", "containerd"), python="/usr/bin/python3")
    return Report(plan=plan, model="llama-tiny-float32", outcomes=outcomes)


def test_podman_command_ends_with_root_and_command(node, start):
    """The root is an argument of --rootfs, and nothing comes between it and the command."""
    words = Podman(node).run_argv(start)
    assert words[:2] == ["podman", "run"]
    assert words[-5:] == ["--rootfs", str(start.root), *start.command]
    assert "--annotation=smr.restore=demo:latest" in words
    assert "--runtime=smr" in words
    assert f"--volume={start.volumes[0]}:{start.volumes[0]}:ro" in words


def test_containerd_command_has_root_then_name_then_command(node, start):
    """`ctr run --rootfs` takes the root where an image would stand."""
    words = Containerd(node).run_argv(start)
    assert words[:2] == ["ctr", "run"]
    assert words[-5:] == [str(start.root), "web", *start.command]
    assert "--rootfs" in words
    assert "--runtime=io.containerd.smr.v2" in words
    assert "--annotation=smr.fallback=fail" in words


@pytest.mark.parametrize(("kind", "word"), [(Podman, "--runtime=stock"), (Containerd, "--runtime=io.containerd.runc.v2")])
def test_probe_uses_the_stock_runtime(node, start, kind, word):
    """An engine that cannot run any container here is told from an SMR that does not work."""
    probe = Start(name="probe", root=start.root, command=("/bin/true",), pid_file=start.pid_file, runtime="stock")
    assert word in kind(node).run_argv(probe)


@pytest.mark.parametrize("capable", [True, False])
def test_podman_configuration_is_toml_within_its_folder(node, tmp_path, monkeypatch, capable):
    """Every path podman writes to lies in the demo's folder; limits are lowered only where we may not raise them."""
    monkeypatch.setattr(engines.procs, "has_capability", lambda number: capable)
    base = node.base / "podman"
    document = tomllib.loads(podman_conf(base, node))
    for key in ("static_dir", "tmp_dir", "volume_path"):
        assert document["engine"][key].startswith(f"{base}/")
    assert document["engine"]["runtimes"] == {"smr": [f"{base}/smr-runtime"], "stock": ["/usr/sbin/runc"]}
    assert ("default_ulimits" in document["containers"]) is not capable


def test_runtime_script_quotes_its_settings(node):
    """A folder with a space in its name stays one word."""
    lines = runtime_script(node).splitlines()
    assert lines[0] == "#!/bin/sh"
    assert f"export SMR_STORE='{node.base}/store'" in lines
    assert lines[-1] == f'exec {node.bin}/smr-runtime "$@"'


def test_containerd_configuration_is_toml_within_its_folder(node):
    """Root, state and socket are the demo's own."""
    base = node.base / "containerd"
    document = tomllib.loads(containerd_conf(base))
    assert {document["root"], document["state"]} == {f"{base}/root", f"{base}/state"}
    assert document["grpc"]["address"] == f"{base}/state/containerd.sock"
    assert Containerd(node).env["CONTAINERD_ADDRESS"] == document["grpc"]["address"]


def test_missing_engine_says_what_would_be_installed(monkeypatch):
    """The reason names the programs that lack and the packages that bring them."""
    monkeypatch.setattr(engines.shutil, "which", lambda name: None if name == "ctr" else f"/usr/bin/{name}")
    assert missing(Podman) == ""
    assert missing(Containerd) == "ctr not found; would install: apt-get install containerd runc"


def test_json_has_exactly_the_promised_members():
    """What other programs read; medians over the runs, stages in order of their starts."""
    document = json.loads(json.dumps(report.as_json(whole(outcome(), Outcome(engine="containerd", skipped="not found")))))
    assert document == {
        "podman": {
            "cold_ttft_s": 9.0,
            "restored_ttft_s": 1.5,
            "tokens_equal": True,
            "stages_ms": {"locate": 10.0, "create": 750.0},
        },
        "containerd": {"skipped": "not found"},
    }


def test_json_of_a_failure_holds_the_error():
    """An engine on which it failed is neither skipped nor measured."""
    failed = Outcome(engine="podman", error=SmrError("no luck", code=Code.ENGINE_FAILED))
    assert report.as_json(whole(failed)) == {
        "podman": {"error": {"code": "engine_failed", "message": "no luck", "hint": "", "context": {}}}
    }


def test_one_run_with_other_tokens_makes_all_different():
    """A median must not hide a restore that answered wrongly."""
    good = outcome()
    bad = Restored(ttft_s=1.0, offset_s=0.1, stages=good.restored[0].stages, tokens_equal=False)
    mixed = Outcome(engine="podman", cold_s=(9.0,), restored=(*good.restored, bad))
    assert good.tokens_equal
    assert not mixed.tokens_equal
    assert report.rows(whole(mixed))[0][4] == "DIFFERENT"


def test_tables_have_a_row_each():
    """Skipped engines are in the first table and not in the second."""
    result = whole(outcome(), Outcome(engine="containerd", skipped="not found"))
    assert report.rows(result)[0] == ("podman", "9.00 s", "1.50 s", "6.0 x", "equal", "3.0 GiB", "2.50 s")
    assert [row[:2] for row in report.rows(result)[1:]] == [("containerd", "skipped")]
    assert report.stage_rows(result) == [("locate", "10.0 ms"), ("create", "750.0 ms")]


def test_picture_compares_starts_and_shows_stages_where_they_fell():
    """Stages begin after the engine's own part, and the panel ends with the first token."""
    comparison, stages = report.chart(whole(outcome())).panels
    assert [(bar.name, bar.end_s) for bar in comparison.bars] == [("podman, cold", 9.0), ("podman, restored", 1.5)]
    assert comparison.total_s == 9.0
    assert [bar.name for bar in stages.bars] == ["podman", "locate", "create", "first token"]
    assert stages.bars[1].start_s == 0.25
    assert stages.bars[-1].end_s == stages.total_s == 1.5


def answers(first, cached=47, tokens=(1, 2)):
    return (
        Answer(tokens=tokens, cached_tokens=cached, requests=first),
        Answer(tokens=tokens, cached_tokens=0, requests=first + 1),
    )


def test_state_goes_on():
    """Two reference answers, one first token, two answers again."""
    check_state(answers(4), answers(7))


@pytest.mark.parametrize("after", [answers(2), answers(8), answers(7, cached=0)])
def test_lost_state_is_an_error(after):
    """A cold server in disguise: its counter begins anew, or its prefix cache is empty."""
    with pytest.raises(SmrError) as caught:
        check_state(answers(4), after)
    assert caught.value.code is Code.RESTORE_FAILED


def test_stages_come_from_inspect():
    """As `smr inspect --json` prints them."""
    facts = {"stages": [{"name": "create", "start_s": 0.1, "end_s": 0.5}]}
    assert parse_stages(facts) == (Stage(name="create", start_s=0.1, end_s=0.5),)


def test_volumes_are_what_the_root_overlay_does_not_show(tmp_path, monkeypatch):
    """Paths on the root's file system are seen already; one inside another volume comes with it."""
    home, venv, root = tmp_path / "home", tmp_path / "home/venv", tmp_path / "model"
    for folder in (home, venv, root):
        folder.mkdir()
    monkeypatch.setattr(overlay, "mount_point", lambda path: home.parent if home in (path, *path.parents) else path.parents[-1])
    assert volumes([venv, root, home]) == (home,)


def test_mount_point_of_the_root_is_the_root():
    """And of /proc, /proc."""
    assert str(overlay.mount_point(overlay.Path("/"))) == "/"
    assert str(overlay.mount_point(overlay.Path("/proc/self"))) == "/proc"


def test_scratch_is_gone_after_an_interrupt(tmp_path):
    """The folder is removed, and the interrupt goes on."""
    with pytest.raises(KeyboardInterrupt), scratch(tmp_path) as base:
        (base / "store").mkdir()
        assert mounts_below(base) == []
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("[]", "object"),
        ("{", "Expecting"),
        ('{"prompt_tokens": []}', "prompt_tokens"),
        ('{"prompt_tokens": [1, -1]}', "prompt_tokens"),
        ('{"prompt_tokens": [true]}', "prompt_tokens"),
        ('{"prompt_tokens": [99999]}', "prompt_tokens"),
        ('{"prompt_tokens": [1], "max_tokens": 0}', "max_tokens"),
        ('{"prompt_tokens": [1], "max_tokens": "9"}', "max_tokens"),
    ],
)
def test_bad_requests_say_what_is_wrong(body, word):
    """The server answers 400 with this text."""
    with pytest.raises(ValueError, match=word):
        server.parse_request(body.encode())


def test_good_requests_have_defaults():
    """16 tokens, with the cache."""
    assert server.parse_request(b'{"prompt_tokens": [1, 2]}') == ([1, 2], 16, True)


@pytest.mark.parametrize(
    ("one", "other", "length"), [((1, 2, 3), (1, 2, 4), 2), ((1, 2), (1, 2, 3), 2), ((), (1,), 0), ((5,), (6,), 0)]
)
def test_common_prefix(one, other, length):
    """Tokens in common from the start on."""
    assert server.common_prefix(one, other) == length


class Model:
    """Counts up from the last token of the prompt; knows the cached prompt from its second request on."""

    def __init__(self):
        self.seen = set()

    def generate(self, prompt, max_tokens, *, cache):
        cached = len(prompt) - 1 if cache and tuple(prompt) in self.seen else 0
        if cache:
            self.seen.add(tuple(prompt))
        return [prompt[-1] + 1 + index for index in range(max_tokens)], cached

    def facts(self):
        return {"parameters": 1}


@pytest.fixture
def running():
    instance = server.Server(("127.0.0.1", 0), Model())
    thread = threading.Thread(target=instance.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Client(instance.server_address[1], timeout_s=10)
    instance.shutdown()
    thread.join()
    instance.server_close()


def test_client_and_server_understand_each_other(running, capfd):
    """Tokens, the cache and the counter come through HTTP as they are."""
    first = running.first_token(lambda: None, timeout_s=10)
    assert (len(first.tokens), first.cached_tokens, first.requests) == (1, 0, 1)
    running.reference()
    cached, fresh = running.reference()
    assert cached == Answer(tokens=tuple(range(248, 272)), cached_tokens=len(CACHED_PROMPT) - 1, requests=4)
    assert (fresh.tokens[0], fresh.cached_tokens, fresh.requests) == (FRESH_PROMPT[-1] + 1, 0, 5)
    health = running.health()
    assert health["requests"] == 5
    assert health["ready"] is True
    assert "request 5: 64 tokens in, 0 of them cached, 24 out" in capfd.readouterr().out


def test_server_refuses_bad_requests_and_lives_on(running):
    """400 with the reason; the counter does not move."""
    with pytest.raises(SmrError, match=r"answered 400.*max_tokens"):
        running.generate([1], 0, cache=True)
    with pytest.raises(SmrError, match="answered 404"):
        running._ask("GET", "/metrics", None)
    assert running.health()["requests"] == 0


def test_waiting_ends_when_the_container_has(monkeypatch):
    """Nobody listens: `alive` decides whether there is use in asking on."""

    def gone():
        raise SmrError("ended", code=Code.ENGINE_FAILED)

    with pytest.raises(SmrError, match="ended"):
        Client(1).first_token(gone, timeout_s=10)


def test_waiting_has_an_end():
    """TIMEOUT names a way out."""
    with pytest.raises(SmrError) as caught:
        Client(1).first_token(lambda: None, timeout_s=0)
    assert caught.value.code is Code.TIMEOUT
    assert "--params tiny" in caught.value.hint
