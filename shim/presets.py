"""Quiesce and resume of known inference servers: what each has to be asked, in which order, and what must be true before.

    vllm     puts the engine to sleep (POST /sleep) and wakes it (POST /wake_up)
    sglang   stops generation, releases the KV cache, takes both back

Written after vLLM 0.33.0 (entrypoints/serve/dev/sleep, entrypoints/serve/dev/rpc, v1/engine/core.py) and SGLang 0.5.10.post1
(srt/entrypoints/http_server.py, srt/managers/scheduler_update_weights_mixin.py, srt/managers/tokenizer_manager.py).

Neither has a call that tears NCCL communicators down. vLLM's --enable-nccl-comm-suspend releases their memory while asleep.

Invariant: a quiesce that fails before its decisive request takes back what it has done. After that request it raises with the
client's `decided` set, and only the resume can take it back: SGLang's scheduler dies when memory is resumed that was not
released, or released while a request is in it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

from smr.proto.errors import Code, SmrError
from smr.shim.inside import Answer

_POLL_S = 0.1
# `mode` of /sleep came with vLLM 0.17; before, /sleep with requests in flight was the caller's mistake.
_VLLM_MODES = (0, 17)
_IN_FLIGHT = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? ([0-9.e+]+)$", re.MULTILINE)
_SGLANG_TAGS = ("kv_cache", "weights", "cuda_graph")


class Client(Protocol):
    """A server in the container, until the hook's time is up. `decided`: a request was sent that a resume has to take back."""

    decided: bool

    def ask(self, method: str, path: str, document: object = None) -> Answer:
        """One request; raises HOOK_FAILED when there is no answer, whatever an answer's status."""

    def take_back(self, method: str, path: str, document: object = None) -> None:
        """One request that undoes another, with a few seconds of its own; its failure is not told: another one is."""

    def url(self, path: str) -> str:
        """The address as a message shows it."""

    def expired(self) -> bool:
        """Whether the hook's time is up."""


Options = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One server: its port, its options with the values each may have (the first is the default), and what it does."""

    name: str
    port: int
    options: Mapping[str, tuple[str, ...]]
    quiesce: Callable[[Client, Options], None]
    resume: Callable[[Client, Options], None]
    # Options of which several may be given, joined by "+".
    several: frozenset[str] = field(default_factory=frozenset)


def quote(answer: Answer) -> str:
    """The status and the first 300 bytes of the body, on one line."""
    text = " ".join(answer.body[:300].decode("utf-8", "replace").split())
    return f"{answer.status}: {text}" if text else str(answer.status)


def _fail(what: str, hint: str = "") -> NoReturn:
    raise SmrError(what, hint=hint, code=Code.HOOK_FAILED)


def _ok(client: Client, method: str, path: str, document: object = None, *, missing: str = "", hint: str = "") -> Answer:
    """A request that has to succeed. `missing`: what a 404 means, and `hint` what helps then."""
    answer = client.ask(method, path, document)
    if answer.status < 300:
        return answer
    url = client.url(path)
    if answer.status == 404 and missing:
        _fail(f"{method} {url} answered 404: {missing}", hint)
    if answer.status in (401, 403):
        _fail(
            f"{method} {url} answered {quote(answer)}",
            "the server wants a key: call it with exec:COMMAND, which has the container's environment, instead of a preset",
        )
    _fail(f"{method} {url} answered {quote(answer)}", "the server's own log says why")


def _document(answer: Answer) -> Mapping[str, object]:
    try:
        found = json.loads(answer.body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _until(client: Client, true: Callable[[], bool], what: str, hint: str) -> None:
    """Ask again and again, until the hook's time is up."""
    asked = False
    while True:
        try:
            if true():
                return
        except SmrError:
            # Time may run out in the middle of a question; that the server is silent is true of the first one alone.
            if asked and client.expired():
                _fail(what, hint)
            raise
        if client.expired():
            _fail(what, hint)
        asked = True
        time.sleep(_POLL_S)


# vLLM. The engine holds requests that arrive while it sleeps, and goes on with them when all of it is awake.

_VLLM_MISSING = "this vLLM has no such endpoint, because it was started without development endpoints or sleep mode"
_VLLM_HINT = "start the server with VLLM_SERVER_DEV_MODE=1 in its environment and --enable-sleep-mode"


def _vllm_asleep(client: Client) -> bool:
    answer = _ok(client, "GET", "/is_sleeping", missing=_VLLM_MISSING, hint=_VLLM_HINT)
    return _document(answer).get("is_sleeping") is True


def _vllm_quiesce(client: Client, options: Options) -> None:
    if _vllm_asleep(client):
        return
    version = _vllm_version(client)
    modes = version >= _VLLM_MODES
    if options["drain"] == "abort" and not modes:
        _fail(f"vLLM {version[0]}.{version[1]} cannot abort requests when it is put to sleep", "use vllm:drain=wait")
    if options["drain"] == "wait" or not modes:
        _vllm_drain(client)
    mode = "&mode=abort" if options["drain"] == "abort" else "&mode=keep"
    client.decided = True
    path = f"/sleep?level={options['level']}{mode if modes else ''}"
    _ok(client, "POST", path, missing=_VLLM_MISSING, hint=_VLLM_HINT)
    # Where the engine is a process of its own, older servers answer before it has done what they were asked.
    _until(client, lambda: _vllm_asleep(client), "vLLM did not fall asleep in time", "give it longer: smr.hook.timeout=120")


