"""Hooks against servers in network namespaces of their own, and through real runtimes; restored.json in real roots.

engine_server.py keeps the rules of vLLM and SGLang, and does to who breaks them what those do.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from smr.proto.errors import Code, SmrError
from smr.shim import inside, procs
from smr.shim.inside import Endpoint
from smr.shim.quiesce import HookError, Place, parse_hook, parse_hooks, run_hook
from smr.shim.restored import Restored, write_restored
from tests.integration.command import eventually
from tests.integration.runc import Runc

_SERVER = Path(__file__).with_name("engine_server.py")
FACTS = Restored(image="warm:1", digest="sha256:0", created="2026-01-01T00:00:00.000+00:00", container="c1")


class Served:
    """engine_server.py in its own network namespace, with `lo` up, and a way to ask it for tokens."""

    def __init__(self, folder: Path, *words: str, port: int = 8000) -> None:
        self.log = folder / f"log-{port}"
        self.port = port
        argv = ["unshare", "--net", sys.executable, _SERVER, *words, "--lo", "--port", str(port), "--log", self.log]
        self.process = subprocess.Popen([str(word) for word in argv], stdin=subprocess.DEVNULL)
        self.place = Place(pid=self.process.pid, container="test")
        self.results: list[dict[str, object]] = []
        self.threads: list[threading.Thread] = []

    def begun(self) -> Served:
        """Wait for the namespace: before, a request would go to a server of this machine."""
        namespace = Path(f"/proc/{self.process.pid}/ns/net")
        eventually(lambda: not os.path.samefile(namespace, "/proc/self/ns/net"))
        return self

    def ready(self) -> Served:
        """Wait for the server too."""
        eventually(lambda: self.ask("GET", "/version"))
        return self

    def ask(self, method: str, path: str, seconds: float = 60) -> inside.Answer:
        return inside.request(
            self.place.pid, Endpoint(port=self.port), method, path, deadline=time.monotonic() + seconds, retry_refused=False
        )

    def generate(self, tokens: int) -> dict[str, object]:
        return json.loads(self.ask("POST", f"/generate?tokens={tokens}").body)

    def begin(self, tokens: int) -> None:
        """A request in flight; its result will be in `results`."""

        def work() -> None:
            try:
                self.results.append(self.generate(tokens))
            except (OSError, inside.SilentError) as error:
                self.results.append({"end": f"lost: {error}"})

        thread = threading.Thread(target=work)
        thread.start()
        self.threads.append(thread)

    def finished(self) -> list[dict[str, object]]:
        """All results, once every request has ended."""
        for thread in self.threads:
            thread.join(30)
        return self.results

    def calls(self) -> list[str]:
        """Control requests so far that change something, without their bodies."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [" ".join(line.split()[:2]) for line in lines if not line.startswith(("GET", "POST /flush_cache"))]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.finished()


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start servers; all end with the test."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make network namespaces")
    begun: list[Served] = []

    def start(*words: str, port: int = 8000, wait: bool = True) -> Served:
        served = Served(tmp_path, *words, port=port)
        begun.append(served)
        served.begun()
        return served.ready() if wait else served

    yield start
    for served in begun:
        served.end()


def quiesce(served: Served, text: str, timeout_s: float = 10) -> None:
    run_hook(parse_hook(text, "quiesce"), served.place, timeout_s)


def resume(served: Served, text: str, timeout_s: float = 10) -> None:
    """The resume that follows from a quiesce."""
    run_hook(parse_hooks(text, "")[1], served.place, timeout_s)


def failing(served: Served, text: str, timeout_s: float = 10) -> HookError:
    with pytest.raises(HookError) as failure:
        quiesce(served, text, timeout_s)
    assert failure.value.code is Code.HOOK_FAILED
    return failure.value


def in_flight(served: Served) -> bool:
    return b"num_requests_running{" in (body := served.ask("GET", "/metrics").body) and b" 0.0" not in body.splitlines()[1]


