"""`containerd config dump` before and after: our runtime is there, and nothing else of what containerd sees has changed.

The state between the two runs is one JSON file in install.sh's staging directory.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from smr.proto.errors import Code, SmrError
from smr.shim.register.containerd import CONFIG, RUNTIME
from smr.shim.register.files import Site
from smr.shim.register.toml_edit import Table, at, parse
from smr.shim.run import run

_PLUGINS = ("io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri")


def binary() -> Path | None:
    """containerd of this machine."""
    found = shutil.which("containerd")
    return Path(found) if found else None


def version(containerd: Path) -> tuple[int, int, int]:
    """Such as (1, 6, 20); the version is printed as `containerd SOURCE VERSION REVISION`."""
    output = run([containerd, "--version"], code=Code.ENGINE_FAILED).stdout
    match = re.search(r"\sv?(\d+)\.(\d+)(?:\.(\d+))?", output)
    if match is None:
        raise SmrError(f"{containerd} --version gives no version: {output.strip()!r}", code=Code.ENGINE_FAILED)
    return int(match[1]), int(match[2]), int(match[3] or 0)


def dump(containerd: Path, site: Site, config: Path = CONFIG) -> Table:
    """What containerd makes of the configuration. Raises ENGINE_FAILED with its words when it does not accept it."""
    with tempfile.TemporaryDirectory(prefix="smr-") as folder:
        file = site.at(config)
        if not file.exists():  # 1.6 fails on a file that is not there
            file = Path(folder) / "none.toml"
            file.touch()
        elif site.root != Path("/"):
            file = _relocated(site, config, Path(folder))
        text = run([containerd, "--config", file, "config", "dump"], code=Code.ENGINE_FAILED).stdout
    return parse(text, config)


def runc_of(dumped: Table) -> Table:
    """The table of the runtime `runc` in a dump; empty where there is none."""
    return next((found for name in _PLUGINS if (found := at(dumped, "plugins", name, "containerd", "runtimes", "runc"))), {})


def _relocated(site: Site, config: Path, folder: Path) -> Path:
    """A copy whose imports point below the root (nested imports are left alone)."""
    text = site.at(config).read_bytes().decode()
    imports = parse(text, config).get("imports")
    for each in imports if isinstance(imports, list) else []:
        absolute = config.parent / str(each)
        text = re.sub(rf"(['\"]){re.escape(str(each))}\1", json.dumps(str(site.at(absolute))), text)
    copy = folder / "config.toml"
    copy.write_bytes(text.encode())
    return copy


def compare(before: Table, after: Table, site: Site) -> None:
    """Raises ENGINE_FAILED when our runtime is not in force, or anything but it has changed."""
    plugin = next((name for name in _PLUGINS if at(after, "plugins", name, "containerd", "runtimes")), _PLUGINS[0])
    containerd = at(after, "plugins", plugin, "containerd")
    ours = at(containerd, "runtimes", RUNTIME)
    if ours.get("runtime_path") != str(site.prefix / "bin/containerd-shim-smr-v1"):
        raise _refused(f"the CRI runtime '{RUNTIME}' is not in what containerd loads")
    if site.default_runtime and containerd.get("default_runtime_name") != RUNTIME:
        raise _refused(f"default_runtime_name is '{containerd.get('default_runtime_name')}': an imported file sets it")
    if changed := _difference(_others(before), _others(after)):
        raise _refused(f"it would change {changed} for others")


def _refused(why: str) -> SmrError:
    hint = f"register it by hand: CRI runtime '{RUNTIME}', and pass --engines without containerd"
    return SmrError(f"containerd's configuration cannot be extended: {why}", hint=hint, code=Code.ENGINE_FAILED)


def _others(dumped: Table) -> Table:
    """The dump without our runtime, which may be the default, and without the list of loaded files."""
    document = cast(Table, json.loads(json.dumps(dumped, default=str)))
    document.pop("imports", None)
    for name in _PLUGINS:
        containerd = _table(document, "plugins", name, "containerd")
        _table(containerd, "runtimes").pop(RUNTIME, None)
        containerd.pop("default_runtime_name", None)
    return document


def _table(document: Table, *keys: str) -> Table:
    """The table itself, not a copy; an empty one apart where there is none."""
    for key in keys:
        inner = document.get(key)
        if not isinstance(inner, dict):
            return {}
        document = inner
    return document


def _difference(one: Mapping[str, object], other: Mapping[str, object], path: str = "") -> str:
    """The first key whose values differ, "" where all are equal. Missing and empty are the same."""
    for key in [*one, *(key for key in other if key not in one)]:
        left, right = one.get(key), other.get(key)
        name = f"{path}.{key}" if path else key
        if isinstance(left, Mapping) or isinstance(right, Mapping):
            inner = _difference(cast(Table, left or {}), cast(Table, right or {}), name)
            if inner:
                return inner
        elif (left or None) != (right or None):
            return name
    return ""
