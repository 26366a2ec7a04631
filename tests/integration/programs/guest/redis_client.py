"""Redis: redis-cli for what a person does, and its protocol over sockets for clients that wait: a subscriber, BLPOP, MULTI."""

import json
import socket
import subprocess

from client import CLIENTS, ROUNDS, same, together


class Connection:
    def __init__(self, host, port):
        self.socket = socket.create_connection((host, port), timeout=15)
        self.file = self.socket.makefile("rb")

    def send(self, *words):
        parts = [f"${len(str(word).encode())}\r\n{word}\r\n" for word in words]
        self.socket.sendall(f"*{len(words)}\r\n{''.join(parts)}".encode())

    def receive(self):
        line = self.file.readline()
        kind, rest = line[:1], line[1:-2].decode()
        if kind == b"+":
            return rest
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == "-1" else self.file.read(int(rest) + 2)[:-2].decode()
        if kind == b"*":
            return None if rest == "-1" else [self.receive() for _ in range(int(rest))]
        raise ConnectionError(rest or "the server has closed the connection")

    def ask(self, *words):
        self.send(*words)
        return self.receive()

    def close(self):
        self.file.close()
        self.socket.close()


class Session:
    def __init__(self, host, port):
        self.host, self.port = host, port
        self.subscriber = self.popper = self.transaction = None

    def connect(self):
        return Connection(self.host, self.port)

    def cli(self, *words):
        argv = ["redis-cli", "-h", self.host, "-p", str(self.port), "--json", *words]
        done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=30)
        return json.loads(done.stdout)

    def work(self, number):
        connection = self.connect()
        for round_ in range(ROUNDS):
            connection.send("INCR", "count")
            connection.send("SET", f"client:{number}:{round_}", "x" * 2000)
        for _ in range(2 * ROUNDS):
            connection.receive()
        connection.close()

    def state(self):
        found = {
            "count": self.cli("GET", "count"),
            "list": self.cli("LRANGE", "list", "0", "-1"),
            "hash": self.cli("HGETALL", "hash"),
            "sorted": self.cli("ZRANGE", "sorted", "0", "-1", "WITHSCORES"),
            "stream": self.cli("XLEN", "stream"),
            "size": self.cli("DBSIZE"),
        }
        info = self.connect()
        found["run_id"] = next(line for line in info.ask("INFO", "server").split() if line.startswith("run_id:"))
        info.close()
        return found

    def prepare(self):
        self.cli("RPUSH", "list", "a", "b", "c")
        self.cli("HSET", "hash", "field", "value")
        self.cli("ZADD", "sorted", "1", "one", "2", "two")
        self.cli("XADD", "stream", "*", "key", "value")
        self.cli("SET", "short-lived", "x", "EX", "1000")
        script = self.cli("SCRIPT", "LOAD", "return redis.call('INCRBY', KEYS[1], ARGV[1])")
        together(self.work)
        return {**self.state(), "script": script}

    def open_live(self):
        self.subscriber, self.popper, self.transaction = self.connect(), self.connect(), self.connect()
        same("subscription", self.subscriber.ask("SUBSCRIBE", "news"), ["subscribe", "news", 1])
        self.popper.send("BLPOP", "jobs", 0)
        same("transaction", self.transaction.ask("MULTI"), "OK")
        same("transaction", self.transaction.ask("SET", "in-transaction", "1"), "QUEUED")

    def go_on(self):
        other = self.connect()
        same("subscribers", other.ask("PUBLISH", "news", "hello"), 1)
        same("news", self.subscriber.receive(), ["message", "news", "hello"])
        other.ask("RPUSH", "jobs", "job")
        same("a job", self.popper.receive(), ["jobs", "job"])
        self.popper.send("BLPOP", "jobs", 0)
        other.close()
        return {"heard": "hello"}

    def check(self, state):
        same("state", self.state(), {key: value for key, value in state.items() if key != "script"})
        other = self.connect()
        # Clients of before the checkpoint are gone for good: none hears news, and none takes a job away from a new client.
        same("subscribers", other.ask("PUBLISH", "news", "hello"), 0)
        same("a job", [other.ask("RPUSH", "jobs", "job"), other.ask("LPOP", "jobs")], [1, "job"])
        same("time to live", 0 < other.ask("TTL", "short-lived") <= 1000, True)
        same("a script", other.ask("EVALSHA", state["script"], 1, "by-script", 7), 7)
        together(self.work)
        same("count", other.ask("GET", "count"), str(int(state["count"]) + CLIENTS * ROUNDS))
        self.open_live()
        self.go_on()
        same("transaction", self.transaction.ask("EXEC"), ["OK"])
        other.ask("SAVE")
        same("a save in a child", other.ask("BGSAVE"), "Background saving started")
        for connection in (self.subscriber, self.popper, self.transaction, other):
            connection.close()
        return {"requests": CLIENTS * ROUNDS * 2 + 20}
