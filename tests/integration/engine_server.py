"""A small server that behaves as the control endpoints of vLLM and SGLang do, with requests in flight that can be lost.

    python3 engine_server.py vllm|sglang --port N [--unix PATH] [--bind ADDRESS] [options]

POST /generate?tokens=N makes tokens, one every 10 ms while the engine runs, and answers {"tokens": n, "end": "length"|"abort"|
"error", "weights": "good"|"garbage"}. What the real ones do to a caller that breaks their rules, this one does too:

    vllm     without --dev there are no control endpoints (404). Putting an engine older than 0.17 to sleep with requests in
             flight kills it (500 from then on). After level 2 the weights are garbage until they are reloaded. Waking what does
             not sleep does nothing. Requests that arrive while it sleeps wait. `is_sleeping` is true until all of it is awake.
    sglang   releasing memory with a request in the scheduler, or resuming what was not released, ends the process, as the
             assertions in its scheduler do. Pausing aborts what runs and makes new requests wait outside. Weights that were
             released without a backup are garbage until they are loaded again. /flush_cache is 400 while anything is in flight.

--fail PATH, --hang PATH and --drip PATH: that path answers 500, never, or a byte now and then for ever. Every control request
is a line "METHOD PATH BODY" of --log. Standard library only, so that it runs in any container with Python.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

_TOKEN_S = 0.01


class Engine:
    """What both have: requests in flight, weights, and a lock that also wakes whoever waits."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.changed = threading.Condition()
        self.in_flight: dict[int, str] = {}
        self.weights = "good"
        self.serial = 0

    def running(self) -> bool:
        raise NotImplementedError

    def admits(self) -> bool:
        """Whether a new request enters the engine; else it waits outside of it."""
        return True

    def generate(self, tokens: int) -> dict[str, object]:
        with self.changed:
            self.changed.wait_for(self.admits)
            self.serial += 1
            number = self.serial
            self.in_flight[number] = "runs"
            done = 0
            while self.in_flight[number] == "runs" and done < tokens:
                self.changed.wait_for(lambda: self.running() or self.in_flight[number] != "runs")
                self.changed.wait(_TOKEN_S)
                done += self.running()
            end = self.in_flight.pop(number)
            self.changed.notify_all()
            return {"tokens": done, "end": "length" if end == "runs" else end, "weights": self.weights}

    def abort_all(self, end: str = "abort") -> None:
        for number in self.in_flight:
            self.in_flight[number] = end
        self.changed.notify_all()

    def control(self, method: str, path: str, query: dict[str, list[str]], body: dict[str, object]) -> tuple[int, object]:
        raise NotImplementedError


class Vllm(Engine):
    """/sleep, /wake_up, /is_sleeping, /collective_rpc, /version, /metrics."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.sleeping: set[str] = set()
        self.paused = self.dead = False
        self.modes = tuple(int(word) for word in options.version.split(".")[:2]) >= (0, 17)

    def running(self) -> bool:
        return not self.paused and not self.dead

    def control(self, method: str, path: str, query: dict[str, list[str]], body: dict[str, object]) -> tuple[int, object]:
        if path == "/version":
            return 200, {"version": self.options.version}
        if path == "/metrics":
            gauges = "".join(
                f'vllm:num_requests_{kind}{{engine="0",model_name="m"}} {count:.1f}\n'
                for kind, count in (("running", len(self.in_flight)), ("waiting", 0))
            )
            return 200, "" if self.options.no_stats else f"# TYPE vllm:num_requests_running gauge\n{gauges}"
        known = {"/sleep": "POST", "/wake_up": "POST", "/is_sleeping": "GET", "/collective_rpc": "POST"}
        if not self.options.dev or path not in known:
            return 404, {"detail": "Not Found"}
        if method != known[path]:
            return 405, {"detail": "Method Not Allowed"}
        if self.dead:
            return 500, {"error": {"message": "EngineCore encountered an issue.", "type": "EngineDeadError"}}
        if path == "/is_sleeping":
            return 200, {"is_sleeping": self.paused or bool(self.sleeping)}
        if path == "/collective_rpc":
            if body.get("method") != "reload_weights":
                return 500, {"error": {"message": f"no method {body.get('method')}"}}
            if "weights" not in self.sleeping:
                self.weights = "good"
            return 200, {"results": [None]}
        return self._sleep(query) if path == "/sleep" else self._wake_up(query.get("tags", []))

    def _sleep(self, query: dict[str, list[str]]) -> tuple[int, object]:
        level, mode = int(query.get("level", ["1"])[0]), query.get("mode", ["abort"])[0]
        if not self.modes and self.in_flight:
            self.dead = True
            self.abort_all("error")
            return 500, {"error": {"message": "EngineCore encountered an issue.", "type": "EngineDeadError"}}
        if self.modes and mode == "abort":
            self.abort_all()
        self.paused = True
        self.sleeping = {"weights", "kv_cache"}
        if level == 2:
            self.weights = "garbage"
        return 200, {"status": "sleeping", "level": level}

    def _wake_up(self, tags: list[str]) -> tuple[int, object]:
        if all(tag in self.sleeping for tag in tags):
            self.sleeping -= set(tags) or set(self.sleeping)
        if not self.sleeping:
            self.paused = False
        self.changed.notify_all()
        return 200, {"status": "sleeping" if self.sleeping else "awake", "tags": tags or None}


class Sglang(Engine):
    """/server_info, /flush_cache, /pause_generation, /continue_generation, release and resume of memory, weights from disk."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.released: set[str] = set()
        self.paused = False

    def running(self) -> bool:
        return not self.released

    def admits(self) -> bool:
        return not self.paused

    def control(self, method: str, path: str, query: dict[str, list[str]], body: dict[str, object]) -> tuple[int, object]:
        if path == ("/get_server_info" if self.options.old_names else "/server_info") and method == "GET":
            return 200, {
                "version": "0.5.10",
                "model_path": "/models/m",
                "enable_memory_saver": self.options.memory_saver,
                "enable_weights_cpu_backup": self.options.backup,
                "tokenizer_worker_num": self.options.tokenizers,
            }
        if path == "/flush_cache":
            return (400, "Flush cache failed.\n") if self.in_flight else (200, "Cache flushed.\n")
        if method != "POST":
            return 404, {"detail": "Not Found"}
        if path == "/pause_generation":
            self.paused = True
            self.abort_all()
            return 200, {"message": "Generation paused successfully.", "status": "ok"}
        if path == "/continue_generation":
            self.paused = False
            self.changed.notify_all()
            return 200, {"message": "Generation continued successfully.", "status": "ok"}
        if path == "/update_weights_from_disk":
            good = body.get("model_path") == "/models/m" and "weights" not in self.released
            self.weights = "good" if good else "garbage"
            return (200 if good else 400), {"success": good, "message": "Succeeded." if good else "no such model"}
        tags = {str(tag) for tag in body.get("tags") or ("kv_cache", "weights", "cuda_graph")}  # type: ignore[attr-defined]
        if path == "/release_memory_occupation":
            if self.in_flight:
                os._exit(9)  # AssertionError in the scheduler ends the server
            self.released |= tags
            if "weights" in tags and not self.options.backup:
                self.weights = "garbage"
            return 200, None
        if path == "/resume_memory_occupation":
            if not tags <= self.released:
                os._exit(9)  # KeyError in the scheduler ends the server
            self.released -= tags
            self.changed.notify_all()
            return 200, None
        return 404, {"detail": "Not Found"}


