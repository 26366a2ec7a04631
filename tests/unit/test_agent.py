"""The node agent's parts, without processes: what it counts, answers and posts."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from google.protobuf.message import Message
from grpclib.const import Status as Grpc
from grpclib.exceptions import GRPCError
from grpclib.testing import ChannelFor
from prometheus_client.parser import text_string_to_metric_families

from smr.images.store import Store
from smr.proto.agent import agent_pb2 as pb
from smr.proto.agent.agent_grpc import AgentStub
from smr.proto.errors import Code, SmrError
from smr.shim.agent import health, kubernetes, totals, web
from smr.shim.agent.journal import Follower
from smr.shim.agent.main import options_of
from smr.shim.agent.metrics import METRICS, Metrics
from smr.shim.agent.reader import Position
from smr.shim.agent.service import Service, event_of, grpc_status, list_images
from smr.shim.agent.totals import BUCKETS, Totals
from smr.shim.agent.workers import Workers
from smr.shim.config import Config
from smr.shim.events import note
from tests.store_support import commit, rewrite_blob

ROOT = Path(__file__).parents[2]
PAGES = {"strategy": "fill", "memory_bytes": 1000, "read_bytes": 400, "source": "cache"}
RESTORED = {"container": "c1", "image": "llama", "busy_s": 0.2, "stages_s": {"create": 0.1}, "pages": PAGES}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A node of its own."""
    return Config(run=tmp_path / "run", log=tmp_path / "smr.log", store=tmp_path / "store")


def test_totals_count_what_events_say() -> None:
    """Results by code, times by stage, bytes by where they came from."""
    found = Totals()
    found.add({"event": "restored", **RESTORED})
    found.add({"event": "restored", "pages": {"strategy": "lazy", "memory_bytes": 7}, "busy_s": 1})
    found.add({"event": "restored", "pages": {"strategy": "criu"}})
    found.add({"event": "started_cold", "code": "image_not_found"})
    found.add({"event": "restore_killed"})
    found.add({"event": "checkpointed", "pause_s": 0.3, "stages_s": {"dump": 0.2}})
    found.add({"event": "checkpoint_failed", "code": "criu_failed"})
    assert found.counters == {
        ("restores", ("restored", "")): 3,
        ("restores", ("cold", "image_not_found")): 1,
        ("restores", ("killed", "")): 1,
        ("restore_bytes", ("disk",)): 400,
        ("restore_bytes", ("cache",)): 600,
        ("restore_bytes", ("lazy",)): 7,
        ("checkpoints", ("ok", "")): 1,
        ("checkpoints", ("failed", "criu_failed")): 1,
    }
    assert found.histograms["restore", ()].sum == pytest.approx(1.2)
    assert found.histograms["restore_stage", ("create",)].counts[BUCKETS.index(0.1)] == 1
    assert found.histograms["checkpoint_pause", ()].sum == pytest.approx(0.3)
    assert sum(found.histograms["checkpoint_stage", ("dump",)].counts) == 1


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"event": "new"},
        {"event": 5},
        {"event": "checkpointed", "pause_s": "x", "stages_s": [1]},
        {"event": "restored", "pages": 1},
    ],
)
def test_totals_take_any_event(event: dict[str, object]) -> None:
    """An event of another version neither fails nor is counted as what it is not."""
    found = Totals()
    found.add(event)
    assert not found.histograms


def test_totals_are_kept(tmp_path: Path) -> None:
    """What was saved is what is loaded, the place in the journal with it."""
    found = Totals(position=Position(journal="abc", offset=7))
    found.add({"event": "restored", **RESTORED})
    found.save(tmp_path / "totals.json")
    assert totals.load(tmp_path / "totals.json") == found


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 2}', '{"version": 1}', '{"version": 1, "position": 1, "counters": [], "histograms": []}']
)
def test_totals_that_cannot_be_read_begin_anew(tmp_path: Path, text: str) -> None:
    """A file that is damaged or of another version is none."""
    (tmp_path / "totals.json").write_text(text)
    assert totals.load(tmp_path / "totals.json") == Totals()