def busy(served: Served) -> bool:
    return served.ask("POST", "/flush_cache").status == 400


# vLLM


@pytest.mark.parametrize("text", ["vllm", "vllm:level=2", "vllm:drain=wait", "vllm:level=2,drain=abort"])
def test_vllm_sleeps_and_wakes(serve: Serve, text: str) -> None:
    """It holds requests while it sleeps, and afterwards answers with good weights, also those that came meanwhile."""
    served = serve("vllm")
    quiesce(served, text)
    assert json.loads(served.ask("GET", "/is_sleeping").body) == {"is_sleeping": True}
    served.begin(2)
    resume(served, text)
    assert served.finished() == [{"tokens": 2, "end": "length", "weights": "good"}]
    assert served.generate(2)["weights"] == "good"


def test_vllm_keeps_requests_in_flight(serve: Serve) -> None:
    """By default they stand still and go on: nobody waits for them and none is lost."""
    served = serve("vllm")
    served.begin(40)
    eventually(lambda: in_flight(served))
    quiesce(served, "vllm")
    assert served.results == []
    resume(served, "vllm")
    assert served.finished() == [{"tokens": 40, "end": "length", "weights": "good"}]


def test_vllm_drains_on_request(serve: Serve) -> None:
    """drain=wait puts it to sleep when the last request has ended."""
    served = serve("vllm")
    served.begin(30)
    eventually(lambda: in_flight(served))
    quiesce(served, "vllm:drain=wait")
    assert served.finished() == [{"tokens": 30, "end": "length", "weights": "good"}]
    assert served.calls() == ["POST /sleep?level=1&mode=keep"]


def test_vllm_aborts_on_request(serve: Serve) -> None:
    """drain=abort ends them with what they have."""
    served = serve("vllm")
    served.begin(100000)
    eventually(lambda: in_flight(served))
    quiesce(served, "vllm:drain=abort")
    assert served.finished()[0]["end"] == "abort"


def test_an_old_vllm_is_drained_first(serve: Serve) -> None:
    """Before 0.17 a request in flight kills an engine that is put to sleep, so it is waited for, whatever `drain` is."""
    served = serve("vllm", "--version", "0.11.2")
    served.begin(30)
    eventually(lambda: in_flight(served))
    quiesce(served, "vllm")
    assert served.finished()[0]["end"] == "length"
    assert served.calls() == ["POST /sleep?level=1"]
    resume(served, "vllm")
    assert served.generate(1)["end"] == "length"


def test_the_old_vllm_does_die_of_it(serve: Serve) -> None:
    """The server of these tests can be harmed: the plain request, without the preset, loses what is in flight."""
    served = serve("vllm", "--version", "0.11.2")
    served.begin(100000)
    eventually(lambda: in_flight(served))
    error = failing(served, "http://:8000/sleep?level=1")
    assert "EngineDeadError" in error.message
    assert served.finished()[0]["end"] == "error"


def test_an_old_vllm_cannot_abort(serve: Serve) -> None:
    """It would be killed; it is said instead, and nothing is done."""
    served = serve("vllm", "--version", "0.11.2")
    error = failing(served, "vllm:drain=abort")
    assert "0.11 cannot abort" in error.message
    assert not error.begun
    assert served.calls() == []


def test_vllm_that_does_not_drain_in_time_goes_on(serve: Serve) -> None:
    """Nothing was stopped for the wait, so there is nothing to undo and the request ends as it would have."""
    served = serve("vllm")
    served.begin(150)
    eventually(lambda: in_flight(served))
    error = failing(served, "timeout=0.4 vllm:drain=wait")
    assert "still had requests in flight" in error.message
    assert "drain=keep" in error.hint
    assert not error.begun
    assert served.calls() == []
    assert served.finished() == [{"tokens": 150, "end": "length", "weights": "good"}]


