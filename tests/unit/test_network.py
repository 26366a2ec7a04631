"""Addresses of a network namespace, from what /proc/net prints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from smr.shim import network

FIB_TRIE = """\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 10.88.0.0/16 2 0 2
        +-- 10.88.0.0/29 2 0 2
           |-- 10.88.0.0
              /16 link UNICAST
           |-- 10.88.0.5
              /32 host LOCAL
        |-- 10.88.255.255
           /32 link BROADCAST
     +-- 127.0.0.0/8 2 0 2
        |-- 127.0.0.1
           /32 host LOCAL
Local:
  +-- 10.88.0.0/29 2 0 2
     |-- 10.88.0.5
        /32 host LOCAL
     |-- 192.168.1.2
        /32 host LOCAL
"""

IF_INET6 = """\
00000000000000000000000000000001 01 80 10 80       lo
fd000000000000000000000000000005 02 40 00 80     eth0
fe800000000000000042acfffe110002 02 40 20 80     eth0
"""

_HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
little = pytest.mark.skipif(sys.byteorder != "little", reason="/proc/net prints words of this machine's byte order")


def sockets(*rows: tuple[str, str]) -> str:
    """A table of /proc/net with these local addresses and states."""
    return _HEAD + "".join(f"   {n}: {local} 00000000:0000 {state} 00000000:00000000\n" for n, (local, state) in enumerate(rows))


def test_ipv4_addresses_once_and_without_loopback() -> None:
    """Local leaves only: no networks, no broadcasts; the second table repeats the first."""
    assert network.parse_fib_trie(FIB_TRIE) == ["10.88.0.5", "192.168.1.2"]
    assert network.parse_fib_trie("") == []


def test_ipv6_addresses_without_loopback() -> None:
    """By interface, link-local ones included."""
    assert network.parse_if_inet6(IF_INET6) == ["fd00::5", "fe80::42:acff:fe11:2"]
    assert network.parse_if_inet6("") == []


@little
def test_tcp_listeners_count_and_connections_do_not() -> None:
    """0A listens; 01 is a connection, 06 waits to end."""
    text = sockets(("0500580A:1F90", "0A"), ("0600580A:1F90", "01"), ("0700580A:1F90", "06"))
    assert list(network.parse_bound(text, listening_only=True)) == ["10.88.0.5"]


@little
def test_udp_sockets_count_connected_or_not() -> None:
    """A connected one (01) keeps its local address too."""
    text = sockets(("0500580A:0035", "07"), ("0600580A:0035", "01"))
    assert list(network.parse_bound(text, listening_only=False)) == ["10.88.0.5", "10.88.0.6"]


@little
def test_addresses_that_every_host_has_do_not_count() -> None:
    """Wildcard, loopback and multicast, IPv4, IPv6 and IPv4 in IPv6 form."""
    text = sockets(
        ("00000000:1F90", "0A"),
        ("0100007F:1F90", "0A"),
        ("FB0000E0:14E9", "0A"),
        ("0" * 32 + ":1F90", "0A"),
        ("0" * 24 + "01000000:1F90", "0A"),
        ("0000000000000000FFFF00000100007F:1F90", "0A"),
        ("0000000000000000FFFF000000000000:1F90", "0A"),
    )
    assert list(network.parse_bound(text, listening_only=True)) == []


@little
def test_ipv4_in_ipv6_form_is_the_ipv4_address() -> None:
    """A socket of Java or Go bound to ::ffff:10.88.0.5."""
    text = sockets(("0000000000000000FFFF00000500580A:1F90", "0A"), ("000000FD000000000000000005000000:1F90", "0A"))
    assert list(network.parse_bound(text, listening_only=True)) == ["10.88.0.5", "fd00::5"]


def test_empty_table() -> None:
    """Only the head, or no such file in this kernel."""
    assert list(network.parse_bound(_HEAD, listening_only=True)) == []
    assert list(network.parse_bound("", listening_only=True)) == []


def test_dead_process_has_no_addresses() -> None:
    """Its files are gone; that is no error here."""
    assert not Path("/proc/8388608").exists()
    assert network.addresses(8388608) == ()
    assert network.bound_addresses(8388608) == ()
