"""Without an `smr.` annotation SMR's runtime and shim are the real ones: same output, same codes, nothing of ours resident."""

from __future__ import annotations

import json
import re

import pytest

from tests.integration import testimage
from tests.integration.command import eventually
from tests.integration.containerd import STOCK, Containerd
from tests.integration.podman import Podman
from tests.integration.runc import Runc
from tests.integration.sandbox import Sandbox

_RUNTIMES = pytest.mark.parametrize("runtime", ["smr", "runc"])
_SHIMS = pytest.mark.parametrize("shim", [STOCK, "io.containerd.smr.v1", "io.containerd.smr.v2"])


def python_of_ours(box: Sandbox) -> list[str]:
    """Processes of SMR that a container has left resident."""
    return [command for _, command in box.processes() if "smr.shim" in command or re.match(r"\S*(sh|python3?) \S*smr", command)]


@_RUNTIMES
def test_podman_run_gives_output_and_exit_code(podman: Podman, runtime: str) -> None:
    """`podman run` prints what the container prints and ends with its code."""
    command = "echo out; echo err >&2; exit 23"
    done = podman("run", "--rm", *podman.network, f"--runtime={runtime}", testimage.NAME, "sh", "-c", command, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 23)


@_RUNTIMES
def test_podman_reports_a_command_that_is_not_there(podman: Podman, runtime: str) -> None:
    """The real runtime's error reaches the user: exit code 127 and the command's name."""
    done = podman("run", "--rm", *podman.network, f"--runtime={runtime}", testimage.NAME, "no-such-command", check=False)
    assert done.returncode == 127
    assert "no-such-command" in done.stderr


@_RUNTIMES
def test_podman_life_of_a_server(podman: Podman, box: Sandbox, runtime: str) -> None:
    """run, exec, logs, inspect, pause, stop with the handler's exit code, restart, rm."""
    podman.start("server", "--exit", "9", options=[f"--runtime={runtime}", "--annotation=other.key=1"])
    boot = podman.ready("server")["boot"]
    assert python_of_ours(box) == []
    assert podman.exec("server", "cat", input="through\n", options=["-i"]).stdout == "through\n"
    assert podman.exec("server", "sh", "-c", "exit 5", check=False).returncode == 5
    assert podman.logs("server") == f"ready {boot}\n"
    podman("pause", "server")
    assert podman.field("server", "{{.State.Status}}") == "paused"
    podman("unpause", "server")
    podman("stop", "server")
    assert podman.field("server", "{{.State.ExitCode}}") == "9"
    podman("start", "server")
    assert podman.ready("server")["boot"] != boot
    podman("rm", "-f", "-t", "0", "server")
    assert podman("ps", "-aq").stdout == ""


@_SHIMS
def test_containerd_run_gives_output_and_exit_code(containerd: Containerd, shim: str) -> None:
    """`ctr run` in the foreground prints what the container prints and ends with its code."""
    command = ["sh", "-c", "echo out; echo err >&2; exit 23"]
    done = containerd("run", "--rm", "--runtime", shim, testimage.NAME, "c1", *command, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 23)


@_SHIMS
def test_containerd_life_of_a_server(containerd: Containerd, box: Sandbox, shim: str) -> None:
    """run, exec, task list, metrics, pause, kill with the handler's exit code, delete."""
    containerd.start("server", "--exit", "9", runtime=shim)
    boot = containerd.ready("server")["boot"]
    assert python_of_ours(box) == []
    assert containerd.exec("server", "sh", "-c", "exit 5", check=False).returncode == 5
    assert containerd.running("server")
    assert "memory" in containerd("task", "metrics", "server").stdout
    containerd("task", "pause", "server")
    assert containerd.tasks()["server"][1] == "PAUSED"
    containerd("task", "resume", "server")
    containerd.kill("server", "TERM")
    assert containerd.wait("server") == 9
    assert containerd.logs("server") == f"ready {boot}\n"
    containerd.remove("server")
    assert containerd("container", "ls", "-q").stdout == ""


@_SHIMS
def test_containerd_reports_a_command_that_is_not_there(containerd: Containerd, shim: str) -> None:
    """The real runtime's error reaches the user of ctr."""
    done = containerd("run", "--rm", "--runtime", shim, testimage.NAME, "c1", "no-such-command", check=False)
    assert done.returncode != 0
    assert "no-such-command" in done.stderr


@pytest.mark.parametrize("word", ["-v", "-info"])
def test_shim_answers_questions_as_the_stock_one(containerd: Containerd, word: str) -> None:
    """`-v` and `-info` come from the stock shim."""
    from tests.integration.command import run

    stock = run(["containerd-shim-runc-v2", word], env=containerd.env, check=False, input="{}")
    ours = run(["containerd-shim-smr-v1", word], env=containerd.env, check=False, input="{}")
    assert (ours.returncode, ours.stdout.replace("smr-v1", "runc-v2")) == (stock.returncode, stock.stdout)


@pytest.mark.parametrize(
    "words",
    [
        ["--version"],
        ["--help"],
        ["no-such-verb"],
        ["--no-such-flag", "list"],
        ["state", "nobody"],
        ["start", "nobody"],
        ["kill", "nobody", "KILL"],
        ["delete", "nobody"],
        ["delete", "--force", "nobody"],
        ["exec", "nobody", "true"],
        ["list"],
        ["spec", "--help"],
        ["checkpoint", "--help"],
        ["--log-format", "json", "state", "nobody"],
        ["create", "--bundle", "/nonexistent", "x"],
        [],
    ],
    ids=" ".join,
)
def test_calls_answer_as_the_real_runtime_does(runc: Runc, words: list[str]) -> None:
    """Any call that concerns no container of ours gives the real runtime's status and output."""
    ours, bare = runc(*words, check=False), runc(*words, bare=True, check=False)
    assert (ours.returncode, ours.stdout) == (bare.returncode, bare.stdout)
    assert _without_time(ours.stderr) == _without_time(bare.stderr)


def _without_time(text: str) -> list[str]:
    lines = [json.loads(line) if line.startswith("{") else line for line in text.splitlines()]
    return [
        str({k: v for k, v in line.items() if k != "time"}) if isinstance(line, dict) else line.partition("msg=")[2] or line
        for line in lines
    ]


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "smr"])
def test_create_start_kill_delete(runc: Runc, bare: bool, box: Sandbox) -> None:
    """A container by hand goes through created, running and stopped, and is gone after delete."""
    folder = runc.bundle("c1", "python3", "/app/workload.py", annotations={"org.example": "smr.restore"})
    runc.create("c1", folder, bare=bare)
    assert runc.state("c1", bare=bare)["status"] == "created"
    runc("start", "c1", bare=bare)
    runc.ready("c1")
    assert python_of_ours(box) == []
    assert runc.state("c1", bare=bare)["status"] == "running"
    runc("kill", "c1", "KILL", bare=bare)
    eventually(lambda: runc.state("c1", bare=bare)["status"] == "stopped")
    runc("delete", "c1", bare=bare)
    assert runc("state", "c1", bare=bare, check=False).returncode != 0
