"""SMR's own files on a node: settings, the name of the real runtime, hook JSON, and links on PATH.

Hook JSON comes from templates (`deploy/hooks.d`) in which @PREFIX@ stands for the prefix.
"""

from __future__ import annotations

from pathlib import Path

from smr.shim.register.files import Change, File, Link, Site
from smr.shim.register.toml_edit import render

PROGRAMS = ("smr", "smr-runtime", "smr-hook", "containerd-shim-smr-v1", "containerd-shim-smr-v2")
BIN = Path("/usr/local/bin")
SETTINGS = Path("/etc/smr")


def plan(site: Site, templates: Path) -> list[Change]:
    """Everything but the engines' files."""
    return [*_settings(site), *_hooks(site, templates), *_links(site)]


def _settings(site: Site) -> list[Change]:
    values = render({"smr": {"criu": str(site.criu), "runtime": str(site.runtime), **site.settings}})
    text = f"# Settings of SMR; install.sh leaves your changes alone. Also known under [smr]: store, log.\n{values}"
    return [
        File(path=SETTINGS / "smr.toml", text=text, why="settings: CRIU and the OCI runtime", keep_edited=True),
        File(path=SETTINGS / "runtime", text=f"{site.runtime}\n", why="the real OCI runtime, for smr-runtime", keep_edited=True),
    ]


def _hooks(site: Site, templates: Path) -> list[Change]:
    return [
        File(
            path=site.prefix / "hooks.d" / file.relative_to(templates),
            text=file.read_text().replace("@PREFIX@", str(site.prefix)),
            why="OCI hook",
        )
        for file in sorted(templates.rglob("*.json"))
    ]


def _links(site: Site) -> list[Change]:
    inner: list[Change] = [
        Link(path=site.prefix / "bin" / name, target=Path("../venv/bin") / name, why="program") for name in PROGRAMS
    ]
    outer: list[Change] = [Link(path=BIN / name, target=site.prefix / "bin" / name, why="on PATH") for name in PROGRAMS]
    return inner + outer