def _vllm_version(client: Client) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", str(_document(_ok(client, "GET", "/version")).get("version", "")))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _vllm_drain(client: Client) -> None:
    """Wait until no request runs or waits. Nothing is stopped for it, so there is nothing to take back when it takes too long."""

    def idle() -> bool:
        text = _ok(client, "GET", "/metrics").body.decode("utf-8", "replace")
        counts = [float(count) for count in _IN_FLIGHT.findall(text)]
        if not counts:
            _fail(
                f"GET {client.url('/metrics')} does not say how many requests are in flight",
                "start vLLM without --disable-log-stats, or use vllm:drain=keep (vLLM 0.17 or newer)",
            )
        return not any(counts)

    hint = "use vllm:drain=keep or drain=abort (vLLM 0.17 or newer), give it longer with smr.hook.timeout, or stop the traffic"
    _until(client, idle, "vLLM still had requests in flight when the time was up", hint)


def _vllm_resume(client: Client, options: Options) -> None:
    if not _vllm_asleep(client):
        return
    if options["level"] == "2":  # the weights are gone: memory for them, then they are loaded again, then the KV cache
        _ok(client, "POST", "/wake_up?tags=weights", missing=_VLLM_MISSING, hint=_VLLM_HINT)
        _ok(client, "POST", "/collective_rpc", {"method": "reload_weights"}, missing=_VLLM_MISSING, hint=_VLLM_HINT)
        _ok(client, "POST", "/wake_up?tags=kv_cache", missing=_VLLM_MISSING, hint=_VLLM_HINT)
    else:
        _ok(client, "POST", "/wake_up", missing=_VLLM_MISSING, hint=_VLLM_HINT)
    _until(client, lambda: not _vllm_asleep(client), "vLLM did not wake up in time", "give it longer: smr.hook.timeout=120")


# SGLang. /release_memory_occupation asserts that the scheduler is idle, and the assertion ends the server: so generation is
# stopped first, in the mode in which new requests wait outside of the scheduler, and idleness is asked for (/flush_cache).


def _sglang_info(client: Client) -> Mapping[str, object]:
    answer = client.ask("GET", "/server_info")
    if answer.status == 404:
        answer = _ok(client, "GET", "/get_server_info", missing="this is no SGLang server", hint="see sglang:port=PORT")
    elif answer.status >= 300:
        _ok(client, "GET", "/server_info")
    return _document(answer)


def _sglang_idle(client: Client) -> bool:
    answer = client.ask("POST", "/flush_cache")
    if answer.status not in (200, 400):  # 400: requests are running or waiting
        _fail(f"POST {client.url('/flush_cache')} answered {quote(answer)}", "the server's own log says why")
    return answer.status == 200


def _sglang_quiesce(client: Client, options: Options) -> None:
    _sglang_check(_sglang_info(client))
    if options["drain"] == "wait":
        hint = "use sglang:drain=abort, give it longer with smr.hook.timeout, or stop the traffic"
        _until(client, lambda: _sglang_idle(client), "SGLang still had requests in flight when the time was up", hint)
    try:
        _ok(client, "POST", "/pause_generation", {"mode": "abort"}, missing="this SGLang is too old to pause", hint="update it")
        _until(client, lambda: _sglang_idle(client), "SGLang's scheduler did not become idle in time", "try again")
    except SmrError:
        client.take_back("POST", "/continue_generation", {})
        raise
    client.decided = True
    _ok(client, "POST", "/release_memory_occupation", {"tags": options["tags"].split("+")})


def _sglang_check(info: Mapping[str, object]) -> None:
    if info.get("enable_memory_saver") is False:
        _fail("SGLang was started without its memory saver and can release nothing", "start it with --enable-memory-saver")
    workers = info.get("tokenizer_worker_num", 1)
    if isinstance(workers, int) and workers > 1:
        _fail(
            f"SGLang has {workers} tokenizer workers, and pausing reaches one of them: the others would go on sending requests",
            "start it with --tokenizer-worker-num 1",
        )


def _sglang_resume(client: Client, options: Options) -> None:
    tags = options["tags"].split("+")
    info = _sglang_info(client) if "weights" in tags else {}
    _ok(client, "POST", "/resume_memory_occupation", {"tags": tags})
    if "weights" in tags and info.get("enable_weights_cpu_backup") is not True:
        _ok(client, "POST", "/update_weights_from_disk", {"model_path": info.get("model_path", "")})
    _ok(client, "POST", "/continue_generation", {})


PRESETS: Mapping[str, Preset] = {
    "vllm": Preset(
        name="vllm",
        port=8000,
        options={"level": ("1", "2"), "drain": ("keep", "wait", "abort")},
        quiesce=_vllm_quiesce,
        resume=_vllm_resume,
    ),
    "sglang": Preset(
        name="sglang",
        port=30000,
        options={"tags": _SGLANG_TAGS, "drain": ("wait", "abort")},
        quiesce=_sglang_quiesce,
        resume=_sglang_resume,
        several=frozenset({"tags"}),
    ),
}
