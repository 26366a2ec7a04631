"""What a restored tree takes of its new container's spec, what is said of the rest, and the images that are edited for it."""

from __future__ import annotations

import os
import resource
import struct
from pathlib import Path

import pytest

from smr.images.creds import edit_creds
from smr.images.criu_files import read_message
from smr.proto.criu import identity_pb2
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec, parse_spec
from smr.shim import identity, rights, userns
from smr.shim.procs import Process
from tests.unit.test_criu_needs import MAGIC, write

CAPABILITIES = {"bounding": ["CAP_KILL", "CAP_NET_RAW"]}


def spec(process: dict[str, object] | None = None, linux: dict[str, object] | None = None, **top: object) -> Spec:
    """A spec with those members."""
    return parse_spec({"process": process or {}, "linux": linux or {}, **top})


def limit(kind: str, soft: int, hard: int) -> dict[str, object]:
    """An entry of `process.rlimits`."""
    return {"type": f"RLIMIT_{kind}", "soft": soft, "hard": hard}


class Tree:
    """Limits and scores of two processes, as the kernel would keep them; 8 has changed its soft limit for cores itself."""

    def __init__(self) -> None:
        self.limits = {pid: {resource.RLIMIT_NOFILE: (1000, 2000), resource.RLIMIT_CORE: (50, 200)} for pid in (7, 8)}
        self.limits[8][resource.RLIMIT_CORE] = (100, 200)
        self.fixed: set[int] = set()

    def prlimit(self, pid: int, number: int, value: tuple[int, int] | None = None) -> tuple[int, int]:
        """As resource.prlimit does."""
        if value is not None and number in self.fixed:
            raise ValueError("not allowed to raise maximum limit")
        now = self.limits[pid][number]
        self.limits[pid][number] = value or now
        return now


@pytest.fixture
def tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tree:
    """A tree in place of the kernel's."""
    there = Tree()
    monkeypatch.setattr(resource, "prlimit", there.prlimit)
    processes = [Process(pid=pid, ns_pid=pid, state="T") for pid in (7, 8)]
    monkeypatch.setattr(identity.procs, "tree", lambda _: processes)
    monkeypatch.setattr(identity, "_oom_score", lambda pid: tmp_path / str(pid))
    return there


def test_specs_that_agree() -> None:
    """No difference, no warning; empty members and the order of groups mean nothing."""
    one = spec({"user": {"uid": 0, "gid": 0, "additionalGids": [1, 2]}, "cwd": "/"}, {"seccomp": None})
    other = spec({"user": {"uid": 0, "gid": 0, "additionalGids": [2, 1], "umask": None}, "cwd": "/", "scheduler": {}})
    assert list(identity.differences(one, other)) == []


@pytest.mark.parametrize(
    ("process", "linux", "words"),
    [
        ({"user": {"uid": 7, "gid": 0}}, {}, ("user", "uid 1000", "uid 7")),
        ({"cwd": "/srv"}, {}, ("working directory", "/srv")),
        ({"scheduler": {"policy": "SCHED_BATCH"}}, {}, ("scheduling", "SCHED_BATCH")),
        ({}, {"seccomp": {"defaultAction": "SCMP_ACT_KILL"}}, ("seccomp", "of other contents")),
        ({}, {"seccomp": None}, ("seccomp", "(none)")),
        ({}, {"timeOffsets": {"monotonic": {"secs": 5}}}, ("clocks",)),
        ({}, {"personality": {"domain": "LINUX32"}}, ("personality",)),
    ],
)
def test_what_only_a_process_could_change(process: dict[str, object], linux: dict[str, object], words: tuple[str, ...]) -> None:
    """Each difference is one warning with both values."""
    old_process: dict[str, object] = {"user": {"uid": 1000, "gid": 0}, "cwd": "/"}
    old_linux: dict[str, object] = {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}}
    found = list(identity.differences(spec(old_process, old_linux), spec(old_process | process, old_linux | linux)))
    assert len(found) == 1
    assert all(word in found[0] for word in words), found


