"""Sockets of a restored container: inner connections go on, others end at once or survive, all else works or is refused."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from smr.shim import procs
from smr.shim.tcp import table
from smr.shim.tcp.capture import rescue
from tests.integration import testimage
from tests.integration.command import Done, eventually
from tests.integration.conftest import Machine
from tests.integration.containerd import Containerd
from tests.integration.podman import Podman
from tests.integration.programs import image
from tests.integration.programs.places import containerd_place

FAIL = {"smr.fallback": "fail"}
ZOO = Path(__file__).with_name("socket_zoo.py")
REFUSED = {
    "mptcp": "multipathtcp=0",
    "corked": "UDP_CORK",
    "alg": "AF_ALG",
    "vsock": "VSOCK",
    "unix_outside": "outside of the container",
}
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


def zoo(
    podman: Podman, name: str, outside: Outside, annotations: dict[str, str] | None = None, *options: str, check: bool = True
) -> Done:
    """A container of the zoo."""
    words = [f"--annotation={key}={value}" for key, value in (annotations or {}).items()]
    caps = "--cap-add=NET_RAW"
    where = ["run", "-d", f"--name={name}", f"--cgroup-parent={podman.parent}", caps, f"-v={ZOO}:/zoo.py:ro", *words, *options]
    return podman(*where, testimage.NAME, "python3", "/zoo.py", outside.host, str(outside.port), check=check)


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
    eventually(lambda: set(outside.peers) == WAITERS | {"talk", "half"}, what="the container is connected")
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


def test_established_connections_move_with_their_address(podman: Podman, outside: Outside) -> None:
    """Clients in the middle of a request, and servers elsewhere, see a peer that was silent for a while; at another address it
    is an error, and with auto a reset."""
    zoo(podman, "source", outside)
    podman.ready("source")
    address = podman.address("source")
    eventually(lambda: set(outside.peers) == WAITERS | {"talk", "half"}, what="the container is connected")
    client = socket.create_connection((address, 8002))
    client.settimeout(60)
    with client:
        client.sendall(b"before")
        assert client.recv(99) == b"before"
        half = outside.peers["half"]
        half.sendall(b"last words")
        half.shutdown(socket.SHUT_WR)
        done = podman.checkpoint("source", "moving:1", "--tcp", "established", "--stop")
        assert "warning" not in done.stderr
        client.sendall(b"while it is away")
        podman.remove("source")
        failed = zoo(podman, "elsewhere", outside, {"smr.restore": "moving:1", "smr.tcp": "established", **FAIL}, check=False)
        assert failed.returncode != 0
        assert f"--ip {address}" in failed.stderr
        podman.remove("elsewhere")
        zoo(podman, "again", outside, {"smr.restore": "moving:1", "smr.tcp": "established", **FAIL}, f"--ip={address}")
        assert client.recv(99) == b"while it is away"
        client.sendall(b"after")
        assert client.recv(99) == b"after"
    ok(podman.ask("again", "inner"))
    assert podman.ask("again", "half")["read"] == "last words"
    half.settimeout(60)
    assert half.recv(99) == b"answer"
    talk = outside.peers["talk"]
    talk.settimeout(60)
    outside.peers["read"].sendall(b"hello")
    seen = eventually(lambda: (got := podman.ask("again", "outer"))["read"] != "waiting" and got, timeout_s=60)
    assert seen == {**dict.fromkeys(WAITERS, "waiting"), "read": "read b'hello'", "connecting": "ECONNREFUSED"}
    talk.sendall(b"answer")
    assert podman.ask("again", "send/question")["answer"] == "answer"
    assert talk.recv(99) == b"question"
    zoo(podman, "third", outside, {"smr.restore": "moving:1", "smr.tcp": "auto", **FAIL})
    ok(podman.ask("third", "inner"))
    assert podman.ask("third", "outer")["read"] == "ECONNRESET"


def test_what_cannot_be_saved_is_refused(podman: Podman, outside: Outside, tmp_path: Path) -> None:
    """The checkpoint says what is in the way, and the container goes on as before."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "listener"))
        listener.listen(4)
        zoo(podman, "source", outside, None, f"-v={tmp_path}:/outside")
        podman.ready("source")
        for kind, word in REFUSED.items():
            held = podman.ask("source", f"hold/{kind}")
            if "error" in held:
                continue  # this kernel has no such sockets
            done = podman.checkpoint("source", "refused:1", check=False)
            assert done.returncode != 0
            assert word in done.stderr
            podman.ask("source", "drop")
    assert podman.node.smr("images", "inspect", "refused:1", check=False).returncode != 0
    ok(podman.ask("source", "inner"))
    assert set(podman.ask("source", "outer").values()) == {"waiting"}


_KILLED = """
import os, sys
from pathlib import Path
from smr.proto.annotations import Tcp
from smr.shim.tcp.capture import Capture
held = Capture(int(sys.argv[1]), Tcp.ESTABLISHED)
held.take()
if sys.argv[2] == "mute":
    held.mute(Path(sys.argv[3]))
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("stage", ["take", "mute"])
def test_the_source_recovers_from_a_capture_that_was_killed(bridge: Podman, stage: str) -> None:
    """What kill -9 leaves of a capture, deaf and mute sockets and packets that are dropped, its guard takes away."""
    podman = bridge
    podman.start("source")
    podman.ready("source")
    folder, pid = podman.node.path / "lock", podman.pid("source")
    with socket.create_connection((podman.address("source"), 8000)) as client:
        here, port = client.getsockname()
        client.sendall(b"GET /look HTTP/1.0\r\n")
        eventually(lambda: any(not one.inner for one in table.find(pid, procs.tree(pid))), what="it is accepted")
        killed = subprocess.run([sys.executable, "-c", _KILLED, str(pid), stage, str(folder)], check=False)
        assert killed.returncode == -signal.SIGKILL
        client.sendall(b"\r\n")
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.recv(1)
        rescue(pid, folder)
        client.settimeout(30)
        assert b"boot" in client.makefile("rb").read()
    assert (
        f"{here} . {port} . " not in subprocess.run(["nft", "list", "ruleset"], check=True, capture_output=True, text=True).stdout
    )


def test_on_containerd_at_new_addresses(containerd_2: Containerd, machine: Machine) -> None:
    """The same zoo, in a network that CNI's plugins made, with other addresses of both families."""
    containerd_2("images", "import", image.archive(machine.engines))
    with containerd_place(containerd_2) as place:
        command, binds = ["python3", "/zoo.py"], [f"{ZOO}:/zoo.py:ro"]
        place.start("source", command, place.subnets.pair(11), binds=binds)
        boot = containerd_2.ready("source")["boot"]
        containerd_2.checkpoint("source", "zoo:1")
        ok(containerd_2.ask("source", "inner"))
        place.remove("source")
        place.start("again", command, place.subnets.pair(12), binds=binds, annotations={"smr.restore": "zoo:1", **FAIL})
        assert containerd_2.ask("again")["boot"] == boot
        ok(containerd_2.ask("again", "inner"))
        place.remove("again")
