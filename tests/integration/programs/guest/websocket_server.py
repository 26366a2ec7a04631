"""WebSocket server of the library `websockets`: kept values, a counter, echo, a stream, messages to all."""

import asyncio
import json
import os
import signal
import sys

import websockets

STATE = {"boot": os.urandom(8).hex(), "count": 0, "kept": {}}
EVERYBODY = set()


async def handle(socket, _path=None):
    EVERYBODY.add(socket)
    try:
        async for message in socket:
            if isinstance(message, bytes):
                await socket.send(message)
                continue
            request = json.loads(message)
            verb = request.pop("do")
            if verb == "count":
                STATE["count"] += 1
                await socket.send(json.dumps({"count": STATE["count"]}))
            elif verb == "put":
                STATE["kept"].update(request)
                await socket.send("{}")
            elif verb == "state":
                await socket.send(json.dumps(STATE | {"clients": len(EVERYBODY)}))
            elif verb == "tell":
                websockets.broadcast(EVERYBODY, json.dumps(request))
            elif verb == "stream":
                for number in range(request["lines"]):
                    await socket.send(str(number))
                    await asyncio.sleep(0.02)
    except websockets.ConnectionClosed:
        pass
    finally:
        EVERYBODY.discard(socket)


async def main():
    end = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end.set_result, None)
    async with websockets.serve(handle, sys.argv[1], int(sys.argv[2]), max_size=8 << 20, close_timeout=1):
        await end


asyncio.run(main())