def test_vllm_without_statistics_cannot_be_drained(serve: Serve) -> None:
    """No gauge is not zero requests."""
    served = serve("vllm", "--no-stats")
    error = failing(served, "vllm:drain=wait")
    assert "does not say how many requests" in error.message
    assert "--disable-log-stats" in error.hint
    quiesce(served, "vllm")


@pytest.mark.parametrize("text", ["vllm", "vllm:level=2"])
def test_vllm_without_development_endpoints(serve: Serve, text: str) -> None:
    """A 404 says which variable and which flag are missing."""
    served = serve("vllm", "--no-dev")
    error = failing(served, text)
    assert "answered 404" in error.message
    assert "VLLM_SERVER_DEV_MODE=1" in error.hint
    assert "--enable-sleep-mode" in error.hint
    assert not error.begun


def test_vllm_that_is_awake_is_not_woken(serve: Serve) -> None:
    """A resume after nothing does nothing; a quiesce of a sleeping server neither."""
    served = serve("vllm")
    resume(served, "vllm")
    quiesce(served, "vllm")
    quiesce(served, "vllm")
    assert served.calls() == ["POST /sleep?level=1&mode=keep"]


def test_level_2_without_its_reload_would_be_garbage(serve: Serve) -> None:
    """The resume has to be of the level of the quiesce, which is why it follows from it."""
    served = serve("vllm")
    quiesce(served, "vllm:level=2")
    run_hook(parse_hook("vllm:level=1", "resume"), served.place, 10)
    assert served.generate(1)["weights"] == "garbage"


# SGLang


@pytest.mark.parametrize("options", [(), ("--old-names",), ("--backup",)])
@pytest.mark.parametrize("tags", ["kv_cache", "kv_cache+weights+cuda_graph"])
def test_sglang_releases_and_resumes(serve: Serve, options: tuple[str, ...], tags: str) -> None:
    """It takes no request into the scheduler meanwhile; weights without a backup are loaded from disk again."""
    text = f"sglang:port=8000,tags={tags}"
    served = serve("sglang", *options)
    quiesce(served, text)
    served.begin(2)
    resume(served, text)
    assert served.finished() == [{"tokens": 2, "end": "length", "weights": "good"}]
    reloaded = "POST /update_weights_from_disk" in served.calls()
    assert reloaded == ("weights" in tags and "--backup" not in options)


def test_sglang_is_drained_before_it_is_paused(serve: Serve) -> None:
    """Pausing aborts; so by default that waits until nothing runs."""
    served = serve("sglang")
    served.begin(30)
    eventually(lambda: busy(served))
    quiesce(served, "sglang:port=8000")
    assert served.finished() == [{"tokens": 30, "end": "length", "weights": "good"}]
    assert served.calls() == ["POST /pause_generation", "POST /release_memory_occupation"]


def test_sglang_aborts_on_request(serve: Serve) -> None:
    """And releases only when the scheduler is empty: a release with a request in it ends the server."""
    served = serve("sglang")
    for _ in range(5):
        served.begin(100000)
    eventually(lambda: busy(served))
    quiesce(served, "sglang:port=8000,drain=abort")
    assert [result["end"] for result in served.finished()] == ["abort"] * 5
    assert served.process.poll() is None


def test_the_sglang_server_does_end_of_it(serve: Serve) -> None:
    """The server of these tests can be harmed: a plain release with a request in flight ends it."""
    served = serve("sglang")
    served.begin(100000)
    eventually(lambda: busy(served))
    error = failing(served, 'http://:8000/release_memory_occupation json={"tags": ["kv_cache"]}')
    assert error.begun
    assert served.process.wait(10) == 9


def test_sglang_that_does_not_drain_in_time_goes_on(serve: Serve) -> None:
    """Nothing was paused, and the hook says that nothing has begun: a resume now would end the server."""
    served = serve("sglang")
    served.begin(150)
    eventually(lambda: busy(served))
    error = failing(served, "timeout=0.4 sglang:port=8000")
    assert "still had requests in flight" in error.message
    assert not error.begun
    assert served.calls() == []
    assert served.finished() == [{"tokens": 150, "end": "length", "weights": "good"}]


