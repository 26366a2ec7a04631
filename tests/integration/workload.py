"""What runs inside the test containers: a server whose whole state is in memory, so that a restart cannot pass for a restore.

    workload.py [--port N] [--log] [--stdin] [--exit CODE] [FEATURE...]

GET /count counts up and answers {"count": N, "boot": TOKEN}; TOKEN is drawn once a process, so it survives a restore only.
Each FEATURE holds a kernel object across a checkpoint and has a path of its own that uses it:

    workers   two children, each with a counter in its memory, spoken to through pipes
    unix      a child connected through a listening unix socket
    inotify   a watch on a directory; the request creates a file there and answers the event's name
    shm       a file in /dev/shm and an anonymous shared mapping, both shared with a child
    threads   four threads, each with a counter of its own
    zombie    a child that has ended and is not reaped
    stopped   a child that has stopped itself; /resume lets it go on
    memory    64 MiB of patterned anonymous memory, checked by its digest
    aligned   a thread that waits with its stack pointer at the start of a page
    net       sockets bound to addresses of the container's own (netload.py)
    file      an open file with an offset, and a file that was deleted while open

SIGTERM ends with --exit (default 7). --log prints "line N" five times a second; --stdin echoes lines. Few imports:
it starts in 50 ms.
"""

import contextlib
import json
import mmap
import os
import signal
import socket
import sys
import threading
import time


