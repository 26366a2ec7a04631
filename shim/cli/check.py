"""`smr check`."""

from __future__ import annotations

import click

from smr.shim.cli.output import json_option, print_json, print_table


@click.command()
@click.argument("image", required=False)
@json_option
def check(image: str | None, as_json: bool) -> int:
    """Check what a restore needs of this node, and, with IMAGE, that image against it. Exit status 1 when it cannot work."""
    from smr.shim.check import Level, check_image, check_node
    from smr.shim.config import load

    config = load()
    findings = check_node(config) + (check_image(config, image) if image else [])
    ok = not any(finding.level is Level.ERROR for finding in findings)
    if as_json:
        print_json({"ok": ok, "findings": [finding.as_json() for finding in findings]})
    else:
        print_table(("LEVEL", "WHAT", "FOUND", "NEEDED", "FIX"), [(f.level, f.what, f.found, f.needed, f.fix) for f in findings])
        click.echo("ok" if ok else "not ready")
    return 0 if ok else 1
