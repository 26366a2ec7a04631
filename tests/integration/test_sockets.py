"""Sockets of a restored container: inner connections go on, others end at once or survive, all else works or is refused."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration import testimage
from tests.integration.command import Done, eventually
from tests.integration.podman import Podman

FAIL = {"smr.fallback": "fail"}
ZOO = Path(__file__).with_name("socket_zoo.py")
WAITERS = {"read", "poll", "epoll", "epoll edge", "asyncio"}


class Outside:
    """The other ends: a listener on the bridge's gateway that echoes, and one behind it that never completes a connection."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.peers: dict[str, socket.socket] = {}
        while True:
            self.listener, self.full = (socket.socket() for _ in range(2))
            self.listener.bind((host, 0))
            try:
                self.full.bind((host, self.listener.getsockname()[1] + 1))
                break
            except OSError:
                continue
        self.listener.listen(32)
        self.full.listen(0)
        self.fillers = [socket.socket() for _ in range(3)]
        for filler in self.fillers:
            filler.setblocking(False)
            filler.connect_ex(self.full.getsockname())
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self.listener.accept()
                name = peer.recv(16, socket.MSG_WAITALL).decode().strip()
                self.peers[name] = peer

    def close(self) -> None:
        for sock in (self.listener, self.full, *self.fillers, *self.peers.values()):
            sock.close()


def zoo(podman: Podman, name: str, outside: Outside, annotations: dict[str, str] | None = None, *options: str) -> Done:
    """A container of the zoo."""
    words = [f"--annotation={key}={value}" for key, value in (annotations or {}).items()]
    caps = "--cap-add=NET_RAW"
    where = ["run", "-d", f"--name={name}", f"--cgroup-parent={podman.parent}", caps, f"-v={ZOO}:/zoo.py:ro", *words, *options]
    return podman(*where, testimage.NAME, "python3", "/zoo.py", outside.host, str(outside.port))


@pytest.fixture
def outside(bridge: Podman) -> Iterator[Outside]:
    """The other ends, on the gateway of podman's bridge, which a container that stays keeps up."""
    bridge.start("keeper")
    host = bridge.field("keeper", "{{.NetworkSettings.Networks.smrt.Gateway}}")
    ends = Outside(host)
    yield ends
    ends.close()


def ok(result: dict[str, object]) -> None:
    """Every kind says ok."""
    assert {name: said for name, said in result.items() if said != "ok"} == {}


def test_close_keeps_what_is_inside_and_resets_the_rest(podman: Podman, outside: Outside) -> None:
    """With another address, and by default: inner sockets go on with their data, outer ones end at once, the source lives."""
    zoo(podman, "source", outside)
    podman.ready("source")
    address = podman.address("source")
    eventually(lambda: set(outside.peers) == WAITERS | {"talk"}, what="the container is connected")
    with (
        socket.create_connection((address, 8001)),  # never accepted
        socket.create_connection((address, 8002)) as client,
    ):
        client.sendall(b"before")
        assert client.recv(9) == b"before"
        podman.checkpoint("source", "zoo:1")
        client.sendall(b"after")
        assert client.recv(9) == b"after"
    zoo(podman, "again", outside, {"smr.restore": "zoo:1", **FAIL})
    assert podman.address("again") != address
    ok(podman.ask("again", "inner"))
    seen = eventually(lambda: (got := podman.ask("again", "outer")) and "waiting" not in got.values() and got, what="all ended")
    assert seen == {**dict.fromkeys(WAITERS, "ECONNRESET"), "connecting": "ECONNREFUSED"}
    assert podman.ask("again", "send/hello")["answer"] == "ECONNRESET"
    with socket.create_connection((podman.address("again"), 8001)):
        pass
    ok(podman.ask("source", "inner"))
    assert set(podman.ask("source", "outer").values()) == {"waiting"}
    outside.peers["read"].sendall(b"hello")
    eventually(lambda: podman.ask("source", "outer")["read"] == "read b'hello'")
