"""The CRI runtime `smr` in every kind of containerd configuration."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from smr.proto.errors import Code, SmrError
from smr.shim.register import containerd
from smr.shim.register.containerd_dump import compare
from smr.shim.register.files import Change, Edit, File, Note, Site
from smr.shim.register.toml_edit import strip

V2, V3 = "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"
CONFIG = Path("/etc/containerd/config.toml")
NODE = f"""# our node
version = 2
[plugins."{V2}"]
  sandbox_image = "pause"
  [plugins."{V2}".containerd]
    default_runtime_name = "nvidia" # GPU
    [plugins."{V2}".containerd.runtimes.nvidia]
      runtime_type = "io.containerd.runc.v2"
      pod_annotations = ["nvidia.*"]
      [plugins."{V2}".containerd.runtimes.nvidia.options]
        BinaryName = "/usr/bin/nvidia-container-runtime"
        SystemdCgroup = true
"""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A node that is empty but for /etc/containerd."""
    (tmp_path / "etc/containerd").mkdir(parents=True)
    return Site(prefix=Path("/opt/smr"), root=tmp_path, criu=Path("/c/criu"), runtime=Path("/usr/sbin/runc"))


def default(site: Site) -> Site:
    """The same node with --default-runtime."""
    return Site(prefix=site.prefix, root=site.root, criu=site.criu, runtime=site.runtime, default_runtime=True)


def write(site: Site, text: str, name: str = "config.toml") -> None:
    path = site.root / "etc/containerd" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def apply(site: Site, changes: list[Change]) -> None:
    for change in changes:
        assert isinstance(change, File | Edit)
        write(site, change.text, str(change.path.relative_to("/etc/containerd")))


def only(changes: list[Change]) -> File | Edit:
    assert len(changes) == 1
    assert isinstance(changes[0], File | Edit)
    return changes[0]


def cri(text: str, plugin: str = V2) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads(text)["plugins"][plugin]["containerd"]
    return found


def test_what_1_7_builds_in_beside_runcs_type_stays(site: Site) -> None:
    """Writing the table of runtimes replaces the built-in one: all of runc's goes into it, and into ours, but no empty values."""
    builtin = {"runtime_type": "io.containerd.runc.v2", "sandbox_mode": "podsandbox", "base_runtime_spec": "", "options": {}}
    file = only(containerd.plan(site, config=CONFIG, major=1, builtin=builtin))
    runtimes = cri(file.text)["runtimes"]
    assert runtimes["runc"] == {"runtime_type": "io.containerd.runc.v2", "sandbox_mode": "podsandbox"}
    assert runtimes["smr"]["sandbox_mode"] == "podsandbox"


@pytest.mark.parametrize(("major", "version", "plugin"), [(1, 2, V2), (2, 3, V3), (None, 2, V2)])
def test_no_configuration_makes_one_that_its_containerd_understands(
    site: Site, major: int | None, version: int, plugin: str
) -> None:
    """1.x gets version 2, 2.x version 3; the built-in runc stays where a written table would replace it."""
    change = only(containerd.plan(site, major=major))
    assert isinstance(change, File)
    assert change.path == CONFIG
    assert tomllib.loads(change.text)["version"] == version
    smr = cri(change.text, plugin)["runtimes"]["smr"]
    assert smr["runtime_type"] == "io.containerd.runc.v2"
    assert smr["runtime_path"] == "/opt/smr/bin/containerd-shim-smr-v1"
    assert smr["container_annotations"] == ["smr.*", "smr.*/*"]
    assert smr["pod_annotations"] == ["smr.*", "smr.*/*", "kubectl.kubernetes.io/default-container"]
    assert ("runc" in cri(change.text, plugin)["runtimes"]) == (major != 2)


@pytest.mark.parametrize("major", [1, 2])
def test_a_second_plan_on_the_file_that_the_first_made_is_the_same(site: Site, major: int) -> None:
    """The file is recognized as ours, not edited as someone's."""
    first = containerd.plan(site, major=major)
    apply(site, first)
    assert containerd.plan(site, major=major) == first


