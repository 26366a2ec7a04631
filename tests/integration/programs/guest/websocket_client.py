"""WebSocket sessions: one that receives a stream, some that wait, messages to all, binary messages of 256 KiB."""

import asyncio
import json
import os

import websockets
from client import CLIENTS, ROUNDS, same


class Session:
    def __init__(self, host, port):
        self.address = f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"
        self.loop = asyncio.new_event_loop()
        self.idle, self.stream, self.line = [], None, 0

    def connect(self):
        return websockets.connect(self.address, max_size=8 << 20, open_timeout=15, close_timeout=2)

    @staticmethod
    async def ask(socket, do, **words):
        await socket.send(json.dumps({"do": do, **words}))
        return json.loads(await asyncio.wait_for(socket.recv(), 15))

    async def state(self):
        async with self.connect() as socket:
            found = await self.ask(socket, "state")
        return {key: found[key] for key in ("boot", "count", "kept")}

    async def work(self):
        async with self.connect() as socket:
            for _ in range(ROUNDS):
                await self.ask(socket, "count")
            body = os.urandom(256 << 10)
            await socket.send(body)
            same("an echo", await asyncio.wait_for(socket.recv(), 15), body)

    async def together(self):
        await asyncio.gather(*(self.work() for _ in range(CLIENTS)))

    async def tell(self, listeners):
        """One says something, and all the others hear it."""
        async with self.connect() as socket:
            await socket.send(json.dumps({"do": "tell", "news": "hello"}))
            for listener in listeners:
                same("news", json.loads(await asyncio.wait_for(listener.recv(), 15)), {"news": "hello"})

    async def lines(self, count):
        for _ in range(count):
            message = await asyncio.wait_for(self.stream.recv(), 15)
            if message.isdigit():
                same("lines of a stream", int(message), self.line)
                self.line += 1
        return self.line

    def prepare(self):
        async def act():
            async with self.connect() as socket:
                await self.ask(socket, "put", before="the checkpoint")
            await self.together()
            return await self.state()

        return self.loop.run_until_complete(act())

    def open_live(self):
        async def act():
            self.idle = [await self.connect() for _ in range(3)]
            self.stream = await self.connect()
            await self.stream.send(json.dumps({"do": "stream", "lines": 100000}))
            await self.lines(3)

        self.loop.run_until_complete(act())

    def go_on(self):
        async def act():
            await self.tell(self.idle)
            return {"line": await self.lines(5)}

        return self.loop.run_until_complete(act())

    def check(self, state):
        async def act():
            same("state", await self.state(), state)
            await self.together()
            listeners = [await self.connect() for _ in range(3)]
            await self.tell(listeners)
            same("count", (await self.state())["count"], state["count"] + CLIENTS * ROUNDS)
            for _ in range(50):  # the server ends a client's task in its own time
                found = await self.ask(listeners[0], "state")
                if found["clients"] == len(listeners):
                    break
                await asyncio.sleep(0.1)
            same("clients of the server", found["clients"], len(listeners))
            await listeners[0].send(json.dumps({"do": "stream", "lines": 25}))
            lines = [int(await asyncio.wait_for(listeners[0].recv(), 15)) for _ in range(25)]
            same("a stream", lines, list(range(25)))
            for listener in listeners:
                await listener.close()
            return {"requests": CLIENTS * (ROUNDS + 1) + 6}

        return self.loop.run_until_complete(act())