def test_sglang_is_continued_when_the_pause_fails(serve: Serve) -> None:
    """What a failed quiesce has begun before the release, it takes back itself."""
    served = serve("sglang", "--fail", "/pause_generation")
    error = failing(served, "sglang:port=8000")
    assert 'answered 500: {"error": {"message": "CUDA error' in error.message
    assert not error.begun
    assert served.calls() == ["POST /pause_generation", "POST /continue_generation"]
    assert served.generate(1)["end"] == "length"


@pytest.mark.parametrize(
    ("option", "message", "hint"),
    [
        (("--no-memory-saver",), "without its memory saver", "--enable-memory-saver"),
        (("--tokenizers", "4"), "4 tokenizer workers", "--tokenizer-worker-num 1"),
        (("--key", "/pause_generation"), "answered 401", "exec:COMMAND"),
    ],
)
def test_sglang_that_cannot_be_quiesced(serve: Serve, option: tuple[str, ...], message: str, hint: str) -> None:
    """It is said before anything is released, with what to start it with."""
    served = serve("sglang", *option)
    error = failing(served, "sglang:port=8000")
    assert message in error.message
    assert hint in error.hint
    assert not error.begun
    assert "POST /release_memory_occupation" not in served.calls()


# Plain HTTP, and failures of any server


def test_a_plain_call_reaches_the_namespace_and_no_other(serve: Serve) -> None:
    """Two servers at one port: each is asked through its own namespace. Proxies in the environment are not used."""
    first, second = serve("vllm"), serve("sglang", port=8000)
    os.environ["http_proxy"] = "http://127.0.0.1:1"
    try:
        quiesce(first, "GET http://:8000/is_sleeping")
        quiesce(second, "GET http://localhost:8000/server_info")
    finally:
        del os.environ["http_proxy"]
    assert "answered 404" in failing(second, "GET http://:8000/is_sleeping").message


def test_ipv6_and_unix_sockets(serve: Serve, tmp_path: Path) -> None:
    """An address, the loopback that answers, or a socket below the root of the container."""
    six = serve("vllm", "--bind", "::1", port=8001, wait=False)
    run_hook(parse_hook("GET http://[::1]:8001/version ; GET http://:8001/version", "resume"), six.place, 10)
    path = tmp_path / "a.sock"
    unix = serve("vllm", "--unix", str(path), port=8002, wait=False)
    run_hook(parse_hook(f"GET unix://{path}:/version ; unix://{path}:/sleep?level=1", "resume"), unix.place, 10)
    assert unix.calls() == ["POST /sleep?level=1"]


@pytest.mark.parametrize("what", ["--hang", "--drip"])
def test_a_server_that_does_not_finish_its_answer(serve: Serve, what: str) -> None:
    """Silence and a byte now and then both end with the timeout; the request was sent, so it may have had an effect."""
    served = serve("vllm", what, "/slow")
    error = failing(served, "timeout=0.5 http://:8000/slow")
    assert "no answer in time (0.5 s)" in error.message
    assert "smr.hook.timeout" in error.hint
    assert error.begun


def test_a_preset_of_a_server_that_hangs(serve: Serve) -> None:
    """The decisive request was sent: the resume has to run."""
    served = serve("vllm", "--hang", "/sleep")
    assert failing(served, "vllm", 0.5).begun


def test_nobody_listens(serve: Serve) -> None:
    """A quiesce fails at once, and nothing has begun."""
    served = serve("vllm")
    error = failing(served, "http://:8009/x", 600)
    assert "POST http://127.0.0.1:8009/x: Connection refused" in error.message
    assert not error.begun
    assert "nobody listens" in failing(served, "unix:///nowhere:/x", 600).hint


