"""containerd: the CRI runtime `smr`, which is a copy of the node's default runtime with our shim in front.

The copy matters: SystemdCgroup, BinaryName (nvidia-container-runtime) and the like are what the node's pods run with today.
runtime_type stays io.containerd.runc.v2 and runtime_path names our shim: with another type containerd encodes the options in
a message that the stock shim cannot decode. `ctr` and nerdctl need no configuration: they find the shim on PATH.

The CRI of containerd before 1.6.21, and of 1.7.0, reads runtime_path and does not use it. There smr-runtime is the stock shim's
BinaryName instead; what that shim itself would add is the prefetch at its start.

How files named by `imports` come together (containerd's config.go, read at 1.6.20, 1.7.27, 2.0, 2.1, 2.2, 2.3):

    1.6, 1.7    a plugin's table in a later file replaces that of earlier files whole, so a drop-in would drop the node's own
                CRI settings: our tables go into the last file that has the plugin's table, else into the configuration
    2.x         tables are merged key by key; a drop-in works where the configuration imports its directory. It must carry the
                configuration's own version: a lower one is migrated as version 1, a higher one is refused (2.3) or keeps the
                configuration from being migrated (2.0 to 2.2)
    1.6, 1.7    `runtimes` replaces the built-in table too, so the built-in runc has to be written beside ours

Without a configuration file containerd loads no drop-in either (2.2's built-in imports apply to nothing), so one is made.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from smr.proto.errors import Code, SmrError
from smr.shim.register.files import Change, Edit, File, Note, Site
from smr.shim.register.toml_edit import Table, add_tables, at, has_header, merge, nest, parse, set_value, strip

CONFIG = Path("/etc/containerd/config.toml")
# Sorts behind what other installers write there: a later file's default_runtime_name wins.
DROP_IN = "99-smr.toml"
RUNTIME = "smr"
ANNOTATIONS = ["smr.*", "smr.*/*"]  # path.Match patterns: the second is for keys with a slash
# A pod's own word for which of its containers is meant.
POD_ANNOTATIONS = [*ANNOTATIONS, "kubectl.kubernetes.io/default-container"]
RUNC: Table = {"runtime_type": "io.containerd.runc.v2"}
_PLUGIN = {0: "cri", 1: "cri", 2: "io.containerd.grpc.v1.cri"}
PLUGIN_V3 = "io.containerd.cri.v1.runtime"
_DISABLED = {"cri", "io.containerd.grpc.v1.cri", PLUGIN_V3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One loaded configuration file: its text as it is, and text and document without our edits."""

    path: Path
    current: str
    text: str
    document: Table
    ours: bool  # an earlier run made it, and nobody added anything


def uses_runtime_path(version: tuple[int, ...]) -> bool:
    """Whether the CRI of that containerd starts the shim that runtime_path names."""
    return version >= (1, 7, 1) or (1, 6, 21) <= version < (1, 7)


def plan(
    site: Site, *, config: Path = CONFIG, major: int | None, by_path: bool = True, builtin: Table | None = None
) -> list[Change]:
    """What to write. `major` is containerd's version, None where it is not installed (then the file's version decides).

    `by_path`: see `uses_runtime_path`. `builtin`: runc's table as containerd has it when nobody writes one; 1.7's says more than
    its type (sandbox_mode).
    """
    sources = list(_load(site, config))
    main = sources[0] if sources and not sources[0].ours else None
    version = int(str(main.document.get("version", 0))) if main else (3 if major is not None and major >= 2 else 2)
    merges = major >= 2 if major is not None else version >= 3
    plugin = _PLUGIN.get(version, PLUGIN_V3)
    if disabled := _disabled_by(sources):
        return [
            Note(f"containerd: the CRI plugin is disabled in {disabled}: no CRI runtime to add; ctr and nerdctl find smr on PATH")
        ]
    containerd = at(_effective(sources, plugin, merges), "containerd")
    if RUNTIME in at(containerd, "runtimes"):
        raise SmrError(
            f"containerd already has a CRI runtime '{RUNTIME}' that install.sh did not write",
            hint=f"remove runtimes.{RUNTIME} from {config} and what it imports",
            code=Code.CONFIG_INVALID,
        )
    runtimes: Table = {RUNTIME: _runtime(site, containerd, by_path)}
    notes = [] if by_path else _bypassed(containerd)
    if not merges and "runtimes" not in containerd:
        runc = {key: value for key, value in (builtin or {}).items() if value} | RUNC
        runtimes = {"runc": runc, RUNTIME: runc | _runtime(site, containerd, by_path)}
    table = ["plugins", plugin, "containerd"]
    addition = nest([*table, "runtimes"], runtimes)
    default: Table = {"default_runtime_name": RUNTIME} if site.default_runtime else {}
    own = config if main is None else _drop_in(config, main) if merges else None
    if own is not None:
        text = add_tables(f"version = {version}\n", merge(nest(table, default), addition), own)
        return [File(path=own, text=text, why="containerd: CRI runtime smr"), *notes]
    target = _target(sources, plugin, merges)
    text = target.text
    if default and has_header(text, table):
        text = set_value(text, table, "default_runtime_name", RUNTIME, target.path)
    else:
        addition = merge(nest(table, default), addition)
    text = add_tables(text, addition, target.path)
    if parse(text, target.path) == parse(target.current, target.path):
        text = target.current  # others may have added lines behind ours
    return [Edit(path=target.path, text=text, base=target.text, why="containerd: CRI runtime smr"), *notes]


