"""The ASGI application that uvicorn serves on uvloop: HTTP/1.1, state in the process, a stream."""

import asyncio
import hashlib
import json
import os

STATE = {"boot": os.urandom(8).hex(), "count": 0, "kept": {}}


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
    elif scope["type"] == "http":
        await http(scope, receive, send)


async def lifespan(receive, send):
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def body_of(receive):
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


async def stream(receive, send, lines):
    """Lines until the client is gone."""
    gone = asyncio.ensure_future(receive())
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for number in range(lines):
        await send({"type": "http.response.body", "body": b"%d\n" % number, "more_body": True})
        await asyncio.wait([gone], timeout=0.02)
        if gone.done():
            return
    gone.cancel()
    await send({"type": "http.response.body", "body": b""})


async def http(scope, receive, send):
    path, query = scope["path"], scope["query_string"].decode()
    body = await body_of(receive)
    if path == "/stream":
        await stream(receive, send, int(query))
        return
    if path == "/state":
        answer = STATE | {"loop": type(asyncio.get_running_loop()).__module__}
    elif path == "/count":
        STATE["count"] += 1
        answer = {"count": STATE["count"]}
    elif path == "/put":
        STATE["kept"][query] = body.decode()
        answer = {}
    else:
        answer = await asyncio.get_running_loop().run_in_executor(None, lambda: hashlib.sha256(body).hexdigest())
    data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
    length = [(b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": length})
    await send({"type": "http.response.body", "body": data})
