"""HTTP/2 server (cleartext, prior knowledge) on h2 and asyncio: streams beside each other, flow control, a stream without end."""

import asyncio
import hashlib
import json
import os
import signal
import sys

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, DataReceived, RequestReceived, StreamEnded, StreamReset, WindowUpdated
from h2.exceptions import ProtocolError, StreamClosedError

STATE = {"boot": os.urandom(8).hex(), "count": 0, "kept": {}}


class Session(asyncio.Protocol):
    def __init__(self):
        self.h2 = H2Connection(config=H2Configuration(client_side=False, header_encoding="utf-8"))
        self.transport, self.bodies, self.paths, self.waiting, self.tasks = None, {}, {}, {}, {}

    def connection_made(self, transport):
        self.transport = transport
        self.h2.initiate_connection()
        transport.write(self.h2.data_to_send())

    def connection_lost(self, _error):
        for task in self.tasks.values():
            task.cancel()

    def data_received(self, data):
        try:
            events = self.h2.receive_data(data)
        except ProtocolError:
            self.transport.write(self.h2.data_to_send())
            self.transport.close()
            return
        for event in events:
            self.handle(event)
        self.flush()

    def handle(self, event):
        if isinstance(event, RequestReceived):
            self.paths[event.stream_id] = dict(event.headers)[":path"]
            self.bodies[event.stream_id] = b""
        elif isinstance(event, DataReceived):
            self.bodies[event.stream_id] += event.data
            self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, StreamEnded):
            self.request(event.stream_id)
        elif isinstance(event, StreamReset):
            self.waiting.pop(event.stream_id, None)
            if task := self.tasks.pop(event.stream_id, None):
                task.cancel()
        elif isinstance(event, WindowUpdated):
            pass
        elif isinstance(event, ConnectionTerminated):
            self.transport.close()

    def request(self, stream):
        path, _, query = self.paths.pop(stream).partition("?")
        body = self.bodies.pop(stream)
        self.h2.send_headers(stream, [(":status", "200")])
        if path == "/stream":
            self.tasks[stream] = asyncio.get_running_loop().create_task(self.ticks(stream, int(query)))
            return
        answer = {}
        if path == "/count":
            STATE["count"] += 1
            answer = {"count": STATE["count"]}
        elif path == "/put":
            STATE["kept"][query] = body.decode()
        elif path == "/state":
            answer = STATE
        elif path == "/digest":
            answer = hashlib.sha256(body).hexdigest()
        elif path == "/big":
            answer = "x" * int(query)
        data = answer if isinstance(answer, str) else json.dumps(answer)
        self.waiting[stream] = (data.encode(), True)

    async def ticks(self, stream, lines):
        for number in range(lines):
            self.waiting[stream] = (self.waiting.get(stream, (b"",))[0] + b"%d\n" % number, number == lines - 1)
            self.flush()
            await asyncio.sleep(0.02)

    def flush(self):
        """Send what the windows of the connection and of each stream allow."""
        for stream, (data, last) in list(self.waiting.items()):
            try:
                rest = self.send(stream, data, last)
            except (StreamClosedError, ProtocolError):
                rest = b""
            if rest:
                self.waiting[stream] = (rest, last)
            else:
                self.waiting.pop(stream)
        self.transport.write(self.h2.data_to_send())

    def send(self, stream, data, last):
        """What could not be sent yet."""
        while data and (room := min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)) > 0:
            self.h2.send_data(stream, data[:room])
            data = data[room:]
        if not data and last:
            self.h2.end_stream(stream)
        return data

    def bye(self):
        self.h2.close_connection(ErrorCodes.NO_ERROR)
        self.transport.write(self.h2.data_to_send())
        self.transport.close()


async def main():
    loop = asyncio.get_running_loop()
    end, sessions = loop.create_future(), []

    def session():
        sessions.append(Session())
        return sessions[-1]

    loop.add_signal_handler(signal.SIGTERM, end.set_result, None)
    server = await loop.create_server(session, sys.argv[1], int(sys.argv[2]))
    await end
    for one in sessions:
        one.bye()
    server.close()
    await server.wait_closed()


asyncio.run(main())