def test_the_next_agent_goes_on_counting(config: Config) -> None:
    """Events before the first agent, between two, and beside one are each counted once, and told once."""
    told: list[object] = []

    async def live(*more: int) -> float:
        follower = Follower(config.run, config.run / "agent/totals.json", lambda event: told.append(event["n"]))
        follower.look()
        try:
            for number in more:
                note(config, "restored", {"n": number})
            while len(told) < 2 + len(more) and more:
                await asyncio.sleep(0.01)
            return follower.totals.counters["restores", ("restored", "")]
        finally:
            follower.close()

    (config.run / "agent").mkdir(parents=True)
    note(config, "restored", {"n": 0})
    assert asyncio.run(live()) == 1
    note(config, "restored", {"n": 1})
    assert asyncio.run(live(2, 3)) == 4
    assert asyncio.run(live()) == 4
    assert told == [0, 1, 2, 3]


def test_a_watcher_that_does_not_keep_up_is_let_go(config: Config) -> None:
    """It gets what it has room for, then the end; the agent and other watchers go on."""

    async def live() -> tuple[int, int]:
        follower = Follower(config.run, config.run / "agent/totals.json", lambda _: None)
        try:
            with follower.subscription() as (_, slow), follower.subscription() as (_, quick):
                taken = 0
                for number in range(1500):
                    note(config, "restored", {"n": number})
                    follower.look()
                    taken += (await quick.get()) is not None
                waiting = [slow.get_nowait() for _ in range(slow.qsize())]
                assert waiting[-1] is None
                return len(waiting), taken
        finally:
            follower.close()

    (config.run / "agent").mkdir(parents=True)
    assert asyncio.run(live()) == (1000, 1500)


def test_a_replay_neither_misses_nor_repeats(config: Config) -> None:
    """What is in the journal and was not looked at yet is past, and no news."""

    async def live() -> tuple[list[object], list[object]]:
        follower = Follower(config.run, config.run / "agent/totals.json", lambda _: None)
        try:
            note(config, "restored", {"n": 1})
            follower.look()
            note(config, "restored", {"n": 2})
            with follower.subscription(replay=True) as (past, queue):
                note(config, "restored", {"n": 3})
                follower.look()
                follower.look()
                news = [(queue.get_nowait() or {})["n"] for _ in range(queue.qsize())]
            (config.run / "events/journal").unlink()
            with follower.subscription(replay=True) as (nothing, _):
                assert not nothing
            return [event["n"] for event in past], news
        finally:
            follower.close()

    (config.run / "agent").mkdir(parents=True)
    assert asyncio.run(live()) == ([1, 2], [3])


def test_a_state_directory_that_is_made_anew_is_watched_again(config: Config) -> None:
    """Somebody removed the journal's folder: events after that are seen."""

    async def live() -> None:
        told: list[object] = []
        follower = Follower(config.run, config.run / "agent/totals.json", told.append)
        try:
            (config.run / "events").rename(config.run / "gone")
            await asyncio.sleep(0.05)
            note(config, "restored", {"n": 1})
            async with asyncio.timeout(10):
                while not told:
                    await asyncio.sleep(0.01)
        finally:
            follower.close()

    (config.run / "agent").mkdir(parents=True)
    asyncio.run(live())


def scrape(config: Config, found: Totals) -> dict[tuple[str, ...], float]:
    """Every sample of a scrape: its name and its labels' values, in the order of their names."""
    body, _ = Metrics(config, found).render("")
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_metrics_show_counts_and_images(config: Config) -> None:
    """Counters, cumulative buckets, and each image with the share of it in memory."""
    found = Totals()
    found.add({"event": "restored", **RESTORED})
    image = commit(Store(config.store), "llama:1")
    samples = scrape(config, found)
    assert samples["smr_restores_total", "", "restored"] == 1
    assert samples["smr_restore_bytes_total", "disk"] == 400
    assert samples["smr_restore_seconds_bucket", "0.1"] == 0
    assert samples["smr_restore_seconds_bucket", "0.25"] == samples["smr_restore_seconds_bucket", "+Inf"] == 1
    assert samples["smr_restore_seconds_sum",] == pytest.approx(0.2)
    assert samples["smr_image_bytes", "llama:1"] == image.size_bytes
    assert 0 <= samples["smr_image_cached_ratio", "llama:1"] <= 1
    assert samples["smr_containers", "restored"] == 0