def test_limits_are_given(tree: Tree) -> None:
    """What a process had of the old container becomes the new one's; what it has set itself stays, below the new hard limit."""
    old = spec({"rlimits": [limit("NOFILE", 1000, 2000), limit("CORE", 50, 200)]})
    new = spec({"rlimits": [limit("NOFILE", 60, (1 << 64) - 1), limit("CORE", 50, 90), limit("FANTASY", 1, 2)]})
    (warning,) = identity.adopt(7, old, new)
    assert "RLIMIT_FANTASY" in warning
    assert tree.limits[7] == {resource.RLIMIT_NOFILE: (60, -1), resource.RLIMIT_CORE: (50, 90)}
    assert tree.limits[8] == {resource.RLIMIT_NOFILE: (60, -1), resource.RLIMIT_CORE: (90, 90)}


def test_limits_that_the_old_spec_had_not(tree: Tree) -> None:
    """Then the first process says what it was."""
    assert identity.adopt(7, spec(), spec({"rlimits": [limit("CORE", 1, 150)]})) == []
    assert tree.limits[7][resource.RLIMIT_CORE] == (1, 150)
    assert tree.limits[8][resource.RLIMIT_CORE] == (100, 150)


def test_limits_that_cannot_be_given(tree: Tree) -> None:
    """A limit that may not grow is a warning with the reason, and the others are given all the same."""
    tree.fixed.add(resource.RLIMIT_NOFILE)
    new = spec({"rlimits": [limit("NOFILE", 1 << 20, 1 << 20), limit("CORE", 1, 2)]})
    (warning,) = identity.adopt(7, spec(), new)
    assert "RLIMIT_NOFILE" in warning
    assert "CAP_SYS_RESOURCE" in warning
    assert tree.limits[7][resource.RLIMIT_CORE] == (1, 2)


def test_oom_score(tree: Tree, tmp_path: Path) -> None:
    """The new one's, where the process had the old one's; one that cannot be written is a warning."""
    (tmp_path / "7").write_text("100\n")
    (tmp_path / "8").write_text("150\n")
    assert identity.adopt(7, spec({"oomScoreAdj": 100}), spec({"oomScoreAdj": 200})) == []
    assert [(tmp_path / pid).read_text().strip() for pid in ("7", "8")] == ["200", "150"]
    (tmp_path / "7").unlink()
    (warning,) = identity.adopt(7, spec({"oomScoreAdj": 100}), spec({"oomScoreAdj": 200}))
    assert "oom_score_adj" in warning


@pytest.mark.parametrize(
    "key", ["net.ipv4.ip_forward", "kernel.sem", "kernel.domainname", "kernel.core_pattern", "vm.swappiness", "net/../kernel/x"]
)
def test_sysctls_of_the_machine_are_not_touched(key: str) -> None:
    """Without a namespace of the container's own for it, a sysctl is not written: it is the node's."""
    (warning,) = identity.adopt(os.getpid(), spec(), spec(linux={"sysctl": {key: "1"}}))
    assert key in warning


def test_names_of_sysctls() -> None:
    """Dots or slashes; a name of an interface may hold the other. Nothing climbs out of /proc/sys."""
    for key in ("net.ipv4.conf.eth0/1.mtu", "net/ipv4/conf/eth0.1/mtu"):
        assert identity._path(key) == Path("/proc/sys/net/ipv4/conf/eth0.1/mtu")
    for key in ("net/../kernel/core_pattern", "net...kernel", "net//ipv4"):
        with pytest.raises(OSError, match="no such sysctl"):
            identity._path(key)


def creds(**members: object) -> identity_pb2.CoreEntry:
    """A thread's image."""
    ids = dict.fromkeys(("uid", "gid", "euid", "egid", "suid", "sgid", "fsuid", "fsgid"), 0)
    entry = identity_pb2.CredsEntry(**ids, **members)  # type: ignore[arg-type]
    return identity_pb2.CoreEntry(thread_core=identity_pb2.ThreadCoreEntry(creds=entry))


