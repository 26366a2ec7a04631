"""A small Kubernetes API server, as far as events go: https, bearer tokens, rights, and the API's own rules for an Event.

The rules are those that the real one has for a creation through events.k8s.io/v1 (pkg/apis/core/validation/events.go).
"""

from __future__ import annotations

import json
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.integration.command import run

_DNS = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUALIFIED = re.compile(
    r"([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
)
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


class ApiServer:
    """`events` by namespace/name; `pods`: uid by namespace/name. `failures` are statuses of the next requests."""

    def __init__(self, secrets: Path) -> None:
        self.secrets = secrets
        self.events: dict[str, dict[str, object]] = {}
        self.pods: dict[str, str] = {}
        self.failures: list[int] = []
        self.requests: list[tuple[str, str, int]] = []
        self.token, self.may_create = "secret-token", True
        self.answering = threading.Event()
        self.answering.set()
        self.port = 0

    def judge(self, method: str, path: str, authorization: str, body: bytes) -> tuple[int, dict[str, object]]:
        """Status and document of an answer."""
        if authorization != f"Bearer {self.token}":
            return _status(401, "Unauthorized")
        if self.failures:
            return _status(self.failures.pop(0), "InternalError")
        if found := re.fullmatch(r"/api/v1/namespaces/([^/]+)/pods/([^/]+)", path):
            uid = self.pods.get("/".join(found.groups()))
            return (200, {"kind": "Pod", "metadata": {"uid": uid}}) if uid and method == "GET" else _status(404, "NotFound")
        found = re.fullmatch(r"/apis/events\.k8s\.io/v1/namespaces/([^/]+)/events", path)
        if not found or method != "POST":
            return _status(404, "NotFound")
        if not self.may_create:
            return _status(403, "Forbidden")
        event = json.loads(body)
        problems = list(_invalid(event, found[1]))
        if problems:
            return _status(422, "; ".join(problems))
        name = f"{found[1]}/{event['metadata']['name']}"
        if name in self.events:
            return _status(409, "AlreadyExists")
        self.events[name] = event
        return 201, event

    @contextmanager
    def serving(self) -> Iterator[ApiServer]:
        """Serve with a certificate of its own, whose authority is among the secrets."""
        make_certificate(self.secrets)
        (self.secrets / "token").write_text(f"{self.token}\n")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.secrets / "ca.crt", self.secrets / "key.pem")
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                owner.answering.wait()
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, document = owner.judge(self.command, self.path, self.headers.get("Authorization", ""), body)
                owner.requests.append((self.command, self.path, status))
                data = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = _answer  # noqa: N815  # http.server's names

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.daemon_threads = True
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield self
        finally:
            self.answering.set()
            server.shutdown()
            thread.join()
            server.server_close()


def make_certificate(folder: Path) -> None:
    """ca.crt and key.pem of a certificate for 127.0.0.1 that signs itself."""
    folder.mkdir(parents=True, exist_ok=True)
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    run(
        [
            *argv,
            "-subj",
            "/CN=api",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            folder / "key.pem",
            "-out",
            folder / "ca.crt",
        ]
    )


def _status(code: int, message: str) -> tuple[int, dict[str, object]]:
    return code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}


def _invalid(event: dict[str, object], namespace: str) -> Iterator[str]:
    metadata, regarding = event.get("metadata"), event.get("regarding")
    if (event.get("apiVersion"), event.get("kind")) != ("events.k8s.io/v1", "Event"):
        yield "apiVersion, kind"
    if not isinstance(metadata, dict) or metadata.get("namespace") != namespace:
        yield "metadata.namespace"
    elif not _DNS.fullmatch(str(metadata.get("name"))) or len(str(metadata["name"])) > 253:
        yield "metadata.name"
    if not isinstance(regarding, dict) or regarding.get("namespace") != namespace:
        yield "regarding.namespace"
    if not _TIME.fullmatch(str(event.get("eventTime"))):
        yield "eventTime"
    else:
        datetime.fromisoformat(str(event["eventTime"]))
    if not _QUALIFIED.fullmatch(str(event.get("reportingController"))):
        yield "reportingController"
    for name, most in (("reportingInstance", 128), ("action", 128), ("reason", 128), ("note", 1024)):
        if not event.get(name) or len(str(event[name]).encode()) > most:
            yield name
    if event.get("type") not in {"Normal", "Warning"}:
        yield "type"
    known = {
        "apiVersion",
        "kind",
        "metadata",
        "eventTime",
        "reportingController",
        "reportingInstance",
        "action",
        "reason",
        "regarding",
        "note",
        "type",
    }
    yield from (f"unknown field {name}" for name in event.keys() - known)