def test_metrics_of_a_broken_store(config: Config) -> None:
    """A store that cannot be read leaves the counters; a broken image is counted as one."""
    image = commit(Store(config.store), "llama:1")
    rewrite_blob(image.blob(image.digest), b"{}")
    samples = scrape(config, Totals(counters={("restores", ("cold", "timeout")): 2}))
    assert (samples["smr_images",], samples["smr_images_broken",]) == (0, 1)
    (config.store / "index.json").write_text("{")
    samples = scrape(config, Totals(counters={("restores", ("cold", "timeout")): 2}))
    assert samples["smr_restores_total", "timeout", "cold"] == 2
    assert ("smr_images",) not in samples


def test_openmetrics_is_spoken(config: Config) -> None:
    """Prometheus asks for it by Accept."""
    body, content_type = Metrics(config, Totals()).render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_the_documented_metrics_are_those_there_are() -> None:
    """docs/agent.md has each, with its labels."""
    rows = re.findall(r"^\| `(smr_\w+)` \| (\w+) \| ([^|]*) \|", (ROOT / "docs/agent.md").read_text(), re.MULTILINE)
    found = {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    suffix = {"counter": "_total"}
    assert found == {f"{name}{suffix.get(one.kind, '')}": (one.kind, one.labels) for name, one in METRICS.items()}


def test_images_are_listed_by_digest(config: Config) -> None:
    """Two names of one image are two tags; a broken image has its error."""
    store = Store(config.store)
    image = commit(store, "llama:1")
    commit(store, "llama:2")
    other = commit(store, "other:1", pages={"pages-1.img": b"x" * 5000})
    rewrite_blob(other.blob(other.digest), b"{}")
    good, broken = list_images(config).images
    assert (sorted(good.tags), good.digest, good.pinned) == (["llama:1", "llama:2"], image.digest, False)
    assert (broken.reference, broken.error.code) == ("other:1", "image_corrupt")


def test_every_code_has_a_status_that_is_no_success() -> None:
    """Codes that come later, too."""
    assert all(grpc_status(code) not in {Grpc.OK, Grpc.UNKNOWN} for code in Code)
    assert grpc_status(Code.IMAGE_NOT_FOUND) is Grpc.NOT_FOUND
    assert grpc_status(Code.CONTAINER_STATE) is Grpc.FAILED_PRECONDITION


@pytest.mark.parametrize(
    ("call", "request_", "said"),
    [
        ("Prefetch", pb.PrefetchRequest(), "no image is named"),
        ("Pin", pb.PinRequest(), "no image is named"),
        ("Unpin", pb.UnpinRequest(image="Not A Name"), "not an image reference"),
        ("Checkpoint", pb.CheckpointRequest(image="a"), "no container is named"),
        ("Checkpoint", pb.CheckpointRequest(container="c"), "no image is named"),
        ("Checkpoint", pb.CheckpointRequest(container="c", image="a", engine="docker"), "needed auto, podman"),
        ("Checkpoint", pb.CheckpointRequest(container="c", image="a", tcp="maybe"), "needed close, established"),
    ],
)
def test_requests_that_make_no_sense(config: Config, call: str, request_: Message, said: str) -> None:
    """INVALID_ARGUMENT, in words, before a process is started for it."""

    async def ask() -> object:
        (config.run / "agent").mkdir(parents=True)
        follower = Follower(config.run, config.run / "agent/totals.json", lambda _: None)
        try:
            with ThreadPoolExecutor(max_workers=1) as executor:
                service = Service(config, follower, health.Health(config), Workers(), executor, "")
                async with ChannelFor([service]) as channel:
                    return await getattr(AgentStub(channel), call)(request_)
        finally:
            follower.close()

    with pytest.raises(GRPCError) as caught:
        asyncio.run(ask())
    assert caught.value.status is Grpc.INVALID_ARGUMENT
    assert said in str(caught.value.message)


def test_an_event_becomes_a_message() -> None:
    """Of a checkpoint the time is the pause."""
    pod = {"namespace": "n", "name": "p"}
    message = event_of({"time": "t", "event": "checkpointed", "pause_s": 0.5, "stages_s": {"dump": 0.1}, "pod": pod})
    assert (message.kind, message.total_s, dict(message.stages_s), message.pod.name) == ("checkpointed", 0.5, {"dump": 0.1}, "p")
    assert not event_of({"event": "x", "busy_s": "y", "stages_s": 1, "pod": 2}).HasField("pod")


def test_a_node_without_criu_is_not_healthy(config: Config, tmp_path: Path) -> None:
    """And says what to do."""
    problem = health.Health(Config(criu=str(tmp_path / "criu"), run=config.run, store=config.store)).problem()
    assert "CRIU not found" in problem
    assert "install.sh" in problem


def test_a_store_that_cannot_be_used(tmp_path: Path) -> None:
    """A file in its place; one that is not made yet is judged by what is above it."""
    (tmp_path / "file").write_text("")
    assert "no directory" in health.store_problem(tmp_path / "file")
    assert health.store_problem(tmp_path / "not/yet") == ""


@pytest.fixture
def pages() -> dict[str, web.Page]:
    """One page."""

    async def hello(accept: str) -> web.Answer:
        return web.Answer(body=f"hello {accept}".encode())

    return {"/hello": hello}


def ask(pages: dict[str, web.Page], path: Path, request: bytes) -> bytes:
    """What the server answers."""

    async def talk() -> bytes:
        server = await web.serve(f"unix:{path}", pages)
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(request)
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()
        return answer

    return asyncio.run(talk())


@pytest.mark.parametrize(
    ("request_", "status", "body"),
    [
        (b"GET /hello?x=1 HTTP/1.1\r\nHost: a\r\nAccept: text/plain\r\n\r\n", b"200 OK", b"hello text/plain"),
        (b"HEAD /hello HTTP/1.1\r\n\r\n", b"200 OK", b""),
        (b"GET / HTTP/1.0\r\n\r\n", b"404 Not Found", b"/hello\n"),
        (b"POST /hello HTTP/1.1\r\n\r\n", b"405 Method Not Allowed", b"GET only\n"),
        (b"\r\n\r\n", b"405 Method Not Allowed", b"GET only\n"),
    ],
)
def test_web_answers(pages: dict[str, web.Page], tmp_path: Path, request_: bytes, status: bytes, body: bytes) -> None:
    """Pages by path; what is not there, or no GET, is said to be."""
    answer = ask(pages, tmp_path / "socket", request_)
    assert answer.split(b"\r\n")[0] == b"HTTP/1.1 " + status
    assert answer.partition(b"\r\n\r\n")[2] == body


@pytest.mark.parametrize(
    "request_", [b"", b"GET /hello", b"GET /" + b"x" * 20000 + b" HTTP/1.1\r\n\r\n"], ids=["none", "half", "long"]
)
def test_web_drops_what_is_no_request(pages: dict[str, web.Page], tmp_path: Path, request_: bytes) -> None:
    """Nothing is answered, and nothing is kept."""
    assert ask(pages, tmp_path / "socket", request_) == b""


@pytest.mark.parametrize(
    ("text", "found"),
    [("127.0.0.1:9464", ("127.0.0.1", 9464)), (":80", (None, 80)), ("[::1]:1", ("::1", 1)), ("host:0", ("host", 0))],
)
def test_addresses(text: str, found: tuple[str | None, int]) -> None:
    """HOST:PORT, :PORT, and IPv6 in brackets."""
    assert web.parse_address(text) == found


@pytest.mark.parametrize("text", ["9464", "host", "host:x", "host:99999", "::1:80", "-"])
def test_wrong_addresses(text: str) -> None:
    """Are configuration errors."""
    with pytest.raises(SmrError) as caught:
        web.parse_address(text)
    assert caught.value.code is Code.CONFIG_INVALID


def test_options(config: Config, tmp_path: Path) -> None:
    """Flags before settings before the defaults; the socket lies in the state directory."""
    assert options_of([], config).socket == config.run / "agent.sock"
    found = options_of(["--socket=/x.sock", "--listen=", "--events=off"], config)
    assert (found.socket, found.listen, found.events) == (Path("/x.sock"), "", False)
    with pytest.raises(SmrError) as caught:
        options_of(["--events=on"], config)
    assert caught.value.code is Code.CONFIG_INVALID


NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
FAILED = {
    "time": NOW.isoformat(timespec="milliseconds"),
    "event": "started_cold",
    "container": "c1",
    "image": "llama:1",
    "code": "cpu_mismatch",
    "reason": "this CPU lacks avx512f",
    "pod": {"namespace": "shop", "name": "llama-0", "uid": "0f1e", "container": "server"},
}


def test_an_event_for_a_pod() -> None:
    """What it says, of which pod and container, in the API's form; the same event has the same name."""
    document = kubernetes.document_of(FAILED, "node-1", lambda: NOW)
    assert document is not None
    assert (
        document["note"]
        == "Container server was not restored from llama:1 and starts cold: this CPU lacks avx512f [cpu_mismatch]"
    )
    assert (document["reason"], document["type"], document["eventTime"]) == (
        "SmrStartedCold",
        "Warning",
        "2026-03-01T12:00:00.000000Z",
    )
    regarding = {"apiVersion": "v1", "kind": "Pod", "namespace": "shop", "name": "llama-0", "uid": "0f1e"}
    assert document["regarding"] == {**regarding, "fieldPath": "spec.containers{server}"}
    assert kubernetes.document_of(FAILED, "node-1", lambda: NOW) == document
    other = kubernetes.document_of({**FAILED, "container": "c2"}, "node-1", lambda: NOW)
    assert other is not None
    assert other["metadata"] != document["metadata"]


@pytest.mark.parametrize(
    ("change", "later"),
    [
        ({"event": "restored"}, timedelta()),
        ({"pod": None}, timedelta()),
        ({"pod": {"name": "p"}}, timedelta()),
        ({"time": "yesterday"}, timedelta()),
        ({"time": "2026-03-01T12:00:00"}, timedelta()),
        ({}, timedelta(minutes=11)),
    ],
    ids=["success", "no pod", "half a pod", "no time", "no zone", "history"],
)
def test_what_is_not_posted(change: dict[str, object], later: timedelta) -> None:
    """Successes, containers that are no pod's, and what is long past."""
    assert kubernetes.document_of({**FAILED, **change}, "n", lambda: NOW + later) is None


def test_long_names_and_notes_fit() -> None:
    """The API's limits: 253 bytes for a name, 1024 for a note, 128 for the node."""
    pod = {"namespace": "n", "name": "p" * 253, "container": "c"}
    document = kubernetes.document_of({**FAILED, "pod": pod, "reason": "ä" * 3000}, "n" * 300, lambda: NOW)
    assert document is not None
    metadata = document["metadata"]
    assert isinstance(metadata, dict)
    assert len(metadata["name"]) <= 253
    assert 1000 < len(str(document["note"]).encode()) <= 1024
    assert len(str(document["reportingInstance"])) <= 128


@pytest.fixture
def secrets(tmp_path: Path) -> Iterator[Path]:
    """A service account's files."""
    (tmp_path / "token").write_text("t")
    yield tmp_path


def test_the_cluster_is_found_by_the_environment(secrets: Path, tmp_path: Path) -> None:
    """Host, port and token; without one of them there is none."""
    environ = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "6443"}
    found = kubernetes.find(environ, secrets)
    assert found is not None
    assert found.url == "https://10.0.0.1:6443"
    six = kubernetes.find({"KUBERNETES_SERVICE_HOST": "fd00::1"}, secrets)
    assert six is not None
    assert six.url == "https://[fd00::1]:443"
    assert kubernetes.find({}, secrets) is None
    in_the_node = kubernetes.find({**environ, "SMR_SERVICEACCOUNT": str(secrets)})
    assert in_the_node == found
    assert kubernetes.find(environ, tmp_path / "none") is None


def test_json_of_a_document() -> None:
    """It can be sent."""
    assert json.dumps(kubernetes.document_of(FAILED, "n", lambda: NOW))
