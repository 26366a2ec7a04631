"""Addresses of a network namespace, from what /proc/net prints."""

from __future__ import annotations

from pathlib import Path

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


def test_ipv4_addresses_once_and_without_loopback() -> None:
    """Local leaves only: no networks, no broadcasts; the second table repeats the first."""
    assert network.parse_fib_trie(FIB_TRIE) == ["10.88.0.5", "192.168.1.2"]
    assert network.parse_fib_trie("") == []


def test_ipv6_addresses_without_loopback() -> None:
    """By interface, link-local ones included."""
    assert network.parse_if_inet6(IF_INET6) == ["fd00::5", "fe80::42:acff:fe11:2"]
    assert network.parse_if_inet6("") == []


def test_dead_process_has_no_addresses() -> None:
    """Its files are gone; that is no error here."""
    assert not Path("/proc/8388608").exists()
    assert network.addresses(8388608) == ()