def test_what_a_user_adds_to_the_file_we_made_makes_it_theirs(site: Site) -> None:
    """It is then edited, and taking our lines out leaves theirs."""
    apply(site, containerd.plan(site, major=1))
    made = (site.root / "etc/containerd/config.toml").read_text()
    write(site, f"{made}[debug]\nlevel = 'debug'\n")
    change = only(containerd.plan(site, major=1))
    assert isinstance(change, Edit)
    assert change.base == "version = 2\n[debug]\nlevel = 'debug'\n"


def test_the_default_runtime_is_copied_with_its_options(site: Site) -> None:
    """SystemdCgroup and BinaryName decide whether pods run at all; annotations are added to those that pass already."""
    write(site, NODE)
    change = only(containerd.plan(site, major=1))
    assert isinstance(change, Edit)
    runtimes = cri(change.text)["runtimes"]
    assert runtimes["smr"]["options"] == {"BinaryName": "/usr/bin/nvidia-container-runtime", "SystemdCgroup": True}
    assert runtimes["smr"]["pod_annotations"] == ["nvidia.*", "smr.*", "smr.*/*", "kubectl.kubernetes.io/default-container"]
    assert runtimes["nvidia"] == cri(NODE)["runtimes"]["nvidia"]
    assert set(runtimes) == {"nvidia", "smr"}  # the node itself has given up the built-in runc
    assert cri(change.text)["default_runtime_name"] == "nvidia"
    assert change.base == strip(change.text) == NODE


def test_a_default_runtime_of_another_kind_is_not_copied(site: Site) -> None:
    """Kata's options mean nothing to runc's shim: runc's are taken."""
    kata = f"""version = 2
[plugins."{V2}".containerd]
default_runtime_name = "kata"
[plugins."{V2}".containerd.runtimes.kata]
runtime_type = "io.containerd.kata.v2"
runtime_path = "/usr/bin/kata"
[plugins."{V2}".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
options = {{ SystemdCgroup = true }}
"""
    write(site, kata)
    smr = cri(only(containerd.plan(site, major=1)).text)["runtimes"]["smr"]
    assert smr["options"] == {"SystemdCgroup": True}
    assert smr["runtime_path"] == "/opt/smr/bin/containerd-shim-smr-v1"


@pytest.mark.parametrize(
    "text", [NODE, NODE.replace('    default_runtime_name = "nvidia" # GPU\n', ""), f'version = 2\n[plugins."{V2}"]\n']
)
def test_default_runtime_is_set_and_taken_back(site: Site, text: str) -> None:
    """Where a line, a table or neither is there; a later plan without it gives the node's own default back."""
    write(site, text)
    change = only(containerd.plan(default(site), major=1))
    assert cri(change.text)["default_runtime_name"] == "smr"
    assert strip(change.text) == text
    apply(site, [change])
    without = only(containerd.plan(site, major=1))
    assert cri(without.text).get("default_runtime_name") == tomllib.loads(text)["plugins"][V2].get("containerd", {}).get(
        "default_runtime_name"
    )


def test_a_second_plan_leaves_a_file_that_others_added_to_as_it_is(site: Site) -> None:
    """Our block is not moved to the end for nothing."""
    write(site, NODE)
    apply(site, containerd.plan(site, major=1))
    now = (site.root / "etc/containerd/config.toml").read_text() + "# a remark\n"
    write(site, now)
    change = only(containerd.plan(site, major=1))
    assert change.text == now
    assert isinstance(change, Edit)
    assert change.base == NODE + "# a remark\n"


def test_without_a_version_the_plugin_has_its_short_name(site: Site) -> None:
    """A file of version 1 is read so by 1.x, and migrated from that by 2.x."""
    write(site, "[debug]\nlevel = 'info'\n")
    for major in (1, 2):
        assert "smr" in cri(only(containerd.plan(site, major=major)).text, "cri")["runtimes"]