def test_a_resume_waits_for_a_server_that_begins_to_listen(serve: Serve) -> None:
    """Refused connections are tried again until the time is up; only then is it an error."""
    served = serve("vllm", wait=False)  # it needs a moment to begin
    run_hook(parse_hook("vllm", "resume"), served.place, 30)
    with pytest.raises(HookError, match="Connection refused"):
        run_hook(parse_hook("timeout=0.3 http://:8009/x", "resume"), served.place)


@pytest.mark.parametrize(("option", "status"), [("--fail", 500), ("--redirect", 307)])
def test_an_answer_that_is_no_success(serve: Serve, option: str, status: int) -> None:
    """The URL, the status and the beginning of the body are in the message. Redirects count as failures."""
    served = serve("vllm", option, "/x")
    error = failing(served, "http://:8000/x")
    assert f"quiesce hook 'http://:8000/x' failed: POST http://127.0.0.1:8000/x answered {status}" in error.message
    assert error.begun
    assert error.context["step"] == 1


def test_later_steps_do_not_run_after_a_failure(serve: Serve) -> None:
    """The step that failed is named, and that something had begun before it."""
    served = serve("vllm")
    error = failing(served, "GET http://:8000/version ; http://:8009/x ; http://:8000/sleep")
    assert (error.context["step"], error.begun) == (2, True)
    assert served.calls() == []


def test_a_container_that_has_ended() -> None:
    """HOOK_FAILED, as everything that a hook meets."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.raises(HookError):
        run_hook(parse_hook("http://:1/x", "quiesce"), Place(pid=gone.pid, container="gone"))


# Through real runtimes

# Handles USR1 by appending to /tmp/got; its child waits for USR1 in sigwait; a second child has no handler at all.
_PROGRAM = """
import os, signal, time
def got(name):
    with open("/tmp/got", "a") as file:
        file.write(name + "\\n")
if os.fork() == 0:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    open("/proc/self/comm", "w").write("waiter")
    got("waiter waits")
    while True:
        signal.sigwait({signal.SIGUSR1})
        got("waiter")
if os.fork() == 0:
    open("/proc/self/comm", "w").write("plain")
    got("plain lives")
    time.sleep(3600)
signal.signal(signal.SIGUSR1, lambda *_: got("init"))
got("init lives")
while True:
    time.sleep(1)
"""


@pytest.fixture
def container(runc: Runc) -> Place:
    """A container with `_PROGRAM`, of a user other than root."""

    def edit(spec: dict[str, object]) -> None:
        process = spec["process"]
        assert isinstance(process, dict)
        process["user"] = {"uid": 1000, "gid": 1000}
        process["env"] = [*process["env"], "WHO=container"]

    folder = runc.bundle("hooked", "python3", "-c", _PROGRAM, edit=edit)
    (folder / "upper").chmod(0o755)
    (folder / "rootfs/tmp").mkdir(exist_ok=True)
    (folder / "rootfs/tmp").chmod(0o1777)
    runc.create("hooked", folder, bare=True)
    runc("start", "hooked", bare=True)
    place = Place(pid=runc.pid("hooked"), container="hooked", runtime=runc.bare)
    eventually(lambda: len(got(place)) == 3, what="the program and its children live")
    return place


def got(place: Place) -> list[str]:
    return Path(f"/proc/{place.pid}/root/tmp/got").read_text().splitlines()


def hook(place: Place, text: str, timeout_s: float = 20) -> None:
    run_hook(parse_hook(text, "quiesce"), place, timeout_s)


def test_a_command_is_the_containers_own(container: Place) -> None:
    """Its user, environment, cgroup, and all its namespaces."""
    script = "id -u > /tmp/facts; echo $WHO >> /tmp/facts; cat /proc/self/cgroup >> /tmp/facts; ls -l /proc/self/ns >> /tmp/facts"
    hook(container, f"exec:/bin/sh -c '{script}'")
    facts = Path(f"/proc/{container.pid}/root/tmp/facts").read_text()
    assert facts.splitlines()[:2] == ["1000", "container"]
    for kind in ("mnt", "net", "pid", "ipc", "uts"):
        assert os.readlink(f"/proc/{container.pid}/ns/{kind}") in facts
    own = [line.partition(":")[2] for line in Path(f"/proc/{container.pid}/cgroup").read_text().splitlines()]
    assert any(part in facts for part in own)


def test_a_command_that_fails(container: Place) -> None:
    """Its status and output are the message; what it is, the hint's command line."""
    with pytest.raises(HookError) as failure:
        hook(container, "exec:/bin/sh -c 'echo out of luck; exit 3'")
    assert "ended with status 3: out of luck" in failure.value.message
    assert "exec hooked /bin/sh" in failure.value.hint
    assert failure.value.begun


