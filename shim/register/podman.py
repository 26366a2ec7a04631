"""podman: one file in /etc/containers/containers.conf.d that names our runtime and our hooks directories.

containers.conf(5): files are read in the order /usr/share/containers, /etc/containers, containers.conf.d by name. Tables merge
by key, arrays are replaced, so ours repeat what is in force: podman's defaults or what the node's files say. An array that
holds `{append=true}` (podman 5) appends, as does every later one of that key; then ours holds our own values only.
podman 4 knows no such element, so none is written.
"""

from __future__ import annotations

from pathlib import Path

from smr.shim.register.files import Change, File, Note, Site
from smr.shim.register.toml_edit import Table, at, parse, render, strip

FOLDER = Path("/etc/containers/containers.conf.d")
FIRST = (Path("/usr/share/containers/containers.conf"), Path("/etc/containers/containers.conf"))
NAME = "50-smr.conf"
LAST_NAME = "zz-smr.conf"
HOOKS_DIRS = ["/usr/share/containers/oci/hooks.d"]
# What any podman since 4.0 knows; a name that one does not know changes nothing there.
RUNTIMES_WITH_JSON = ["crun", "runc", "kata", "runsc", "youki", "krun", "ocijail"]
RUNTIMES_WITHOUT_CGROUPS = ["crun", "krun"]
_ARRAYS = ("hooks_dir", "runtime_supports_json", "runtime_supports_nocgroups")


class Array:
    """One array of containers.conf over all the files: its values in force, and whether later ones append."""

    def __init__(self, default: list[str]) -> None:
        self.values = default
        self.appends = False

    def read(self, value: object) -> None:
        """Take in what one file says; anything but an array is not ours to judge."""
        if not isinstance(value, list):
            return
        for attributes in (each for each in value if isinstance(each, dict)):
            self.appends = bool(attributes.get("append", self.appends))
        strings = [each for each in value if isinstance(each, str)]
        self.values = [*self.values, *strings] if self.appends else strings

    def with_ours(self, *ours: str) -> list[str]:
        """What our file has to say so that `ours` are in force too."""
        return list(ours) if self.appends else [*(each for each in self.values if each not in ours), *ours]


def hooks_dirs(site: Site) -> tuple[str, str]:
    """Ours: the hooks that every engine knows, and those for podman alone (CRI-O refuses a folder with an unknown stage)."""
    folder = site.prefix / "hooks.d"
    return str(folder), str(folder / "precreate")


def plan(site: Site) -> list[Change]:
    """The file, named so that no other overrides it."""
    arrays = {"hooks_dir": Array(HOOKS_DIRS), "runtime_supports_json": Array(RUNTIMES_WITH_JSON)}
    arrays["runtime_supports_nocgroups"] = Array(RUNTIMES_WITHOUT_CGROUPS)
    name = NAME
    for path in _files(site):
        engine = _engine(site, path)
        for key, array in arrays.items():
            array.read(engine.get(key))
        decides = any(key in engine for key in _ARRAYS) or (site.default_runtime and "runtime" in engine)
        if decides and path.parent == FOLDER and path.name > NAME:
            name = LAST_NAME
    changes: list[Change] = [File(path=FOLDER / name, text=_text(site, arrays), why="podman: runtime smr, hooks")]
    if name != NAME:
        changes.append(Note(f"podman: {FOLDER / name} is named so because a file behind {NAME} sets the same arrays"))
    return changes


def _text(site: Site, arrays: dict[str, Array]) -> str:
    engine: Table = {"runtime": "smr"} if site.default_runtime else {}
    engine["hooks_dir"] = arrays["hooks_dir"].with_ours(*hooks_dirs(site))
    engine["runtime_supports_json"] = arrays["runtime_supports_json"].with_ours("smr")
    if site.runtime.name == "crun":
        engine["runtime_supports_nocgroups"] = arrays["runtime_supports_nocgroups"].with_ours("smr")
    engine["runtimes"] = {"smr": [str(site.prefix / "bin/smr-runtime")]}
    head = "# Written by SMR's install.sh. Arrays replace those of earlier files, so they repeat what was in force."
    return f"{head}\n{render({'engine': engine})}"


def _files(site: Site) -> list[Path]:
    folder = site.at(FOLDER)
    names = sorted(each.name for each in folder.iterdir() if each.suffix == ".conf") if folder.is_dir() else []
    return [*FIRST, *(FOLDER / name for name in names if name not in (NAME, LAST_NAME))]


def _engine(site: Site, path: Path) -> Table:
    text = site.read(path)
    return {} if text is None else at(parse(strip(text), path), "engine")
