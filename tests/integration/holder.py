"""A process that holds what CRIU has options for, and says ten times a second, by datagram, how it finds them and what it is.

    holder.py SOCKET FOLDER

It waits until there is a SOCKET, which somebody outside of the container binds. Then it locks FOLDER/locked, keeps FOLDER/ghost
open (deleted) and FOLDER/linked (deleted, but FOLDER/other is the same file), and sends JSON lines to SOCKET.
"""

import contextlib
import fcntl
import json
import mmap
import os
import resource
import socket
import sys
import time


def status(name):
    with open("/proc/self/status") as file:
        return next(line.split()[1] for line in file if line.startswith(f"{name}:"))


class Holder:
    def __init__(self, path, folder):
        self.locked = open(f"{folder}/locked", "w+")  # noqa: SIM115
        fcntl.flock(self.locked, fcntl.LOCK_EX)
        self.ghost = open(f"{folder}/ghost", "w+")  # noqa: SIM115
        self.ghost.write("a ghost")
        self.ghost.flush()
        self.linked = open(f"{folder}/linked", "w+")  # noqa: SIM115
        self.linked.write("a link")
        self.linked.flush()
        os.link(f"{folder}/linked", f"{folder}/other")
        os.unlink(f"{folder}/ghost")
        os.unlink(f"{folder}/linked")
        resource.setrlimit(resource.RLIMIT_CORE, (7, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.connect(path)
        self.folder = folder
        self.ticks = 0
        self.sleeps = []
        self.kept = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.wiped = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.wiped.madvise(18)  # MADV_WIPEONFORK
        for memory in (self.kept, self.wiped):
            memory[:] = b"secret.." * (1 << 17)
        self.pipe, child = os.pipe()
        os.set_blocking(self.pipe, False)
        if os.fork() == 0:
            self.sleep(child)

    @staticmethod
    def sleep(pipe):
        """Sleeps of a second, and how long each took by the monotonic clock."""
        while True:
            before = time.monotonic()
            time.sleep(1)
            os.write(pipe, b"%8.3f" % (time.monotonic() - before))

    def slept(self):
        with contextlib.suppress(BlockingIOError):
            while True:
                self.sleeps.append(float(os.read(self.pipe, 8)))
        return self.sleeps

    def lock_is_held(self):
        with open(f"{self.folder}/locked", "w+") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    def facts(self):
        self.ticks += 1
        self.ghost.seek(0)
        self.linked.seek(0)
        return {
            "ticks": self.ticks,
            "pid": os.getpid(),
            "locked": self.lock_is_held(),
            "ghost": self.ghost.read(),
            "linked": self.linked.read(),
            "kept": self.kept[:].count(b"secret.."),
            "wiped": self.wiped[:].count(0),
            "monotonic": time.clock_gettime(time.CLOCK_MONOTONIC),
            "boottime": time.clock_gettime(time.CLOCK_BOOTTIME),
            "sleeps": self.slept(),
            "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
            "core": resource.getrlimit(resource.RLIMIT_CORE),
            "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK),
            "caps": status("CapBnd"),
            "effective": status("CapEff"),
            "nnp": status("NoNewPrivs"),
        }


def main(path, folder):
    while not os.path.exists(path):
        time.sleep(0.05)
    time.sleep(0.1)
    holder = Holder(path, folder)
    while True:
        try:
            holder.socket.send(json.dumps(holder.facts()).encode())
        except OSError:
            time.sleep(0.1)
        time.sleep(0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