def test_a_command_that_is_not_there(container: Place) -> None:
    """The runtime's own words."""
    with pytest.raises(HookError, match="no-such-program"):
        hook(container, "exec:no-such-program")


def test_a_command_that_does_not_end_is_killed(container: Place) -> None:
    """With its children: nothing of a hook runs on into the checkpoint."""
    before = {process.ns_pid for process in _inside(container)}
    with pytest.raises(HookError, match="did not end within 1 s and was killed: begun"):
        hook(container, "timeout=1 exec:/bin/sh -c 'echo begun; sleep 3600; true'")
    assert {process.ns_pid for process in _inside(container)} == before


def test_a_command_may_leave_something_running(container: Place) -> None:
    """What has let go of the output is not waited for, and lives on."""
    hook(container, "exec:/bin/sh -c 'sleep 3600 >/dev/null 2>&1 & echo started'")
    assert any(_comm(process.pid) == "sleep" for process in _inside(container))


def _inside(place: Place) -> list[procs.Process]:
    """All processes of the container's pid namespace."""
    own = os.readlink(f"/proc/{place.pid}/ns/pid")
    found = []
    for pid in procs.all_pids():
        try:
            same = os.readlink(f"/proc/{pid}/ns/pid") == own
        except OSError:
            continue
        process = procs.describe(pid)
        if same and process is not None and process.state not in "ZX":
            found.append(process)
    return found


def _comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_signals_by_init_pid_and_name(container: Place) -> None:
    """Init handles it, a pid is the container's, and a process that waits for the signal counts as one that handles it."""
    hook(container, "signal:USR1")
    eventually(lambda: got(container).count("init") == 1)
    hook(container, "signal:USR1:1 ; signal:USR1:waiter")
    eventually(lambda: (got(container).count("init"), got(container).count("waiter")) == (2, 1))


def test_a_signal_that_would_end_a_process_is_not_sent(container: Place) -> None:
    """A process without a handler is named and lives on; nobody of that name is an error too, as is no such pid."""
    with pytest.raises(HookError, match=r"\(plain\) does not handle SIGUSR1") as failure:
        hook(container, "signal:USR1:plain")
    assert not failure.value.begun
    assert any(_comm(process.pid) == "plain" for process in _inside(container))
    with pytest.raises(HookError, match="no process is named 'nginx'"):
        hook(container, "signal:USR1:nginx")
    with pytest.raises(HookError, match="no process 4000 in the container"):
        hook(container, "signal:USR1:4000")


def test_a_signal_that_is_ignored_is_no_error(container: Place) -> None:
    """What a process makes of a signal is not known, so nothing is claimed; one with a harmless default may be sent to all."""
    hook(container, "signal:WINCH:plain ; signal:CHLD")
    assert got(container)[3:] == []


# /run/smr/restored.json


def test_the_container_finds_the_file(container: Place, runc: Runc) -> None:
    """In /run/smr, readable to its user, whole, and what is written again replaces it."""
    assert write_restored(container.pid, FACTS) is None
    assert json.loads(runc.exec("hooked", "cat", "/run/smr/restored.json", bare=True).stdout)["container"] == "c1"
    assert runc.exec("hooked", "stat", "-c", "%a %u", "/run/smr", "/run/smr/restored.json", bare=True).stdout.split() == [
        *("755", "0"),
        *("644", "0"),
    ]
    assert write_restored(container.pid, FACTS) is None
    assert runc.exec("hooked", "ls", "-A", "/run/smr", bare=True).stdout == "restored.json\n"


