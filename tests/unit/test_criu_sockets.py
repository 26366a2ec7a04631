"""Sockets in CRIU's files.img: what they need of a network, and how they are given another."""

from __future__ import annotations

import struct
from ipaddress import ip_address
from pathlib import Path

import pytest

from smr.images import criu_netns, criu_sockets
from smr.images.criu_files import read_messages, write_messages
from smr.images.socket_move import Move, SocketFacts
from smr.proto.criu import sockets_pb2
from smr.proto.errors import Code, SmrError
from smr.shim.addresses import bind_failure

MAGIC = struct.pack("<II", 0x54564319, 0x56303138)
TCP, UDP, LISTEN, CLOSED, ESTABLISHED = 6, 17, 10, 7, 1


def words(address: str) -> tuple[int, ...]:
    """An address as CRIU keeps it."""
    packed = ip_address(address).packed
    return struct.unpack(f"={len(packed) // 4}I", packed)


def inet(
    number: int,
    own: str,
    port: int = 80,
    *,
    peer: str = "",
    peer_port: int = 0,
    proto: int = TCP,
    state: int = LISTEN,
    **more: str,
) -> sockets_pb2.FileEntry:
    """An inet socket; `more`: ifname, device."""
    entry = sockets_pb2.FileEntry(type=4, id=number)
    other = peer or ("::" if ":" in own else "0.0.0.0")
    entry.isk.CopyFrom(
        sockets_pb2.InetSkEntry(
            id=number,
            family=10 if ":" in own else 2,
            type=1,
            proto=proto,
            state=state,
            src_port=port,
            dst_port=peer_port,
            src_addr=words(own),
            dst_addr=words(other),
            opts=sockets_pb2.SkOptsEntry(**({"so_bound_dev": more["device"]} if "device" in more else {})),
        )
    )
    if "ifname" in more:
        entry.isk.ifname = more["ifname"]
    return entry


def packet(number: int, index: int) -> sockets_pb2.FileEntry:
    """A packet socket, member of a list of its interface."""
    entry = sockets_pb2.FileEntry(type=10, id=number)
    entry.psk.CopyFrom(sockets_pb2.PacketSockEntry(id=number, ifindex=index, mclist=[sockets_pb2.PacketMclist(index=index)]))
    return entry


def dump(folder: Path, *entries: sockets_pb2.FileEntry) -> Path:
    """A dump with these files."""
    write_messages(folder / "files.img", MAGIC, list(entries))
    return folder


def sockets(folder: Path) -> dict[int, sockets_pb2.FileEntry]:
    """What the dump has now."""
    return {entry.id: entry for entry in read_messages(folder / "files.img", sockets_pb2.FileEntry)}


def text(found: list[int]) -> str:
    """An address of an entry."""
    return str(ip_address(struct.pack(f"={len(found)}I", *found)))


def anywhere(own: str, peer: str) -> bool:
    """Every peer can be reached."""
    return True


def test_what_sockets_need(tmp_path: Path) -> None:
    """Addresses of their own, in every form; not what every host has, nor those of TCP connections, which CRIU does not bind."""
    dump(
        tmp_path,
        inet(1, "10.88.0.2"),
        inet(2, "::ffff:10.88.0.3"),
        inet(3, "fe80::1", ifname="eth0"),
        inet(4, "fd00::2", proto=UDP, state=CLOSED),
        inet(5, "0.0.0.0"),
        inet(6, "::1"),
        inet(7, "127.0.0.1", proto=UDP, peer="127.0.0.1", peer_port=5),
        inet(8, "10.88.0.9", peer="10.1.1.1", peer_port=443, state=ESTABLISHED),
        inet(9, "10.88.0.10", proto=UDP, peer="10.88.0.1", peer_port=53, state=ESTABLISHED),
        inet(10, "0.0.0.0", device="net1"),
        inet(11, "224.0.0.251", proto=UDP, state=CLOSED),
        inet(12, "10.88.0.12", port=0, state=CLOSED),
        packet(13, 7),
        packet(14, 99),
    )
    facts = criu_sockets.facts(tmp_path, {7: "eth7"})
    assert facts.addresses == ("10.88.0.2", "10.88.0.3", "fd00::2", "fe80::1%eth0")
    assert facts.devices == ("#99", "eth0", "eth7", "net1")
    assert facts.peers == ("10.88.0.1:53",)
    assert facts.ipv6


