"""The network namespace of a restore: what a spec asks for, and how its document is edited for the runtime."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smr.proto.errors import Code, SmrError
from smr.proto.oci import parse_spec
from smr.shim import interfaces, netns, oci_hooks
from smr.shim.netns import Kind, Network
from smr.shim.state import ContainerState, Record

ADD = {"path": "/opt/cni-hook", "args": ["cni-hook", "add"], "env": ["A=1", "B=x=y"], "timeout": 3}
GPU = {"path": "/usr/bin/nvidia-container-runtime-hook", "args": ["nvidia-container-runtime-hook", "prestart"]}
CTR = {"path": "/usr/bin/containerd", "args": ["containerd", "oci-hook", "--", "nvidia-container-cli", "configure"]}
END = {"path": "/opt/cni-hook", "args": ["cni-hook", "del"]}


def document(*namespaces: dict[str, str], **hooks: list[dict[str, object]]) -> dict[str, object]:
    """A spec."""
    return {"ociVersion": "1.1.0", "linux": {"namespaces": list(namespaces)}, "hooks": hooks}


def state(folder: Path, runtime: str = "/usr/bin/runc") -> ContainerState:
    """A container that is being restored."""
    (folder / "bundle").mkdir()
    (folder / "state").mkdir()
    return ContainerState(
        folder / "state", Record(id="c1", root="", bundle=str(folder / "bundle"), image="app:1", runtime=runtime)
    )


@pytest.mark.parametrize(
    ("namespaces", "kind"),
    [
        ([{"type": "pid"}], Kind.HOST),
        ([{"type": "network", "path": "/run/netns/x"}], Kind.GIVEN),
        ([{"type": "network"}], Kind.OWN),
        ([{"type": "network"}, {"type": "user"}], Kind.LATE),
        ([{"type": "network"}, {"type": "user", "path": "/proc/1/ns/user"}], Kind.OWN),
        ([{"type": "network", "path": "/run/netns/x"}, {"type": "user"}], Kind.GIVEN),
    ],
)
def test_what_a_spec_asks_for(namespaces: list[dict[str, str]], kind: Kind) -> None:
    """The host's, one that is there, a new one, a new one inside a new user namespace."""
    assert netns.kind_of(parse_spec(document(*namespaces))) is kind


def test_the_spec_is_edited_while_the_runtime_restores(tmp_path: Path) -> None:
    """The path is ours, hooks that have run are gone and others stay; afterwards it is the engine's, byte for byte."""
    container = state(tmp_path)
    before = document({"type": "pid"}, {"type": "network"}, prestart=[GPU], createRuntime=[ADD], poststop=[END])
    config = tmp_path / "bundle/config.json"
    config.write_text(json.dumps(before, indent=7))
    written = config.read_bytes()
    spec = parse_spec(before)
    run = [hook for hook in oci_hooks.hooks(before, *oci_hooks.BEFORE) if not hook.of_container]
    network = Network(kind=Kind.OWN, path=None, spec=spec, state=container, hooks_run=run)
    with network.in_spec():
        during = json.loads(config.read_bytes())
        assert container.record.undo_spec
        assert container.spec_backup.read_bytes() == written
    assert during["linux"]["namespaces"] == [{"type": "pid"}, {"type": "network", "path": str(container.path / "netns")}]
    assert during["hooks"] == {"prestart": [GPU], "createRuntime": [], "poststop": [END]}
    assert config.read_bytes() == written


def test_a_given_namespace_needs_no_edit(tmp_path: Path) -> None:
    """Nothing is written, and there is nothing to undo."""
    container = state(tmp_path)
    before = document({"type": "network", "path": "/run/netns/x"}, createRuntime=[ADD])
    (tmp_path / "bundle/config.json").write_text(json.dumps(before))
    network = Network(kind=Kind.GIVEN, path=Path("/run/netns/x"), spec=parse_spec(before), state=container)
    with network.in_spec():
        assert json.loads((tmp_path / "bundle/config.json").read_bytes()) == before
    assert not container.record.undo_spec


@pytest.mark.parametrize(("runtime", "hooks"), [("/usr/bin/runc", 2), ("/usr/bin/crun", 1)])
def test_a_namespace_that_criu_makes_gets_lo_from_a_hook(tmp_path: Path, runtime: str, hooks: int) -> None:
    """Where the runtime runs hooks on restore."""
    container = state(tmp_path, runtime)
    before = document({"type": "network"}, {"type": "user"}, createRuntime=[ADD])
    (tmp_path / "bundle/config.json").write_text(json.dumps(before))
    network = Network(kind=Kind.LATE, path=None, spec=parse_spec(before), state=container)
    with network.in_spec():
        during = json.loads((tmp_path / "bundle/config.json").read_bytes())
    assert len(during["hooks"]["createRuntime"]) == hooks
    assert during["hooks"]["createRuntime"][-1] == ADD
    assert during["linux"] == before["linux"]


def test_hooks_of_a_spec() -> None:
    """In the order of a runtime, with nothing but the spec's environment."""
    found = oci_hooks.hooks(document(createRuntime=[ADD], prestart=[GPU, CTR]), *oci_hooks.BEFORE)
    assert [(hook.stage, hook.of_container) for hook in found] == [
        ("prestart", True),
        ("prestart", True),
        ("createRuntime", False),
    ]
    assert (found[2].environment, found[2].timeout_s) == ({"A": "1", "B": "x=y"}, 3.0)


@pytest.mark.parametrize("broken", [{"createRuntime": {}}, {"createRuntime": ["x"]}])
def test_hooks_that_are_none(broken: dict[str, object]) -> None:
    """The field is named."""
    with pytest.raises(SmrError) as caught:
        oci_hooks.hooks({"hooks": broken}, *oci_hooks.BEFORE)
    assert caught.value.code is Code.SPEC_INVALID
    assert "hooks.createRuntime" in caught.value.message


def test_the_pid_file_of_nerdctl(tmp_path: Path) -> None:
    """Its hook was told the holder's pid; a file with another is somebody else's."""
    file = tmp_path / "pid"
    spec = parse_spec({"annotations": {"nerdctl/pid-file": str(file)}})
    file.write_text("41")
    netns._correct_pid_file(spec, 41, 77)
    assert file.read_text() == "77"
    netns._correct_pid_file(spec, 41, 78)
    assert file.read_text() == "77"
    netns._correct_pid_file(parse_spec({}), 41, 77)


def test_interfaces_of_this_process() -> None:
    """Loopback is everywhere, with its address and prefix."""
    found = {one.name: one for one in interfaces.of_namespace(Path("/proc/self/ns/net"))}
    assert "127.0.0.1/8" in found["lo"].addresses or not found["lo"].addresses


def test_ipv6_addresses_of_interfaces() -> None:
    """Sorted; those that somebody else has already are left out."""
    table = """\
fd000000000000000000000000000009 02 40 00 80     eth0
fd000000000000000000000000000005 02 40 00 40     eth0
fe800000000000000042acfffe110002 02 40 20 80     eth0
fd000000000000000000000000000007 02 40 00 c8     eth0
00000000000000000000000000000001 01 80 10 80       lo
"""
    assert interfaces.parse_if_inet6(table) == {
        "lo": ["::1/128"],
        "eth0": ["fd00::5/64", "fd00::9/64", "fe80::42:acff:fe11:2/64"],
    }
