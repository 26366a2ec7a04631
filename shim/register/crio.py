"""CRI-O: one file in /etc/crio/crio.conf.d with the runtime handler `smr` and our hooks directory.

No allowed_annotations: CRI-O hands all of a pod's annotations to its containers' specs as it is, and a name in that list
which CRI-O does not know itself makes it refuse the whole configuration (ValidateRuntimeAllowedAnnotations).
Arrays are replaced by later files, so hooks_dir repeats what is in force. Not tried against a running CRI-O.
"""

from __future__ import annotations

from pathlib import Path

from smr.shim.register.files import Change, File, Site
from smr.shim.register.podman import HOOKS_DIRS, Array, hooks_dirs
from smr.shim.register.toml_edit import Table, at, parse, render

CONFIG = Path("/etc/crio/crio.conf")
FOLDER = Path("/etc/crio/crio.conf.d")
NAME = "50-smr.conf"


def present(site: Site) -> bool:
    """CRI-O has a configuration folder on this node."""
    return site.at(CONFIG.parent).is_dir()


def plan(site: Site) -> list[Change]:
    """The handler; with --default-runtime it is also the default."""
    hooks = Array(HOOKS_DIRS)
    folder = site.at(FOLDER)
    names = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    for path in [CONFIG, *(FOLDER / name for name in names if name != NAME)]:
        text = site.read(path)
        hooks.read(at(parse(text, path), "crio", "runtime").get("hooks_dir") if text is not None else None)
    runtime: Table = {"default_runtime": "smr"} if site.default_runtime else {}
    runtime["hooks_dir"] = hooks.with_ours(hooks_dirs(site)[0])
    runtime["runtimes"] = {
        "smr": {"runtime_path": str(site.prefix / "bin/smr-runtime"), "runtime_type": "oci", "runtime_root": "/run/runc"}
    }
    text = f"# Written by SMR's install.sh.\n{render({'crio': {'runtime': runtime}})}"
    return [File(path=FOLDER / NAME, text=text, why="CRI-O: runtime handler smr, hooks")]
