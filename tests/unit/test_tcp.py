"""Which connections are inner ones, the file they travel in, and what smr.tcp makes of an image and a container."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smr.images import connections
from smr.images.connections import FILE, Connection, Stream, parse_connections, plain, write_connections
from smr.proto.annotations import Annotations, Fallback, Tcp
from smr.proto.checkpoint import CheckpointConfig, Connections
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec, parse_spec
from smr.shim.procs import Process
from smr.shim.tcp import lock, mode, revive, table
from tests.unit.test_preflight import CONFIG

STREAM = Stream(
    in_seq=5, out_seq=7, unsent=1, mss=1460, options=7, send_scale=7, receive_scale=7, timestamp=9, window=(1, 2, 3, 4, 5)
)
ONE = Connection(pid=1, fd=7, family=2, state=1, local=("10.0.0.5", 80, 0), remote=("10.0.0.9", 4000, 0), inner=False)
ME = Process(pid=100, ns_pid=1, state="S")
HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def hexed(address: str, port: int) -> str:
    """An end as /proc/net/tcp[6] writes it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    raw = socket.inet_pton(family, address)
    return "".join(f"{word:08X}" for word in struct.unpack(f"={len(raw) // 4}I", raw)) + f":{port:04X}"


def line(local: tuple[str, int], remote: tuple[str, int], state: int, inode: int) -> str:
    """A line of it."""
    words = (
        f"0: {hexed(*local)} {hexed(*remote)} {state:02X} 00000000:00000000 00:00000000 00000000 0 0 {inode} 1 0 20 4 30 10 -1"
    )
    return f"   {words}\n"


Look = Callable[..., dict[int, bool]]


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> Look:
    """The connected sockets that are found, and whether each is an inner one: lines of tcp and tcp6, and the tree's inodes."""

    def find(*lines: str, six: tuple[str, ...] = (), owned: tuple[int, ...]) -> dict[int, bool]:
        text = {"tcp": HEADER + "".join(lines), "tcp6": HEADER + "".join(six)}
        monkeypatch.setattr(table, "_text", lambda _, name: text[name])
        monkeypatch.setattr(table, "descriptors", lambda _: {inode: (ME, inode) for inode in owned})
        monkeypatch.setattr(table.network, "addresses", lambda _: ("10.0.0.5",))
        return {one.inode: one.inner for one in table.find(100, [ME])}

    return find


A, B, SERVER, CLIENT = ("127.0.0.1", 4000), ("127.0.0.1", 80), ("10.0.0.5", 80), ("10.0.0.9", 5000)


def test_both_ends_in_the_tree_are_inner(look: Look) -> None:
    """Whatever the address; a listener is no connection, and a socket of another process none of ours."""
    assert look(line(A, B, 1, 11), line(B, A, 1, 12), line(B, ("0.0.0.0", 0), 10, 13), owned=(11, 12, 13)) == {11: True, 12: True}
    assert look(line(SERVER, CLIENT, 1, 11), line(CLIENT, SERVER, 1, 12), owned=(11,)) == {11: False}


def test_an_ipv4_end_of_an_ipv6_socket(look: Look) -> None:
    """A dual-stack server's end is in the other file, and in IPv6 form."""
    mapped = line(("::ffff:127.0.0.1", 80), ("::ffff:127.0.0.1", 4000), 1, 12)
    assert look(line(A, B, 1, 11), six=(mapped,), owned=(11, 12)) == {11: True, 12: True}


def test_an_end_that_waits_to_be_accepted_is_lost(look: Look) -> None:
    """Nobody has a descriptor of it, so the other end is reset; as is one whose attempt goes on."""
    assert look(line(A, B, 1, 11), line(B, A, 1, 0), owned=(11,)) == {11: False}
    assert look(line(A, B, 8, 11), line(B, A, 8, 0), owned=(11,)) == {11: False}
    assert look(line(A, B, 2, 11), owned=(11,)) == {11: False}