@pytest.mark.parametrize("version", [3, 4])
def test_versions_3_and_4_have_the_new_plugin(site: Site, version: int) -> None:
    """The old plugin name in such a file would be ignored."""
    write(site, f"version = {version}\n")
    assert "smr" in cri(only(containerd.plan(site, major=2)).text, V3)["runtimes"]


@pytest.mark.parametrize("name", ["cri", V2, V3])
def test_a_disabled_cri_plugin_leaves_nothing_to_do(site: Site, name: str) -> None:
    """Docker's package ships such a file; ctr and nerdctl need no configuration."""
    write(site, f'disabled_plugins = ["{name}"]\n')
    (change,) = containerd.plan(site, major=1)
    assert isinstance(change, Note)
    assert "config.toml" in change.text


def test_a_runtime_called_smr_of_someone_else_is_refused(site: Site) -> None:
    """It is not overwritten."""
    write(site, f'version = 2\n[plugins."{V2}".containerd.runtimes.smr]\nruntime_type = "x"\n')
    with pytest.raises(SmrError, match="already has a CRI runtime 'smr'") as caught:
        containerd.plan(site, major=1)
    assert caught.value.code is Code.CONFIG_INVALID


def test_a_file_that_is_no_toml_or_imports_what_is_not_there_is_refused(site: Site) -> None:
    """containerd itself does not start with it."""
    write(site, "version = \n")
    with pytest.raises(SmrError, match="not valid TOML"):
        containerd.plan(site, major=1)
    write(site, 'version = 2\nimports = ["gone.toml"]\n')
    with pytest.raises(SmrError, match=r"imports /etc/containerd/gone.toml, which does not exist"):
        containerd.plan(site, major=1)


def test_on_1x_the_last_import_with_the_plugin_is_edited(site: Site) -> None:
    """There a later file's table replaces the earlier one whole, so anything written elsewhere has no effect."""
    write(site, f'imports = ["conf.d/*.toml"]\n{NODE}')
    write(site, f'version = 2\n[plugins."{V2}"]\nenable_selinux = true\n', "conf.d/20-cri.toml")
    write(site, "version = 2\noom_score = -1\n", "conf.d/30-other.toml")
    change = only(containerd.plan(site, major=1))
    assert change.path == Path("/etc/containerd/conf.d/20-cri.toml")
    assert set(cri(change.text)["runtimes"]) == {"runc", "smr"}


def test_on_1x_no_drop_in_is_made(site: Site) -> None:
    """It would drop the node's sandbox_image and all else of the plugin."""
    write(site, f'imports = ["/etc/containerd/conf.d/*.toml"]\n{NODE}')
    assert only(containerd.plan(site, major=1)).path == CONFIG


@pytest.mark.parametrize("pattern", ["/etc/containerd/conf.d/*.toml", "conf.d/*.toml", "./conf.d/*"])
@pytest.mark.parametrize("version", [2, 3])
def test_on_2x_an_imported_folder_gets_a_drop_in_of_the_same_version(site: Site, pattern: str, version: int) -> None:
    """Another version would be migrated wrongly or refused. The drop-in carries the node's runtime options too."""
    plugin = V2 if version == 2 else V3
    write(site, f'imports = ["{pattern}"]\n{NODE}'.replace("version = 2", f"version = {version}").replace(V2, plugin))
    change = only(containerd.plan(default(site), major=2))
    assert isinstance(change, File)
    assert change.path == Path("/etc/containerd/conf.d/99-smr.toml")
    assert tomllib.loads(change.text)["version"] == version
    assert cri(change.text, plugin)["runtimes"]["smr"]["options"]["SystemdCgroup"] is True
    assert cri(change.text, plugin)["default_runtime_name"] == "smr"
    apply(site, [change])
    assert containerd.plan(default(site), major=2) == [change]


