"""SMR's own files, and the plan that install.sh reads."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from smr.proto.errors import SmrError
from smr.shim.config import load
from smr.shim.register import __main__ as register
from smr.shim.register import node
from smr.shim.register.files import Edit, File, Link, Note, Site, stage

REPOSITORY = Path(__file__).parents[2]
TEMPLATES = REPOSITORY / "deploy/hooks.d"
CRIO_STAGES = {"createContainer", "createRuntime", "prestart", "poststart", "poststop", "startContainer"}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """An empty node with its prefix in an odd place."""
    return Site(prefix=Path("/opt/odd-place"), root=tmp_path, criu=Path("/c/criu"), runtime=Path("/usr/sbin/runc"))


def test_settings_are_those_that_smr_reads(site: Site, tmp_path: Path) -> None:
    """The written file is accepted by the settings' own reader."""
    files = {change.path.name: change for change in node.plan(site, TEMPLATES) if isinstance(change, File)}
    path = tmp_path / "smr.toml"
    path.write_text(files["smr.toml"].text)
    config = load(path, environ={})
    assert (config.criu, config.runtime) == ("/c/criu", "/usr/sbin/runc")
    assert files["runtime"].text == "/usr/sbin/runc\n"
    assert files["smr.toml"].keep_edited


def test_every_hook_names_its_stage_and_our_program(site: Site) -> None:
    """Schema 1.0.0; the stage is the program's argument; the shared folder holds only stages that CRI-O knows."""
    hooks = [change for change in node.plan(site, TEMPLATES) if isinstance(change, File) and change.path.suffix == ".json"]
    stages = []
    for hook in hooks:
        text = json.loads(hook.text)
        assert text["version"] == "1.0.0"
        assert text["hook"] == {"path": "/opt/odd-place/bin/smr-hook", "args": ["smr-hook", *text["stages"]]}
        ((key, value),) = text["when"]["annotations"].items()
        assert re.search(key, "smr.restore")
        assert not re.search(key, "smrXrestore")
        assert re.search(value, "image:tag")
        if hook.path.parent.name == "hooks.d":
            assert set(text["stages"]) <= CRIO_STAGES
        stages += text["stages"]
    assert sorted(stages) == ["createRuntime", "poststop", "precreate"]


def test_every_program_of_the_package_is_linked(site: Site) -> None:
    """What pyproject.toml installs is what gets a link in the prefix and on PATH."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    programs = {*project["project"]["scripts"], *(Path(each).name for each in project["tool"]["setuptools"]["script-files"])}
    links = [change for change in node.plan(site, TEMPLATES) if isinstance(change, Link)]
    assert {link.path.name for link in links if link.path.parent == Path("/usr/local/bin")} == programs
    assert {link.path.name for link in links if link.path.parent == site.prefix / "bin"} == programs


def test_a_plan_is_one_line_a_change_with_the_contents_staged(tmp_path: Path) -> None:
    """Tabs between fields; none is empty."""
    lines = stage(
        [
            File(path=Path("/a"), text="1\r\n", why="w", mode=0o600),
            Edit(path=Path("/b"), text="new", base="", why="w"),
            Link(path=Path("/c"), target=Path("/d"), why="w"),
            Note("hear"),
        ],
        tmp_path,
    )
    fields = [line.split("\t") for line in lines]
    assert [each[0] for each in fields] == ["file", "edit", "link", "note"]
    assert fields[0][1:3] == ["0600", "/a"]
    assert Path(fields[0][3]).read_bytes() == b"1\r\n"
    assert (Path(fields[1][2]).read_text(), Path(fields[1][3]).read_text()) == ("new", "")
    assert all(field for each in fields for field in each)


@pytest.mark.parametrize("path", ["/a\tb", "/a\nb"])
def test_a_path_that_would_break_the_plan_is_refused(tmp_path: Path, path: str) -> None:
    """Nothing is ever written to half a path."""
    with pytest.raises(SmrError, match="tab or a line break"):
        stage([Link(path=Path(path), target=Path("/d"), why="w")], tmp_path)


def test_strip_prints_a_file_without_our_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What install.sh puts back when others changed the file since."""
    from smr.shim.register.toml_edit import add_tables

    file = tmp_path / "config.toml"
    file.write_text(add_tables("a = 1\n", {"b": {"c": 1}}, file) + "d = 2\n")
    assert register.main(["strip", str(file)]) == 0
    assert capsys.readouterr().out == "a = 1\nd = 2\n"


def test_a_failure_is_one_sentence_and_an_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """install.sh shows it as it is."""
    conf = tmp_path / "etc/containers/containers.conf"
    conf.parent.mkdir(parents=True)
    conf.write_text("[engine\n")
    words = ["plan", "--root", str(tmp_path), "--templates", str(TEMPLATES), "--stage", str(tmp_path), "--engines", "podman"]
    assert register.main([*words, "--prefix", "/p", "--criu", "/criu", "--runtime", "/runc"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("/etc/containers/containers.conf is not valid TOML")
