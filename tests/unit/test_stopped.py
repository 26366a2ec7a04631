"""Stopped processes at a checkpoint on cgroup v1: found, and never signalled when they are gone."""

from __future__ import annotations

import signal

import pytest

from smr.shim import stopped
from smr.shim.procs import Process

TREE = [Process(pid=10, ns_pid=1, state="S"), Process(pid=11, ns_pid=2, state="T"), Process(pid=12, ns_pid=3, state="t")]


@pytest.mark.parametrize(("version", "pids"), [("v1", [11]), ("v2", [])])
def test_stopped_ones_on_v1_alone(monkeypatch: pytest.MonkeyPatch, version: str, pids: list[int]) -> None:
    """By state T; one that is traced (t) is not ours to wake, and v2 attaches to any."""
    monkeypatch.setattr(stopped.cgroups, "version", lambda: version)
    monkeypatch.setattr(stopped.procs, "tree", lambda _: TREE)
    assert [process.pid for process in stopped.in_the_way(10)] == pids


def test_one_that_is_gone_hinders_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been killed meanwhile."""
    sent: list[tuple[int, int]] = []

    def kill(pid: int, number: int) -> None:
        if pid == 10:
            raise ProcessLookupError
        sent.append((pid, number))

    monkeypatch.setattr(stopped.os, "kill", kill)
    stopped.send(TREE, signal.SIGSTOP)
    assert sent == [(11, signal.SIGSTOP), (12, signal.SIGSTOP)]
