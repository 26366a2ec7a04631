"""HTTP/1.1 by Python's multiprocessing: three forked processes that accept on one socket, two that work off a queue, a manager.

State is in all that multiprocessing has: a shared Value with its lock, a Manager's dict, queues.
"""

import hashlib
import http.server
import json
import multiprocessing
import os
import signal
import socket
import socketserver
import sys
import threading
import time
import traceback
import urllib.parse


class Shared:
    """What all processes have in common; children inherit it by fork."""

    def __init__(self):
        self.boot = os.urandom(8).hex()
        self.count = multiprocessing.Value("q", 0)
        self.lock = multiprocessing.Lock()
        self.tasks, self.results = multiprocessing.Queue(), multiprocessing.Queue()
        self.kept = {}


shared = Shared()


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that is gone is no error, and is told all the same: what else went wrong may look like it."""
        traceback.print_exc()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path)
        if path.path == "/state":
            state = {"boot": shared.boot, "count": shared.count.value, "kept": dict(shared.kept)}
            self.answer(json.dumps(state).encode())
        elif path.path == "/stream":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for number in range(int(path.query)):
                line = b"%d\n" % number
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                time.sleep(0.02)
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.send_error(404)

    def do_POST(self):
        path = urllib.parse.urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path.path == "/count":
            with shared.count.get_lock():
                shared.count.value += 1
                now = shared.count.value
            self.answer(json.dumps({"count": now}).encode())
        elif path.path == "/put":
            shared.kept[path.query] = body.decode()
            self.answer(b"{}")
        elif path.path == "/digest":
            with shared.lock:
                shared.tasks.put(body)
                self.answer(shared.results.get().encode())
        else:
            self.send_error(404)


def serve(listener):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    server = Server(listener.getsockname()[:2], Handler, bind_and_activate=False)
    server.socket = listener
    server.serve_forever()


def work():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        shared.results.put(hashlib.sha256(shared.tasks.get()).hexdigest())


def main():
    address, port = sys.argv[1], int(sys.argv[2])
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, port), family=family, backlog=64)
    manager = multiprocessing.Manager()
    shared.kept = manager.dict()
    children = [multiprocessing.Process(target=serve, args=(listener,)) for _ in range(3)]
    children += [multiprocessing.Process(target=work) for _ in range(2)]
    for child in children:
        child.start()
    end = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: end.set())
    while not end.wait(0.2):
        if any(not child.is_alive() for child in children):
            sys.exit(3)
    for child in children:
        child.terminate()
        child.join()
    manager.shutdown()
    sys.exit(0)


if __name__ == "__main__":
    main()
