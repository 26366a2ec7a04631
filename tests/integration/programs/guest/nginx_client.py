"""nginx: files by PUT, a slow download in its middle, the counters that workers keep in common memory."""

import hashlib
import os
import re

import http_client
from client import CLIENTS, ROUNDS, same, together

SIZE = 1 << 20


class Session(http_client.Session):
    def accepted(self):
        return int(re.search(rb"\n (\d+) \d+ \d+", self.talk("GET", "/status"))[1])

    def work(self, number):
        connection = self.connect()
        body = os.urandom(64 << 10)
        for round_ in range(ROUNDS):
            name = f"/client-{number}-{round_}"
            self.ask(connection, "PUT", name, body)
            same("a file", self.ask(connection, "GET", name), body)
            self.ask(connection, "DELETE", name)
        connection.close()

    def prepare(self):
        body = os.urandom(SIZE)
        self.talk("PUT", "/before", body)
        together(self.work)
        return {"before": hashlib.sha256(body).hexdigest(), "accepted": self.accepted()}

    def open_live(self):
        self.idle = [self.connect() for _ in range(3)]
        for connection in self.idle:
            self.ask(connection, "GET", "/status")
        connection = self.connect()
        connection.request("GET", "/slow/before")
        self.stream = connection.getresponse()
        same("length", len(self.stream.read(32 << 10)), 32 << 10)

    def go_on(self):
        for connection in self.idle:
            self.ask(connection, "GET", "/status")
        return {"bytes": len(self.stream.read(64 << 10))}

    def check(self, state):
        accepted = self.accepted()
        if accepted <= state["accepted"]:
            raise AssertionError(f"connections that nginx has counted: {accepted}, before the checkpoint {state['accepted']}")
        same("a file", hashlib.sha256(self.talk("GET", "/before")).hexdigest(), state["before"])
        together(self.work)
        return {"requests": CLIENTS * ROUNDS * 3 + 2}