def test_a_dump_without_files(tmp_path: Path) -> None:
    """No socket, no need."""
    assert criu_sockets.facts(tmp_path, {}) == SocketFacts()


def test_sockets_move(tmp_path: Path) -> None:
    """Each in its own form; what has no successor stays as it was, and fields that we do not know are kept."""
    unknown = bytes((20 << 3 & 0x7F | 0x80, 20 << 3 >> 7, 5))  # field 20, a varint
    first = inet(1, "10.88.0.2")
    first.isk.MergeFromString(unknown)
    dump(
        tmp_path,
        first,
        inet(2, "::ffff:10.88.0.2"),
        inet(3, "fe80::1", ifname="eth0"),
        inet(4, "0.0.0.0", device="eth0"),
        packet(5, 2),
    )
    to = Move(addresses={"10.88.0.2": "10.99.0.7", "fe80::1%eth0": "fe80::9%net0"}, devices={"eth0": "net0"}, indexes={2: 8})
    assert criu_sockets.move(tmp_path, to, anywhere) == (5, ())
    found = sockets(tmp_path)
    assert (text(found[1].isk.src_addr), text(found[2].isk.src_addr)) == ("10.99.0.7", "::ffff:a63:7")
    assert (text(found[3].isk.src_addr), found[3].isk.ifname) == ("fe80::9", "net0")
    assert found[4].isk.opts.so_bound_dev == "net0"
    assert (found[5].psk.ifindex, found[5].psk.mclist[0].index) == (8, 8)
    assert unknown in found[1].isk.SerializeToString()


def test_the_same_network_writes_nothing(tmp_path: Path) -> None:
    """Then the file is CRIU's own, byte for byte."""
    dump(tmp_path, inet(1, "10.88.0.2"))
    before = (tmp_path / "files.img").stat().st_mtime_ns
    assert criu_sockets.move(tmp_path, Move(devices={"eth0": "eth0"}), anywhere) == (0, ())
    assert (tmp_path / "files.img").stat().st_mtime_ns == before


def test_a_peer_of_its_own_host_moves(tmp_path: Path) -> None:
    """A UDP socket that is connected to an address of the container itself."""
    dump(tmp_path, inet(1, "10.88.0.2", proto=UDP, peer="10.88.0.2", peer_port=9, state=ESTABLISHED))
    criu_sockets.move(tmp_path, Move(addresses={"10.88.0.2": "10.99.0.7"}), anywhere)
    assert text(sockets(tmp_path)[1].isk.dst_addr) == "10.99.0.7"


def test_a_peer_that_cannot_be_reached_is_taken(tmp_path: Path) -> None:
    """CRIU would fail to connect it; the socket keeps its port."""
    asked: list[tuple[str, str]] = []

    def nowhere(own: str, peer: str) -> bool:
        asked.append((own, peer))
        return False

    dump(
        tmp_path,
        inet(1, "10.88.0.2", 5000, proto=UDP, peer="10.88.0.1", peer_port=53, state=ESTABLISHED),
        inet(2, "fe80::1", 5001, proto=UDP, peer="fe80::2", peer_port=53, ifname="eth0"),
        inet(3, "10.88.0.2", 5002, peer="10.1.1.1", peer_port=443, state=ESTABLISHED),
    )
    to = Move(addresses={"10.88.0.2": "10.99.0.7"})
    assert criu_sockets.move(tmp_path, to, nowhere) == (3, ("10.88.0.1:53", "[fe80::2]:53"))
    assert asked == [("10.99.0.7", "10.88.0.1"), ("fe80::1%eth0", "fe80::2%eth0")]
    found = sockets(tmp_path)
    assert (found[1].isk.src_port, found[1].isk.dst_port, text(found[1].isk.src_addr)) == (5000, 0, "0.0.0.0")
    assert (found[2].isk.dst_port, found[2].isk.ifname) == (0, "")
    assert found[3].isk.dst_port == 443