@pytest.mark.parametrize("place", ["run", "run/smr"])
def test_a_planted_link_is_not_followed(runc: Runc, place: str) -> None:
    """Not to the container's /etc, and not out of the container; it is a warning, and nothing is written."""
    folder = runc.bundle("planted", "sleep", "600")
    link = folder / "rootfs" / place
    if place == "run":
        (link).rmdir() if link.is_dir() else None
    else:
        link.parent.mkdir(exist_ok=True)
    link.symlink_to("/etc")
    runc.create("planted", folder, bare=True)
    warning = write_restored(runc.pid("planted"), FACTS)
    assert warning is not None
    assert "a symbolic link is in the way" in warning
    assert not (folder / "rootfs/etc/smr").exists()
    assert not (folder / "rootfs/etc/restored.json").exists()
    assert not Path("/etc/smr").exists()


def test_a_read_only_root_is_a_warning_and_a_tmpfs_on_run_is_none(runc: Runc) -> None:
    """Without /run of its own such a container goes without the file."""

    def closed(spec: dict[str, object]) -> None:
        root = spec["root"]
        assert isinstance(root, dict)
        root["readonly"] = True

    def opened(spec: dict[str, object]) -> None:
        closed(spec)
        mounts = spec["mounts"]
        assert isinstance(mounts, list)
        mounts.append({"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]})

    for name, edit, expected in (("closed", closed, "Read-only file system"), ("opened", opened, None)):
        folder = runc.bundle(name, "sleep", "600")
        (folder / "rootfs/run").mkdir(exist_ok=True)
        spec = json.loads((folder / "config.json").read_text())
        edit(spec)
        (folder / "config.json").write_text(json.dumps(spec))
        runc.create(name, folder, bare=True)
        warning = write_restored(runc.pid(name), FACTS)
        assert (warning is None) if expected is None else (warning is not None and expected in warning)


def test_in_a_user_namespace_the_file_is_the_containers(runc: Runc) -> None:
    """It belongs to the container's root, on the overlay and on a tmpfs that only knows the container's ids."""

    def edit(spec: dict[str, object]) -> None:
        linux, mounts = spec["linux"], spec["mounts"]
        assert isinstance(linux, dict)
        assert isinstance(mounts, list)
        linux["namespaces"].append({"type": "user"})
        linux["uidMappings"] = linux["gidMappings"] = [{"containerID": 0, "hostID": 200000, "size": 65536}]
        spec["mounts"] = [mount for mount in mounts if mount["type"] not in {"sysfs", "cgroup"}]
        tmpfs = {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]}
        spec["mounts"].append(tmpfs)  # type: ignore[attr-defined]

    runc.path.chmod(0o755)
    folder = runc.bundle("mapped", "sleep", "600", edit=edit)
    (folder / "rootfs/run").mkdir(exist_ok=True)
    created = runc.create("mapped", folder, bare=True, check=False)
    if created.returncode != 0:
        pytest.skip(f"no container in a user namespace here: {created.stderr.strip()}")
    pid = runc.pid("mapped")
    assert write_restored(pid, FACTS) is None
    for path in ("run/smr", "run/smr/restored.json"):
        assert os.stat(f"/proc/{pid}/root/{path}").st_uid == 200000


def test_a_failure_has_its_code() -> None:
    """Hooks fail with HOOK_FAILED, which the exit status of the command line goes by."""
    with pytest.raises(SmrError) as failure:
        run_hook(parse_hook("signal:USR1:nobody-here", "quiesce"), Place(pid=os.getpid(), container="self"))
    assert failure.value.code is Code.HOOK_FAILED
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