class Handler(BaseHTTPRequestHandler):
    """One request: misbehaviour that was asked for, generation, or control."""

    protocol_version = "HTTP/1.1"
    engine: Engine

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def _handle(self) -> None:
        url = urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        options = self.engine.options
        if url.path == "/generate":
            self._answer(200, self.engine.generate(int(parse_qs(url.query)["tokens"][0])))
            return
        with self.engine.changed, open(options.log, "a") as log:
            log.write(f"{self.command} {self.path} {raw.decode()}".rstrip() + "\n")
        if url.path == options.hang:
            time.sleep(3600)
        if url.path == options.drip:
            self._drip()
        if url.path == options.fail:
            self._answer(500, {"error": {"message": "CUDA error: out of memory"}})
        elif url.path == options.redirect:
            self._answer(307, "", location="/elsewhere")
        elif url.path == options.key and not self.headers.get("Authorization"):
            self._answer(401, {"error": "Unauthorized"})
        else:
            body = json.loads(raw) if raw and self.headers.get("Content-Type") == "application/json" else {}
            with self.engine.changed:
                answer = self.engine.control(self.command, url.path, parse_qs(url.query), body)
            self._answer(*answer)

    def _drip(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        while True:
            self.wfile.write(b".")
            self.wfile.flush()
            time.sleep(0.05)

    def _answer(self, status: int, content: object, location: str = "") -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if location:
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """TCP over IPv4 or IPv6, or a unix socket."""

    daemon_threads = True

    def __init__(self, options: argparse.Namespace) -> None:
        self.address_family = socket.AF_UNIX if options.unix else socket.AF_INET6 if ":" in options.bind else socket.AF_INET
        super().__init__(options.unix or (options.bind, options.port), Handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)


def _loopback_up() -> None:
    """SIOCSIFFLAGS: `lo` is down in a new network namespace."""
    with socket.socket() as control:
        fcntl.ioctl(control, 0x8914, struct.pack("16sh14x", b"lo", 0x1))


def main() -> None:
    """Serve for ever."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=("vllm", "sglang"))
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--bind", default="127.0.0.1")
    parser.add_argument("--unix", default="")
    parser.add_argument("--lo", action="store_true", help="set lo up first")
    parser.add_argument("--log", default=os.devnull)
    parser.add_argument("--version", default="0.33.0")
    parser.add_argument("--no-dev", dest="dev", action="store_false")
    parser.add_argument("--no-stats", action="store_true")
    parser.add_argument("--no-memory-saver", dest="memory_saver", action="store_false")
    parser.add_argument("--backup", action="store_true")
    parser.add_argument("--old-names", action="store_true")
    parser.add_argument("--tokenizers", type=int, default=1)
    for name in ("--fail", "--hang", "--drip", "--redirect", "--key"):
        parser.add_argument(name, default="")
    options = parser.parse_args()
    if options.lo:
        _loopback_up()
    Handler.engine = (Vllm if options.engine == "vllm" else Sglang)(options)
    with Server(options) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
