"""`python -m smr.shim.register plan|check|strip`: what install.sh calls. Prints a plan (files.py), or nothing."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from smr.proto.errors import SmrError, exit_status
from smr.shim.config import parse_settings
from smr.shim.register import containerd, containerd_dump, crio, node, podman
from smr.shim.register.files import Change, Note, Site, stage
from smr.shim.register.toml_edit import strip

_BEFORE = "containerd-before.json"


def main(argv: list[str] | None = None) -> int:
    """Run one verb; a failure is one sentence on stderr."""
    options = _parser().parse_args(argv)
    try:
        if options.verb == "strip":
            sys.stdout.write(strip(options.file.read_bytes().decode()))
        else:
            site = Site(
                prefix=options.prefix,
                root=options.root,
                criu=options.criu,
                runtime=options.runtime,
                default_runtime=options.default_runtime,
                settings=parse_settings(options.setting),
            )
            (_plan if options.verb == "plan" else _check)(site, options)
    except SmrError as error:
        sys.stderr.write(f"{error}\n")
        return exit_status(error.code)
    return 0


def _plan(site: Site, options: argparse.Namespace) -> None:
    changes: list[Change] = node.plan(site, options.templates)
    engines = set(options.engines.split(","))
    if "podman" in engines:
        changes += podman.plan(site)
    if "crio" in engines:
        changes += crio.plan(site)
    if "containerd" in engines:
        changes += _containerd(site, options)
    sys.stdout.write("".join(f"{line}\n" for line in stage(changes, options.stage)))


def _containerd(site: Site, options: argparse.Namespace) -> list[Change]:
    binary = containerd_dump.binary()
    if binary is None:
        note = Note("containerd: not installed here, so its verdict on the configuration is not asked for")
        return [note, *containerd.plan(site, config=options.containerd_config, major=None)]
    before = containerd_dump.dump(binary, site, options.containerd_config)
    version = containerd_dump.version(binary)
    changes = containerd.plan(
        site,
        config=options.containerd_config,
        major=version[0],
        by_path=containerd.uses_runtime_path(version),
        builtin=containerd_dump.runc_of(before),
    )
    if not all(isinstance(change, Note) for change in changes):
        (options.stage / _BEFORE).write_text(json.dumps(before, default=str))
    return changes


def _check(site: Site, options: argparse.Namespace) -> None:
    """containerd's view after the plan was carried out; nothing to do where `plan` left no view from before."""
    before = options.stage / _BEFORE
    binary = containerd_dump.binary()
    if binary is not None and before.exists():
        after = containerd_dump.dump(binary, site, options.containerd_config)
        containerd_dump.compare(json.loads(before.read_text()), after, site)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="smr.shim.register")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("plan", "check"):
        verb = verbs.add_parser(name)
        for option in ("prefix", "criu", "runtime", "stage"):
            verb.add_argument(f"--{option}", type=Path, required=True)
        verb.add_argument("--root", type=Path, default=Path("/"))
        verb.add_argument("--templates", type=Path)
        verb.add_argument("--engines", default="")
        verb.add_argument("--containerd-config", type=Path, default=containerd.CONFIG)
        verb.add_argument("--default-runtime", action="store_true")
        verb.add_argument("--setting", action="append", default=[])
    verbs.add_parser("strip").add_argument("file", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
