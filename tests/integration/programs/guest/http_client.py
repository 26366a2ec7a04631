"""HTTP/1.1 sessions: keep-alive connections, a stream in the middle of its lines, bodies of 256 KiB; and a variant for nginx."""

import hashlib
import http.client
import json
import os

from client import CLIENTS, ROUNDS, same, together


class Session:
    def __init__(self, host, port):
        self.host, self.port = host, port
        self.idle, self.stream = [], None

    def connect(self):
        return http.client.HTTPConnection(self.host, self.port, timeout=15)

    def ask(self, connection, method, path, body=None):
        connection.request(method, path, body=body)
        answer = connection.getresponse()
        data = answer.read()
        if answer.status not in (200, 201, 204):
            raise AssertionError(f"{method} {path}: status {answer.status}: {data[:200]!r}")
        return data

    def talk(self, method, path, body=None):
        connection = self.connect()
        try:
            return self.ask(connection, method, path, body)
        finally:
            connection.close()

    def state(self):
        found = json.loads(self.talk("GET", "/state"))
        return {key: found[key] for key in ("boot", "count", "kept")}

    def work(self, _number):
        connection = self.connect()
        for _ in range(ROUNDS):
            self.ask(connection, "POST", "/count")
        body = os.urandom(256 << 10)
        same("digest of a body", self.ask(connection, "POST", "/digest", body).decode(), hashlib.sha256(body).hexdigest())
        connection.close()

    def prepare(self):
        self.talk("POST", "/put?before", b"the checkpoint")
        together(self.work)
        state = self.state()
        same("count", state["count"], CLIENTS * ROUNDS)
        return state

    def open_stream(self):
        connection = self.connect()
        connection.request("GET", "/stream?100000")
        self.stream = connection.getresponse()
        self.lines(3)

    def lines(self, count):
        found = [int(self.stream.readline()) for _ in range(count)]
        same("lines of a stream", found, list(range(found[0], found[0] + count)))
        return found[-1]

    def open_live(self):
        self.idle = [self.connect() for _ in range(3)]
        for connection in self.idle:
            self.ask(connection, "GET", "/state")
        self.open_stream()

    def go_on(self):
        for connection in self.idle:
            self.ask(connection, "GET", "/state")
        return {"line": self.lines(5)}

    def check(self, state):
        same("state", self.state(), state)
        self.talk("POST", "/put?after", b"the restore")
        together(self.work)
        kept = {**state["kept"], "before": "the checkpoint", "after": "the restore"}
        same("state", self.state(), {**state, "count": state["count"] + CLIENTS * ROUNDS, "kept": kept})
        connection = self.connect()
        connection.request("GET", "/stream?25")
        lines = connection.getresponse().read().split()
        same("a stream", [int(line) for line in lines], list(range(25)))
        connection.close()
        return {"requests": CLIENTS * (ROUNDS + 1) + 4}