class Server:
    def __init__(self, port, features, exit_code):
        self.boot = os.urandom(8).hex()
        self.count = 0
        self.features = {name: FEATURES[name]() for name in features}
        signal.signal(signal.SIGTERM, lambda *_: os._exit(exit_code))
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(("0.0.0.0", port))
        self.socket.listen(64)

    def serve(self):
        while True:
            connection, _ = self.socket.accept()
            with connection, contextlib.suppress(OSError):
                self.answer(connection)

    def answer(self, connection):
        request = b""
        while b"\r\n\r\n" not in request:
            part = connection.recv(4096)
            if not part:
                return
            request += part
        path = request.split()[1].decode()
        try:
            body, status = self.route(path), 200
        except Exception as error:  # noqa: BLE001  # the test sees it
            body, status = {"error": repr(error)}, 500
        data = json.dumps(body).encode() + b"\n"
        connection.sendall(f"HTTP/1.0 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)

    def route(self, path):
        name, _, argument = path.strip("/").partition("/")
        if name == "count":
            self.count += 1
            return {"count": self.count, "boot": self.boot}
        if name == "look":
            return {"count": self.count, "boot": self.boot, "features": sorted(self.features), "uid": os.getuid()}
        if name == "exit":
            os._exit(int(argument))
        if name == "resume":
            return self.features["stopped"].resume()
        if name == "hostname":
            return {"hostname": socket.gethostname()}
        return self.features[name].use()


def child(body):
    """Fork a child that runs `body` and never returns; it dies with the server."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        finally:
            os._exit(0)
    return pid


class Workers:
    def __init__(self):
        self.pipes = []
        for number in range(2):
            there, here = os.pipe(), os.pipe()
            pid = child(lambda start=number * 100, ask=there, reply=here: self.work(start, ask, reply))
            self.pipes.append((pid, there[1], here[0]))

    @staticmethod
    def work(value, ask, reply):
        os.close(ask[1])
        while os.read(ask[0], 1):
            value += 1
            os.write(reply[1], b"%8d" % value)

    def use(self):
        values = []
        for _, ask, reply in self.pipes:
            os.write(ask, b"t")
            values.append(int(os.read(reply, 8)))
        return {"values": values, "pids": [pid for pid, _, _ in self.pipes]}


class Unix:
    PATH = "/tmp/workload.sock"

    def __init__(self):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.PATH)
        listener.listen(1)
        self.listener = listener
        self.pid = child(self.peer)
        self.connection, _ = listener.accept()

    def peer(self):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self.PATH)
            value = 0
            while connection.recv(1):
                value += 1
                connection.sendall(b"%8d" % value)

    def use(self):
        self.connection.sendall(b"t")
        return {"value": int(self.connection.recv(8))}


class Inotify:
    PATH = "/tmp/watched"

    def __init__(self):
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        os.makedirs(self.PATH, exist_ok=True)
        self.fd = libc.inotify_init1(os.O_NONBLOCK)
        self.serial = 0
        if self.fd < 0 or libc.inotify_add_watch(self.fd, self.PATH.encode(), 0x100) < 0:
            raise OSError(ctypes.get_errno(), "inotify")

    def use(self):
        self.serial += 1
        name = f"file{self.serial}"
        with open(f"{self.PATH}/{name}", "w"):
            pass
        event = os.read(self.fd, 4096)
        return {"made": name, "seen": event[16:].rstrip(b"\0").decode()}


class SharedMemory:
    PATH = "/dev/shm/workload"

    def __init__(self):
        self.fd = os.open(self.PATH, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self.fd, 4096)
        self.file = mmap.mmap(self.fd, 4096)
        self.anonymous = mmap.mmap(-1, 1 << 20)
        self.ask, self.reply = os.pipe(), os.pipe()
        self.pid = child(self.work)
        self.serial = 0

    def work(self):
        os.close(self.ask[1])
        while os.read(self.ask[0], 1):
            seen = self.file[:8] + self.anonymous[4096:4104]
            self.anonymous[8192:8200] = seen[:8]
            os.write(self.reply[1], seen)

    def use(self):
        self.serial += 1
        self.file[:8] = b"f%7d" % self.serial
        self.anonymous[4096:4104] = b"a%7d" % self.serial
        os.write(self.ask[1], b"t")
        seen = os.read(self.reply[0], 16)
        with open(self.PATH, "rb") as file:
            named = file.read(8)
        return {
            "file": int(seen[1:8]),
            "anonymous": int(seen[9:16]),
            "back": int(self.anonymous[8193:8200]),
            "named": int(named[1:]),
        }


class Aligned:
    # push rbp; mov rbp, rsp; and rsp, -4096; mov eax, 34 (pause); syscall; leave; ret
    CODE = bytes.fromhex("55 4889e5 4881e400f0ffff b822000000 0f05 c9 c3")

    def __init__(self):
        import ctypes

        if os.uname().machine != "x86_64":
            raise OSError("machine code for x86_64 only")
        self.code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self.code.write(self.CODE)
        wait = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(self.code)))
        self.thread = threading.Thread(target=wait, daemon=True)
        self.thread.start()

    def use(self):
        return {"alive": self.thread.is_alive()}


class Threads:
    def __init__(self):
        self.values = [0, 0, 0, 0]
        self.turns = [threading.Semaphore(0) for _ in self.values]
        self.done = threading.Semaphore(0)
        for number in range(4):
            threading.Thread(target=self.work, args=(number,), daemon=True).start()

    def work(self, number):
        mine = 0
        while True:
            self.turns[number].acquire()
            mine += 1
            self.values[number] = mine
            self.done.release()

    def use(self):
        for turn in self.turns:
            turn.release()
        for _ in self.turns:
            self.done.acquire()
        return {"values": self.values}


def process_state(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


class Zombie:
    def __init__(self):
        self.pid = child(lambda: None)

    def use(self):
        deadline = time.monotonic() + 5
        while process_state(self.pid) != "Z" and time.monotonic() < deadline:
            time.sleep(0.01)
        return {"state": process_state(self.pid)}


class Stopped:
    def __init__(self):
        self.pipe = os.pipe()
        self.pid = child(self.work)
        os.waitpid(self.pid, os.WUNTRACED)

    def work(self):
        os.kill(os.getpid(), signal.SIGSTOP)
        os.write(self.pipe[1], b"on")
        time.sleep(3600)

    def use(self):
        return {"state": process_state(self.pid)}

    def resume(self):
        os.kill(self.pid, signal.SIGCONT)
        return {"said": os.read(self.pipe[0], 2).decode()}


class Memory:
    SIZE = 64 << 20

    def __init__(self):
        block = bytes(range(256)) * 4096
        self.bytes = mmap.mmap(-1, self.SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for offset in range(0, self.SIZE, len(block)):
            self.bytes[offset : offset + len(block)] = offset.to_bytes(8, "little") + block[8:]

    def use(self):
        import zlib

        return {"crc": zlib.crc32(self.bytes)}


class File:
    def __init__(self):
        self.file = open("/tmp/kept", "w+")  # noqa: SIM115
        self.file.write("0123456789")
        self.file.flush()
        self.file.seek(4)
        self.deleted = open("/tmp/deleted", "w+")  # noqa: SIM115
        self.deleted.write("gone")
        self.deleted.flush()
        os.unlink("/tmp/deleted")

    def use(self):
        self.deleted.seek(0)
        return {"offset": self.file.tell(), "next": os.pread(self.file.fileno(), 2, 4).decode(), "deleted": self.deleted.read()}


def net():
    import netload

    return netload.Net()


FEATURES = {
    "workers": Workers,
    "unix": Unix,
    "inotify": Inotify,
    "shm": SharedMemory,
    "zombie": Zombie,
    "stopped": Stopped,
    "memory": Memory,
    "file": File,
    "threads": Threads,
    "aligned": Aligned,
    "net": net,
}


def say(line):
    os.write(1, line.encode() + b"\n")


def log_lines():
    number = 0
    while True:
        number += 1
        say(f"line {number}")
        time.sleep(0.2)


def echo_stdin():
    for line in sys.stdin:
        say(f"echo: {line.strip()}")


def main(arguments):
    port, exit_code, background, features = 8000, 7, [], []
    words = iter(arguments)
    for word in words:
        if word == "--port":
            port = int(next(words))
        elif word == "--exit":
            exit_code = int(next(words))
        elif word == "--log":
            background.append(log_lines)
        elif word == "--stdin":
            background.append(echo_stdin)
        else:
            features.append(word)
    # Children before threads: a fork of a threaded process is a trap.
    server = Server(port, sorted(features, key=list(FEATURES).index), exit_code)
    for body in background:
        threading.Thread(target=body, daemon=True).start()
    say(f"ready {server.boot}")
    server.serve()


if __name__ == "__main__":
    main(sys.argv[1:])