def test_on_2x_without_an_imported_folder_the_configuration_is_edited(site: Site) -> None:
    """A folder that happens to be there is not read by containerd."""
    write(site, "version = 3\nimports = ['/etc/containerd/one.toml']\n")
    write(site, "version = 3\n", "one.toml")
    write(site, "version = 3\n", "conf.d/other.toml")
    assert only(containerd.plan(site, major=2)).path == CONFIG


def test_imports_that_name_each_other_end(site: Site) -> None:
    """Each file is read once."""
    write(site, 'version = 2\nimports = ["a.toml"]\n')
    write(site, 'version = 2\nimports = ["config.toml", "a.toml"]\n', "a.toml")
    assert only(containerd.plan(site, major=1)).path == CONFIG


def dump(**runtimes: dict[str, object]) -> dict[str, object]:
    return {
        "root": "/r",
        "imports": ["x"],
        "plugins": {V2: {"containerd": {"default_runtime_name": "runc", "runtimes": runtimes}}},
    }


RUNC: dict[str, object] = {"runtime_type": "io.containerd.runc.v2", "options": {"BinaryName": ""}}
SMR: dict[str, object] = {"runtime_path": "/opt/smr/bin/containerd-shim-smr-v1"}


def test_comparison_accepts_our_runtime_and_empty_values(site: Site) -> None:
    """A written-out default and an empty one mean the same to containerd."""
    compare(dump(runc=RUNC), dump(runc={"runtime_type": "io.containerd.runc.v2", "base": ""}, smr=SMR) | {"imports": []}, site)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (dump(runc=RUNC), "is not in what containerd loads"),
        (dump(smr=SMR), "it would change plugins.io.containerd.grpc.v1.cri.containerd.runtimes.runc.runtime_type"),
        (dump(runc=RUNC, smr=SMR) | {"root": "/other"}, "it would change root"),
    ],
)
def test_comparison_refuses_any_other_change(site: Site, after: dict[str, object], message: str) -> None:
    """A lost runtime or setting of the node is found before anyone restarts containerd."""
    with pytest.raises(SmrError, match=message):
        compare(dump(runc=RUNC), after, site)


def test_comparison_refuses_a_default_that_does_not_take(site: Site) -> None:
    """Another file may set default_runtime_name after ours."""
    with pytest.raises(SmrError, match="default_runtime_name is 'runc'"):
        compare(dump(runc=RUNC), dump(runc=RUNC, smr=SMR), default(site))


@pytest.mark.parametrize(
    ("version", "uses"),
    [((1, 5, 18), False), ((1, 6, 20), False), ((1, 6, 21), True), ((1, 7, 0), False), ((1, 7, 1), True), ((2, 1, 9), True)],
)
def test_versions_whose_cri_starts_our_shim(version: tuple[int, ...], uses: bool) -> None:
    """1.6.21 and 1.7.1 are the first that use runtime_path."""
    assert containerd.uses_runtime_path(version) is uses


def test_a_containerd_that_does_not_start_our_shim_runs_our_runtime(site: Site) -> None:
    """BinaryName is smr-runtime then; what it replaces is told, because it has to be named elsewhere."""
    write(site, NODE)
    change, note = containerd.plan(site, major=1, by_path=False)
    assert isinstance(change, Edit)
    assert cri(change.text)["runtimes"]["smr"]["options"] == {"BinaryName": "/opt/smr/bin/smr-runtime", "SystemdCgroup": True}
    assert isinstance(note, Note)
    assert "/usr/bin/nvidia-container-runtime" in note.text
    assert "/etc/smr/runtime" in note.text


def test_an_old_containerd_without_a_binary_name_needs_no_word(site: Site) -> None:
    """Nothing is replaced, so nothing is told."""
    (change,) = containerd.plan(site, major=1, by_path=False)
    assert isinstance(change, File)
    assert cri(change.text)["runtimes"]["smr"]["options"] == {"BinaryName": "/opt/smr/bin/smr-runtime"}
