"""Who a restored container is: clocks, limits, sysctls, rights, names of its new spec, on real runtimes."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from smr.proto.oci import Json
from tests.integration.outside import COMMAND, Outside
from tests.integration.runc import Runc

FAIL = {"smr.fallback": "fail"}


@pytest.fixture
def outside(restoring_runc: Runc) -> Iterator[Outside]:
    """A folder with a holder."""
    there = Outside(Path(tempfile.mkdtemp(dir=restoring_runc.path.parent)))
    yield there
    there.close()


def parts(spec: dict[str, object]) -> tuple[Json, Json]:
    """`process` and `linux` of a spec."""
    process, linux = spec["process"], spec["linux"]
    assert isinstance(process, dict)
    assert isinstance(linux, dict)
    return process, linux


@pytest.mark.parametrize("runc", ["runc", "runc-new", "crun-new-unified"], indirect=True)
def test_the_new_spec_counts(restoring_runc: Runc, outside: Outside) -> None:
    """Limits, OOM score, sysctls, names and fewer rights are those of the new container; the rest is said in warnings.

    Limits that a process set itself stay. Both clocks go on from where they were, and a sleep takes as long as it should.
    """
    runc = restoring_runc
    ahead_s = 1_000_000 if "runc-new" in str(runc.node.runtime) else 0  # as on a machine that runs for longer; runc 1.1 cannot

    def before(spec: dict[str, object]) -> None:
        outside.edit(spec)
        process, linux = parts(spec)
        process["rlimits"] = [
            {"type": "RLIMIT_NOFILE", "soft": 1500, "hard": 3000},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 4096},
        ]
        process["oomScoreAdj"] = 300
        process["noNewPrivileges"] = False
        had = ["CAP_KILL", "CAP_NET_RAW", "CAP_AUDIT_WRITE"]
        process["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), had)
        linux["sysctl"] = {"kernel.msgmax": "8000"}
        if ahead_s:
            namespaces = linux["namespaces"]
            assert isinstance(namespaces, list)
            namespaces.append({"type": "time"})
            linux["timeOffsets"] = {clock: {"secs": ahead_s} for clock in ("monotonic", "boottime")}

    def after(spec: dict[str, object]) -> None:
        outside.edit(spec)
        process, linux = parts(spec)
        process["rlimits"] = [
            {"type": "RLIMIT_NOFILE", "soft": 1200, "hard": 2400},
            {"type": "RLIMIT_CORE", "soft": 1024, "hard": 2048},
        ]
        process["oomScoreAdj"] = 400
        process["noNewPrivileges"] = True
        has = ["CAP_KILL", "CAP_AUDIT_WRITE", "CAP_NET_BIND_SERVICE"]
        process["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), has)
        linux["sysctl"] = {"kernel.msgmax": "9000", "net.ipv4.ip_unprivileged_port_start": "77", "net.core.somaxconn": "123"}
        linux["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW"}
        process["cwd"] = "/tmp"
        spec["hostname"] = "another"

    runc.create("source", runc.bundle("source", *COMMAND, edit=before))
    runc("start", "source")
    runc.ready("source")
    outside.begin(runc.pid("source"))
    first = outside.hear()
    runc.checkpoint("source", "identity:1")
    last = outside.hear()
    runc.remove("source")
    gone = time.monotonic()
    time.sleep(1)
    away_s = time.monotonic() - gone
    runc.create("again", runc.bundle("again", *COMMAND, annotations={"smr.restore": "identity:1", **FAIL}, edit=after))
    runc("start", "again")
    said = outside.hear()
    for clock, now in (("monotonic", time.monotonic()), ("boottime", time.clock_gettime(time.CLOCK_BOOTTIME))):
        assert first[clock] < said[clock] < now + ahead_s - away_s, clock  # the source ran on for a moment
    assert (first["kept"], first["wiped"]) == (1 << 17, 0)
    assert (said["kept"], said["wiped"]) == (1 << 17, 1 << 20)
    assert said["nofile"] == [1200, 2400]
    assert said["core"] == [7, 2048]  # the holder had set 7 itself
    assert said["nnp"] == "1"
    assert int(str(said["caps"]), 16) == int(str(said["effective"]), 16) == 1 << 5 | 1 << 29  # KILL and AUDIT_WRITE
    pid = runc.pid("again")
    assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "400"
    read = "cat /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/core/somaxconn; hostname"
    assert runc.exec("again", "sh", "-c", read).stdout.split() == ["9000", "77", "123", "another"]
    warnings = json.loads(runc.node.smr("inspect", "again", "--json").stdout)["warnings"]
    for words in ("NET_BIND_SERVICE", "seccomp filters are the checkpoint's", "working directory"):
        assert any(words in warning for warning in warnings), words
    sleeps = outside.hear(lambda heard: len(heard["sleeps"]) > len(last["sleeps"]) + 1)["sleeps"]
    assert min(sleeps) > 0.99