def _runtime(site: Site, containerd: Table, by_path: bool) -> Table:
    """Our runtime: the default one's table with our shim, and our annotations passed through beside its own."""
    base = _base(containerd)
    passed: Table = {}
    for key, patterns in (("pod_annotations", POD_ANNOTATIONS), ("container_annotations", ANNOTATIONS)):
        before = base.get(key)
        passed[key] = [*(before if isinstance(before, list) else []), *patterns]
    ours: Table = {**RUNC, "runtime_path": str(site.prefix / "bin/containerd-shim-smr-v1"), **passed}
    if not by_path:
        ours["options"] = at(base, "options") | {"BinaryName": str(site.prefix / "bin/smr-runtime")}
    return base | ours


def _base(containerd: Table) -> Table:
    """The node's default runtime, where it is one of runc's kind, else `runc`."""
    runtimes = at(containerd, "runtimes")
    name = str(containerd.get("default_runtime_name") or "runc")
    return next((at(runtimes, each) for each in (name, "runc") if _is_runc(at(runtimes, each))), {})


def _bypassed(containerd: Table) -> list[Change]:
    name = at(_base(containerd), "options").get("BinaryName")
    if not name:
        return []
    return [
        Note(
            f"containerd is too old to start our shim, so smr-runtime takes the place of {name} in the CRI runtime '{RUNTIME}': "
            f"name it in /etc/smr/runtime, or update containerd to 1.6.21 or 1.7.1"
        )
    ]


def _is_runc(runtime: Table) -> bool:
    return runtime.get("runtime_type") == RUNC["runtime_type"]


def _disabled_by(sources: list[Source]) -> Path | None:
    """The file that disables the CRI plugin (lists of several files are joined)."""
    for source in sources:
        names = source.document.get("disabled_plugins")
        if isinstance(names, list) and _DISABLED & set(map(str, names)):
            return source.path
    return None


def _effective(sources: list[Source], plugin: str, merges: bool) -> Table:
    effective: Table = {}
    for table in (at(source.document, "plugins", plugin) for source in sources):
        if table:
            effective = merge(effective, table) if merges else table
    return effective


def _target(sources: list[Source], plugin: str, merges: bool) -> Source:
    having = [source for source in sources if plugin in at(source.document, "plugins")]
    return sources[0] if merges or not having else having[-1]


def _drop_in(config: Path, main: Source) -> Path | None:
    """Our drop-in's path when the configuration imports everything in a folder of TOML files, preferably conf.d."""
    folders = [config.parent / "conf.d", *(pattern.parent for pattern in _patterns(config, main.document))]
    for folder in folders:
        path = folder / DROP_IN
        if "*" not in str(folder) and any(
            fnmatch.fnmatch(str(path), str(pattern)) for pattern in _patterns(config, main.document)
        ):
            return path
    return None


def _patterns(parent: Path, document: Table) -> list[Path]:
    """The `imports` of a document as absolute paths or glob patterns; relative ones are relative to their file."""
    imports = document.get("imports")
    return [Path(os.path.normpath(parent.parent / str(each))) for each in imports] if isinstance(imports, list) else []


def _load(site: Site, config: Path) -> Iterator[Source]:
    """The configuration and what it imports, in containerd's order: breadth first, each file once. Ours are left out."""
    pending, loaded = [config], set()
    while pending:
        path = pending.pop(0)
        if path in loaded or path.name == DROP_IN:
            continue
        loaded.add(path)
        if (text := site.read(path)) is None:
            if path != config:
                raise SmrError(
                    f"{config} imports {path}, which does not exist", hint=f"correct {config}", code=Code.CONFIG_INVALID
                )
            return
        base = strip(text)
        document = parse(base, path)
        yield Source(path=path, current=text, text=base, document=document, ours=base != text and document.keys() == {"version"})
        for pattern in _patterns(path, document):
            pending += _matches(site, pattern) if "*" in str(pattern) else [pattern]


def _matches(site: Site, pattern: Path) -> list[Path]:
    found = sorted(glob.glob(str(site.at(pattern))))  # noqa: PTH207  # containerd's own order and rules
    return [Path("/") / Path(each).relative_to(site.root) for each in found]