def test_a_peer_that_was_closed(look: Look) -> None:
    """Its last words are all here when its FIN is, so the socket is kept; not when the peer was elsewhere, or still sends."""
    assert look(line(A, B, 8, 11), line(B, A, 5, 0), owned=(11,)) == {11: True}
    assert look(line(A, B, 8, 11), owned=(11,)) == {11: True}
    assert look(line(("10.0.0.5", 4000), SERVER, 8, 11), owned=(11,)) == {11: True}
    assert look(line(SERVER, CLIENT, 8, 11), owned=(11,)) == {11: False}
    assert look(line(A, B, 1, 11), line(B, A, 4, 0), owned=(11,)) == {11: False}


@given(st.lists(st.tuples(st.binary(max_size=50), st.binary(max_size=50), st.booleans()), max_size=5))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, queues: list[tuple[bytes, bytes, bool]]) -> None:
    """Connections with a stream and without, and their queues."""
    folder = tmp_path_factory.mktemp("criu")
    some = tuple(
        replace(ONE, fd=number, stream=replace(STREAM, received=received, queued=queued) if saved else None)
        for number, (received, queued, saved) in enumerate(queues)
    )
    write_connections(folder, some)
    assert parse_connections((folder / FILE).read_bytes()) == some


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", Code.IMAGE_CORRUPT),
        (b"SMRTCP01", Code.IMAGE_CORRUPT),
        (b"SMRTCP02\2\0\0\0[]", Code.IMAGE_VERSION),
        (b"SMRTCP01\xff\0\0\0[]", Code.IMAGE_CORRUPT),
        (b'SMRTCP01\3\0\0\0{"a', Code.IMAGE_CORRUPT),
        (b"SMRTCP01\3\0\0\0[1]", Code.IMAGE_CORRUPT),
    ],
)
def test_a_file_that_is_none(data: bytes, code: Code) -> None:
    """Whatever is wrong with it is an error of the image."""
    with pytest.raises(SmrError) as caught:
        parse_connections(data)
    assert caught.value.code is code


def test_queues_that_are_cut(tmp_path: Path) -> None:
    """A file that ends too soon is not read as a shorter stream."""
    write_connections(tmp_path, [replace(ONE, stream=replace(STREAM, received=b"hello"))])
    with pytest.raises(SmrError) as caught:
        parse_connections((tmp_path / FILE).read_bytes()[:-1])
    assert caught.value.code is Code.IMAGE_CORRUPT


SAVED = replace(CONFIG, tcp="established", connections=Connections(outer=1, saved=1, addresses=("10.0.0.5",)))
OWN = parse_spec({"linux": {"namespaces": [{"type": "network", "path": "/run/netns/x"}]}})
LATER = parse_spec({"linux": {"namespaces": [{"type": "network"}]}})


@pytest.mark.parametrize(
    ("config", "spec", "here", "asked", "chosen"),
    [
        (CONFIG, OWN, "10.0.0.5", Tcp.CLOSE, Tcp.CLOSE),
        (CONFIG, OWN, "10.0.0.5", Tcp.AUTO, Tcp.CLOSE),
        (CONFIG, OWN, "10.0.0.5", Tcp.ESTABLISHED, Code.UNSUPPORTED),
        (SAVED, OWN, "10.0.0.5", Tcp.CLOSE, Tcp.CLOSE),
        (SAVED, OWN, "10.0.0.5", Tcp.AUTO, Tcp.ESTABLISHED),
        (SAVED, OWN, "10.0.0.5", Tcp.ESTABLISHED, Tcp.ESTABLISHED),
        (SAVED, OWN, "10.0.0.6", Tcp.AUTO, Tcp.CLOSE),
        (SAVED, OWN, "10.0.0.6", Tcp.ESTABLISHED, Code.NETWORK_FAILED),
        (SAVED, LATER, "", Tcp.ESTABLISHED, Tcp.ESTABLISHED),
        (replace(CONFIG, tcp="established", addresses=("10.0.0.5",)), OWN, "10.0.0.6", Tcp.AUTO, Tcp.CLOSE),
        (replace(CONFIG, tcp="established", addresses=("10.0.0.5",)), OWN, "10.0.0.5", Tcp.AUTO, Tcp.ESTABLISHED),
    ],
)
def test_mode(
    monkeypatch: pytest.MonkeyPatch, config: CheckpointConfig, spec: Spec, here: str, asked: Tcp, chosen: Tcp | Code
) -> None:
    """auto is established where that is possible; established where it is not is an error that says why."""
    monkeypatch.setattr(mode.network, "addresses_of_namespace", lambda _: (here,))
    if isinstance(chosen, Tcp):
        assert mode.choose(config, spec, asked) is chosen
        return
    with pytest.raises(SmrError) as caught:
        mode.choose(config, spec, asked)
    assert caught.value.code is chosen


