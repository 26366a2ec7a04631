"""HTTP/2 sessions with the library h2: streams beside each other in one connection, flow control, a stream without end."""

import hashlib
import json
import os
import socket

from client import CLIENTS, ROUNDS, same, together
from h2.connection import H2Connection
from h2.events import DataReceived, StreamEnded, StreamReset


class Connection:
    def __init__(self, host, port):
        self.socket = socket.create_connection((host, port), timeout=15)
        self.h2 = H2Connection()
        self.h2.initiate_connection()
        self.bodies, self.ended, self.host = {}, set(), host
        self.flush()

    def flush(self):
        self.socket.sendall(self.h2.data_to_send())

    def receive(self):
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError("the server has closed the connection")
        for event in self.h2.receive_data(data):
            if isinstance(event, DataReceived):
                self.bodies[event.stream_id] += event.data
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, StreamEnded):
                self.ended.add(event.stream_id)
            elif isinstance(event, StreamReset):
                raise ConnectionError(f"stream {event.stream_id} was reset")
        self.flush()

    def begin(self, path, body=b""):
        stream = self.h2.get_next_available_stream_id()
        self.bodies[stream] = b""
        method = "POST" if body else "GET"
        headers = [(":method", method), (":path", path), (":scheme", "http"), (":authority", "server")]
        self.h2.send_headers(stream, headers, end_stream=not body)
        while body:
            self.flush()
            room = min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)
            if room == 0:
                self.receive()
                continue
            self.h2.send_data(stream, body[:room], end_stream=len(body) <= room)
            body = body[room:]
        self.flush()
        return stream

    def finish(self, stream):
        while stream not in self.ended:
            self.receive()
        return self.bodies.pop(stream).decode()

    def ask(self, path, body=b""):
        return self.finish(self.begin(path, body))

    def close(self):
        self.h2.close_connection()
        self.flush()
        self.socket.close()


class Session:
    def __init__(self, host, port):
        self.host, self.port = host, port
        self.live, self.stream = None, 0

    def talk(self, path, body=b""):
        connection = Connection(self.host, self.port)
        answer = connection.ask(path, body)
        connection.close()
        return answer

    def work(self, _number):
        connection = Connection(self.host, self.port)
        for stream in [connection.begin("/count") for _ in range(ROUNDS)]:
            connection.finish(stream)
        body = os.urandom(256 << 10)
        upload, download = connection.begin("/digest", body), connection.begin(f"/big?{300 << 10}")
        same("digest of a body", connection.finish(upload), hashlib.sha256(body).hexdigest())
        same("length of a body", len(connection.finish(download)), 300 << 10)
        connection.close()

    def prepare(self):
        self.talk("/put?before", b"the checkpoint")
        together(self.work)
        return json.loads(self.talk("/state"))

    def open_live(self):
        self.live = Connection(self.host, self.port)
        self.stream = self.live.begin("/stream?100000")
        self.lines(3)

    def lines(self, more):
        """Wait for so many more lines of the stream; how many there are."""
        wanted = self.live.bodies[self.stream].count(b"\n") + more
        while self.live.bodies[self.stream].count(b"\n") < wanted:
            self.live.receive()
        found = self.live.bodies[self.stream].split(b"\n")[:-1]
        same("lines of a stream", [int(line) for line in found], list(range(len(found))))
        return len(found)

    def go_on(self):
        self.live.ask("/state")
        return {"line": self.lines(5)}

    def check(self, state):
        same("state", json.loads(self.talk("/state")), state)
        self.talk("/put?after", b"the restore")
        together(self.work)
        found = json.loads(self.talk("/state"))
        kept = {"before": "the checkpoint", "after": "the restore"}
        same("state", found, {**state, "count": state["count"] + CLIENTS * ROUNDS, "kept": {**state["kept"], **kept}})
        self.open_live()
        self.lines(20)
        self.live.close()
        return {"requests": CLIENTS * (ROUNDS + 2) + 4}
