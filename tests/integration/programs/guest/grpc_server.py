"""gRPC server: a unary call, streams in one and in both directions. Messages are JSON, so no generated code is needed."""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from concurrent import futures

import grpc

STATE = {"boot": os.urandom(8).hex(), "count": 0, "kept": {}}
LOCK = threading.Lock()


def count(_request, _context):
    with LOCK:
        STATE["count"] += 1
        return {"count": STATE["count"]}


def put(request, _context):
    with LOCK:
        STATE["kept"].update(request)
    return {}


def state(_request, _context):
    return STATE


def stream(request, context):
    for number in range(request["lines"]):
        if not context.is_active():
            return
        yield {"line": number}
        time.sleep(0.02)


def collect(requests, _context):
    return {"digest": hashlib.sha256("".join(request["part"] for request in requests).encode()).hexdigest()}


def chat(requests, _context):
    for request in requests:
        yield {"said": request["say"]}


def method(kind, function):
    return kind(function, request_deserializer=json.loads, response_serializer=lambda answer: json.dumps(answer).encode())


METHODS = {
    "Count": method(grpc.unary_unary_rpc_method_handler, count),
    "Put": method(grpc.unary_unary_rpc_method_handler, put),
    "State": method(grpc.unary_unary_rpc_method_handler, state),
    "Stream": method(grpc.unary_stream_rpc_method_handler, stream),
    "Collect": method(grpc.stream_unary_rpc_method_handler, collect),
    "Chat": method(grpc.stream_stream_rpc_method_handler, chat),
}


def main():
    address = f"[{sys.argv[1]}]" if ":" in sys.argv[1] else sys.argv[1]
    server = grpc.server(futures.ThreadPoolExecutor(24))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("smr.Programs", METHODS),))
    if server.add_insecure_port(f"{address}:{sys.argv[2]}") == 0:
        sys.exit(4)
    server.start()
    end = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: end.set())
    while not end.wait(0.2):
        pass
    server.stop(0.5).wait()


main()
