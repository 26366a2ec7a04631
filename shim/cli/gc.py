"""`smr gc`."""

from __future__ import annotations

import click

from smr.shim.cli.output import json_option, print_json, size


@click.command()
@json_option
def gc(as_json: bool) -> None:
    """Clean up after what was killed: broken creates, records of containers that are gone, blobs nothing refers to."""
    from smr.images.store import Store
    from smr.shim.config import load
    from smr.shim.sweep import sweep

    config = load()
    swept = sweep(config)
    collected = Store(config.store).gc()
    if as_json:
        print_json(
            {
                "containers": swept.containers,
                "restores": swept.restores,
                "problems": swept.problems,
                "blobs": collected.blobs,
                "bytes": collected.size_bytes,
            }
        )
        return
    for problem in swept.problems:
        click.echo(f"smr: warning: {problem}", err=True)
    restores = f"{swept.restores} restore directories, " if swept.restores else ""
    click.echo(f"{len(swept.containers)} containers, {restores}{collected.blobs} blobs ({size(collected.size_bytes)})")
