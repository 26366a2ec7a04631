"""gRPC sessions: a channel in the middle of a stream, one in a dialogue, unary calls of many clients, an upload in parts."""

import hashlib
import json
import queue

import grpc
from client import CLIENTS, ROUNDS, same, together


class Session:
    def __init__(self, host, port):
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.said = queue.Queue()
        self.channel = self.lines = self.answers = None

    def connect(self):
        # Otherwise channels of one process to one address share a connection.
        return grpc.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)])

    @staticmethod
    def call(channel, name, kind="unary_unary"):
        function = getattr(channel, kind)(
            f"/smr.Programs/{name}",
            request_serializer=lambda request: json.dumps(request).encode(),
            response_deserializer=json.loads,
        )
        return lambda request, timeout=15: function(request, timeout=timeout)

    def unary(self, name, **request):
        with self.connect() as channel:
            return self.call(channel, name)(request)

    def work(self, number):
        with self.connect() as channel:
            for _ in range(ROUNDS):
                self.call(channel, "Count")({})
            parts = [f"{number}-{part}" * 2000 for part in range(10)]
            answer = self.call(channel, "Collect", "stream_unary")(iter({"part": part} for part in parts))
            same("digest", answer["digest"], hashlib.sha256("".join(parts).encode()).hexdigest())

    def prepare(self):
        self.unary("Put", before="the checkpoint")
        together(self.work)
        return self.unary("State")

    def open_live(self):
        self.channel = self.connect()
        self.lines = self.call(self.channel, "Stream", "unary_stream")({"lines": 100000}, timeout=300)
        self.read(3)
        self.answers = self.call(self.channel, "Chat", "stream_stream")(iter(self.said.get, None), timeout=300)
        self.talk("hello")

    def read(self, count):
        found = [next(self.lines)["line"] for _ in range(count)]
        same("lines of a stream", found, list(range(found[0], found[0] + count)))
        return found[-1]

    def talk(self, text):
        self.said.put({"say": text})
        same("a dialogue", next(self.answers)["said"], text)

    def go_on(self):
        self.talk("still here")
        return {"line": self.read(5)}

    def check(self, state):
        same("state", self.unary("State"), state)
        together(self.work)
        same("count", self.unary("State")["count"], state["count"] + CLIENTS * ROUNDS)
        self.open_live()
        self.read(20)
        self.talk("goodbye")
        self.said.put(None)
        self.lines = self.answers = None
        self.channel.close()
        return {"requests": CLIENTS * (ROUNDS + 1) + 6}