def test_rights_are_taken_away(tmp_path: Path) -> None:
    """Capabilities that the new spec lacks leave every set of every thread, no_new_privs is set; unknown fields stay."""
    everything = [0xFFFFFFFF, 0x1FF]
    sets = dict.fromkeys(("cap_inh", "cap_prm", "cap_eff", "cap_bnd", "cap_amb"), everything)
    for thread in (1, 2):
        core = creds(**sets, lsm_profile="docker-default")
        unknown = struct.pack("<BB", 1 << 3, 1)  # mtype, field 1
        (tmp_path / f"core-{thread}.img").write_bytes(
            MAGIC + struct.pack("<I", len(core.SerializeToString()) + 2) + unknown + core.SerializeToString()
        )
    old = spec({"capabilities": {"bounding": ["CAP_KILL", "CAP_SYSLOG", "CAP_BPF"]}})
    new = spec({"capabilities": {"bounding": ["CAP_KILL", "CAP_NET_ADMIN"]}, "noNewPrivileges": True})
    (warning,) = rights.restrict(tmp_path, old, new)
    assert "NET_ADMIN" in warning
    for thread in (1, 2):
        data = (tmp_path / f"core-{thread}.img").read_bytes()
        found = read_message(tmp_path / f"core-{thread}.img", identity_pb2.CoreEntry).thread_core.creds
        for name in sets:
            assert list(getattr(found, name)) == [0xFFFFFFFF, 0x1FF & ~(1 << 2) & ~(1 << 7)]
        assert found.no_new_privs == 1
        assert found.lsm_profile == "docker-default"
        assert data[:8] == MAGIC
        assert unknown in data
    assert edit_creds(tmp_path, unlabelled=True) == 2
    assert edit_creds(tmp_path, unlabelled=True) == 0


def test_rights_that_agree_cost_nothing(tmp_path: Path) -> None:
    """No image is read: this one would not parse."""
    (tmp_path / "core-1.img").write_bytes(b"garbage")
    same = spec({"capabilities": CAPABILITIES, "noNewPrivileges": True})
    assert list(rights.restrict(tmp_path, same, same)) == []
    with pytest.raises(SmrError) as caught:
        list(rights.restrict(tmp_path, same, spec({"noNewPrivileges": True})))
    assert caught.value.code is Code.IMAGE_CORRUPT
    assert "core-1.img" in caught.value.message


def mapped(*lines: tuple[int, int, int]) -> Spec:
    """A spec with a user namespace of that map."""
    entries = [{"containerID": inside, "hostID": outside, "size": size} for inside, outside, size in lines]
    return spec(linux={"namespaces": [{"type": "user"}], "uidMappings": entries, "gidMappings": entries})


def test_user_namespaces(tmp_path: Path) -> None:
    """The new map takes the old one's place in the image, and ids of files follow; nobody's stay."""
    old, new = mapped((0, 1000, 10), (10, 5000, 5)), mapped((0, 2000, 15))
    userns.check(old, new)
    entry = identity_pb2.UsernsEntry()
    entry.uid_map.add(first=0, lower_first=1000, count=10)
    write(tmp_path / "userns-9.img", entry)
    userns.adapt(tmp_path, old, new)
    written = read_message(tmp_path / "userns-9.img", identity_pb2.UsernsEntry)
    assert [(one.first, one.lower_first, one.count) for one in written.gid_map] == [(0, 2000, 15)]
    assert [(one.first, one.lower_first, one.count) for one in written.uid_map] == [(0, 2000, 15)]
    owners = userns.shifts(old, new)
    assert owners is not None
    assert [owners[0](uid) for uid in (1000, 1009, 5004, 0, 1010)] == [2000, 2009, 2014, 0, 1010]
    assert userns.shifts(old, old) is None
    assert userns.shifts(spec(), spec()) is None


@pytest.mark.parametrize("lines", [[(0, 2000, 14)], [(1, 2000, 100)], [(0, 2000, 10), (11, 2020, 10)]])
def test_user_namespaces_that_are_too_small(lines: list[tuple[int, int, int]]) -> None:
    """A map without ids that processes may have: refused, with the id and both maps."""
    with pytest.raises(SmrError) as caught:
        userns.check(mapped((0, 1000, 10), (10, 5000, 5)), mapped(*lines))
    assert caught.value.code is Code.NAMESPACE_MISMATCH
    assert "0:1000:10, 10:5000:5" in caught.value.message
    assert caught.value.hint