@pytest.mark.parametrize(
    "change",
    [
        {"local": ("10.0.0.5; flush ruleset", 80, 0)},
        {"remote": ("fe80::1%x } flush", 80, -1)},
        {"fd": -1},
        {"pid": "1"},
        {"stream": replace(STREAM, in_seq=1 << 32)},
        {"stream": replace(STREAM, window=(1, 2))},
        {"stream": replace(STREAM, mss="large")},
    ],
    ids=str,
)
def test_values_that_are_none(tmp_path: Path, change: dict[str, object]) -> None:
    """They go to the kernel and to nft, as root: what is no address, no port, no number is an error of the image."""
    write_connections(tmp_path, [replace(ONE, **change)])  # type: ignore[arg-type]
    with pytest.raises(SmrError) as caught:
        parse_connections((tmp_path / FILE).read_bytes())
    assert caught.value.code is Code.IMAGE_CORRUPT


def test_ends_as_packets_have_them() -> None:
    """IPv4 in IPv6 is IPv4, and a scope is no part of an address."""
    assert plain(("::ffff:10.0.0.5", 80, 0)) == ("10.0.0.5", 80)
    assert plain(("fe80::1%eth0", 80, 2)) == ("fe80::1", 80)


@pytest.mark.parametrize(("fallback", "released"), [(Fallback.COLD, [7]), (Fallback.FAIL, [])])
def test_packets_are_held_for_another_try(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fallback: Fallback, released: list[int]
) -> None:
    """A restore that fails may be tried again; a container that starts cold must not have its clients wait for nothing."""
    unlocked: list[int] = []
    monkeypatch.setattr(connections, "read_connections", lambda _: (replace(ONE, stream=STREAM), replace(ONE, fd=8)))
    monkeypatch.setattr(lock, "unlock", lambda found, _: unlocked.extend(one.fd for one in found))
    image = type("FakeImage", (), {"config": SAVED})
    asked = Annotations(restore="a", fallback=fallback)
    with pytest.raises(OSError, match="CRIU"), mode.held(image, OWN, asked, None, tmp_path):  # type: ignore[arg-type]
        raise OSError("CRIU")
    assert unlocked == released


def test_elements_of_the_lock() -> None:
    """As packets of the other end have their addresses and ports; each family has its set."""
    six = replace(ONE, local=("fd00::5", 80, 0), remote=("fd00::9", 4000, 0))
    mapped = replace(ONE, local=("::ffff:10.0.0.5", 80, 0), remote=("::ffff:10.0.0.9", 4001, 0))
    assert lock._elements([ONE, six, mapped]) == {
        "held4": ["10.0.0.9 . 4000 . 10.0.0.5 . 80", "10.0.0.9 . 4001 . 10.0.0.5 . 80"],
        "held6": ["fd00::9 . 4000 . fd00::5 . 80"],
    }


def test_a_node_without_nft(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing can be held there, which is said; nothing is run."""
    monkeypatch.setattr(lock.shutil, "which", lambda _: None)
    assert "nft" in lock.lock([ONE], tmp_path)
    lock.unlock([ONE], tmp_path)
    assert lock.lock([], tmp_path) == ""


def test_where_inner_connections_go() -> None:
    """To the address that took the place of theirs, where that is clear; else to loopback, since both ends go there."""
    moved = {"10.0.0.5": "10.0.0.6"}
    assert revive._moved(("10.0.0.5", 80, 0), ("10.0.0.6",), moved) == ("10.0.0.6", 80, 0)
    assert revive._moved(("::ffff:10.0.0.5", 80, 0), ("10.0.0.6",), moved) == ("::ffff:10.0.0.6", 80, 0)
    assert revive._moved(("fd00::5", 80, 0), ("10.0.0.6",), moved) == ("::1", 80, 0)
    assert revive._moved(("127.0.0.1", 80, 0), (), {}) == ("127.0.0.1", 80, 0)
    assert revive._moved(("10.0.0.5", 80, 0), ("10.0.0.5",), {}) == ("10.0.0.5", 80, 0)
