"""podman's and CRI-O's files: what was in force stays in force beside ours."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smr.proto.errors import SmrError
from smr.shim.register import crio, podman
from smr.shim.register.files import Change, File, Note, Site

DEFAULT_HOOKS = "/usr/share/containers/oci/hooks.d"
OURS = ["/opt/smr/hooks.d", "/opt/smr/hooks.d/precreate"]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """An empty node."""
    return Site(prefix=Path("/opt/smr"), root=tmp_path, criu=Path("/c/criu"), runtime=Path("/usr/sbin/runc"))


def write(site: Site, path: str, text: str) -> None:
    file = site.root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def document(changes: list[Change]) -> dict[str, Any]:
    change = changes[0]
    assert isinstance(change, File)
    return tomllib.loads(change.text)


def engine(site: Site) -> dict[str, Any]:
    found: dict[str, Any] = document(podman.plan(site))["engine"]
    return found


def test_an_empty_node_keeps_podmans_defaults(site: Site) -> None:
    """Arrays replace the built-in ones, so these are repeated; no default runtime is set."""
    assert engine(site) == {
        "hooks_dir": [DEFAULT_HOOKS, *OURS],
        "runtime_supports_json": ["crun", "runc", "kata", "runsc", "youki", "krun", "ocijail", "smr"],
        "runtimes": {"smr": ["/opt/smr/bin/smr-runtime"]},
    }
    assert podman.plan(site)[0] == podman.plan(site)[0]


def test_the_default_runtime_is_set_on_request(site: Site) -> None:
    """Then the annotation alone is enough."""
    assert engine(replace(site, default_runtime=True))["runtime"] == "smr"


def test_crun_below_keeps_containers_without_cgroups_possible(site: Site) -> None:
    """podman asks by the runtime's name, which is now ours."""
    assert engine(replace(site, runtime=Path("/usr/bin/crun")))["runtime_supports_nocgroups"] == ["crun", "krun", "smr"]


def test_the_last_file_that_sets_an_array_counts(site: Site) -> None:
    """In podman's order: /usr/share, /etc, containers.conf.d by name; other suffixes are not read."""
    write(site, "usr/share/containers/containers.conf", '[engine]\nhooks_dir = ["/usr-share"]\nruntime_supports_json = ["one"]\n')
    write(site, "etc/containers/containers.conf", '[engine]\nhooks_dir = ["/etc"]\n')
    write(site, "etc/containers/containers.conf.d/10-a.conf", '[engine]\nhooks_dir = ["/a", "/opt/smr/hooks.d"]\n')
    write(site, "etc/containers/containers.conf.d/20-b.conf.bak", '[engine]\nhooks_dir = ["/backup"]\n')
    assert engine(site)["hooks_dir"] == ["/a", *OURS]
    assert engine(site)["runtime_supports_json"] == ["one", "smr"]


def test_an_empty_array_stays_empty_but_for_ours(site: Site) -> None:
    """Someone switched the default hooks off."""
    write(site, "etc/containers/containers.conf", "[engine]\nhooks_dir = []\n")
    assert engine(site)["hooks_dir"] == OURS


def test_appending_arrays_get_ours_only(site: Site) -> None:
    """podman 5 goes on appending once a file asked for it."""
    write(site, "etc/containers/containers.conf", '[engine]\nhooks_dir = ["/etc", {append = true}]\n')
    assert engine(site)["hooks_dir"] == OURS


def test_our_own_file_is_not_taken_for_the_nodes(site: Site) -> None:
    """A second plan is the first."""
    first = podman.plan(site)
    assert isinstance(first[0], File)
    write(site, "etc/containers/containers.conf.d/50-smr.conf", first[0].text)
    assert podman.plan(site) == first


def test_a_file_behind_ours_that_sets_the_same_makes_ours_the_last(site: Site) -> None:
    """Else its array would replace ours; the user is told why the name differs."""
    write(site, "etc/containers/containers.conf.d/90-x.conf", '[engine]\nhooks_dir = ["/x"]\n')
    changes = podman.plan(site)
    assert isinstance(changes[0], File)
    assert changes[0].path.name == "zz-smr.conf"
    assert document(changes)["engine"]["hooks_dir"] == ["/x", *OURS]
    assert any(isinstance(change, Note) for change in changes)


def test_a_file_behind_ours_that_sets_other_things_does_not_matter(site: Site) -> None:
    """A runtime there matters only when ours is to be the default."""
    write(site, "etc/containers/containers.conf.d/90-x.conf", '[engine]\nruntime = "crun"\n')
    assert podman.plan(site)[0].path.name == "50-smr.conf"  # type: ignore[union-attr]
    assert podman.plan(replace(site, default_runtime=True))[0].path.name == "zz-smr.conf"  # type: ignore[union-attr]


def test_a_broken_file_is_named(site: Site) -> None:
    """podman does not start with it either."""
    write(site, "etc/containers/containers.conf.d/10-a.conf", "[engine\n")
    with pytest.raises(SmrError, match=r"/etc/containers/containers.conf.d/10-a.conf is not valid TOML"):
        podman.plan(site)


def test_crio_gets_a_handler_and_the_hooks_that_it_knows(site: Site) -> None:
    """No precreate folder, which it would refuse, and no allowed_annotations, which it would not start with."""
    assert not crio.present(site)
    write(site, "etc/crio/crio.conf", '[crio.runtime]\nhooks_dir = ["/etc/hooks"]\n')
    assert crio.present(site)
    runtime = document(crio.plan(site))["crio"]["runtime"]
    assert runtime["hooks_dir"] == ["/etc/hooks", "/opt/smr/hooks.d"]
    assert runtime["runtimes"]["smr"]["runtime_path"] == "/opt/smr/bin/smr-runtime"
    assert "allowed_annotations" not in runtime["runtimes"]["smr"]
    assert "default_runtime" not in runtime
    assert document(crio.plan(replace(site, default_runtime=True)))["crio"]["runtime"]["default_runtime"] == "smr"