def test_which_socket_an_id_of_criu_is(tmp_path: Path) -> None:
    """CRIU's log names sockets by number only."""
    dump(tmp_path, inet(1, "10.88.0.2"), inet(2, "::", 53, proto=UDP))
    assert [criu_sockets.at_port(tmp_path, number) for number in (1, 2, 3)] == ["TCP 10.88.0.2:80", "UDP [::]:53", ""]


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("Can't bind inet socket (id 2): Address already in use", "UDP [::]:53 of the checkpoint cannot be had", "ss -ltunp"),
        ("Can't bind inet socket (id 1): Cannot assign requested address", "TCP 10.88.0.2:80 of the", "smr.addresses"),
        ("Can't create inet socket: Address family not supported by protocol", "a socket of the checkpoint", "ipv6.disable"),
        ("Can't connect inet socket back: Network is unreachable", "in this network: Network is unreachable", ""),
    ],
)
def test_what_criu_could_not_bind(tmp_path: Path, line: str, message: str, hint: str) -> None:
    """Its log has numbers; the error has addresses."""
    dump(tmp_path, inet(1, "10.88.0.2"), inet(2, "::", 53, proto=UDP))
    error = bind_failure(f"(00.07)   1: Error (criu/sk-inet.c:1059): inet: {line}\n(00.08) Error: more\n", tmp_path)
    assert error is not None
    assert error.code is Code.NETWORK_FAILED
    assert message in error.message
    assert hint in error.hint
    assert bind_failure("(00.07) Error (criu/mount.c:1): no", tmp_path) is None


@pytest.mark.parametrize("damage", [b"", MAGIC + b"\xff\xff\xff\x7f", MAGIC + b"\x02\0\0\0\x08"])
def test_a_file_that_does_not_parse(tmp_path: Path, damage: bytes) -> None:
    """It is named, and nothing is changed."""
    (tmp_path / "files.img").write_bytes(damage)
    with pytest.raises(SmrError) as caught:
        criu_sockets.facts(tmp_path, {})
    assert caught.value.code is Code.IMAGE_CORRUPT
    assert "files.img" in caught.value.message


def test_an_address_of_no_length(tmp_path: Path) -> None:
    """Two words are no address."""
    entry = inet(1, "10.88.0.2")
    entry.isk.src_addr.append(1)
    dump(tmp_path, entry)
    with pytest.raises(SmrError, match="an address of 2 words"):
        criu_sockets.facts(tmp_path, {})


# ids-1.img of CRIU 4.2: the network namespace is the tenth.
IDS = bytes.fromhex("19435654302043541800000008021002180220022805300a380b400c480d5007580860050a0b")[:36]


def test_a_namespace_from_outside(tmp_path: Path) -> None:
    """Only once, and back."""
    (tmp_path / "ids-1.img").write_bytes(IDS)
    assert criu_netns.take_from_outside(tmp_path, 1)
    written = (tmp_path / "netns-10.img").read_bytes()
    assert written == struct.pack("<III", 0x54564319, 0x55933752, 14) + b"\x42\x0cextRootNetNS"
    assert not criu_netns.take_from_outside(tmp_path, 1)
    assert criu_netns.make_inside(tmp_path, 1)
    assert not (tmp_path / "netns-10.img").exists()
    assert not criu_netns.make_inside(tmp_path, 1)


def test_a_namespace_with_contents_becomes_one_from_outside(tmp_path: Path) -> None:
    """crun dumps links and addresses of a private one, which are not wanted."""
    (tmp_path / "ids-1.img").write_bytes(IDS)
    (tmp_path / "netns-10.img").write_bytes(struct.pack("<III", 0x54564319, 0x55933752, 2) + b"\x08\x01")
    assert criu_netns.take_from_outside(tmp_path, 1)
    assert (tmp_path / "netns-10.img").read_bytes().endswith(criu_netns.KEY)


def test_a_dump_of_another_first_process(tmp_path: Path) -> None:
    """Without its ids there is nothing to edit."""
    (tmp_path / "ids-1.img").write_bytes(IDS)
    assert not criu_netns.take_from_outside(tmp_path, 7)
    assert not criu_netns.make_inside(tmp_path, 7)


def test_ids_that_do_not_parse(tmp_path: Path) -> None:
    """The file is named."""
    (tmp_path / "ids-1.img").write_bytes(IDS[:-1] + b"\x80")
    with pytest.raises(SmrError) as caught:
        criu_netns.take_from_outside(tmp_path, 1)
    assert caught.value.code is Code.IMAGE_CORRUPT
    assert "ids-1.img" in caught.value.message
