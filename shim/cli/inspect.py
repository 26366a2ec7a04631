"""`smr inspect`."""

from __future__ import annotations

import click

from smr.shim.cli.output import json_option, print_json, print_table


@click.command()
@click.argument("container")
@json_option
def inspect(container: str, as_json: bool) -> None:
    """Show what a CONTAINER was restored from, with which options, and how long each stage took."""
    from smr.shim.config import load
    from smr.shim.inspect import find, summary_of

    state = find(load(), container)
    summary = summary_of(state)
    if as_json:
        print_json({**summary.as_json(), **summary.details(state)})
        return
    for key, value in {**summary.as_json(), **summary.details(state)}.items():
        if key not in {"stages", "stages_s", "criu_options", "criu_why"} and value not in ("", [], {}, None):
            click.echo(f"{key:<16}{value}")
    print_table(("CRIU OPTION", "WHY"), sorted(state.record.criu_why.items()))
    click.echo()
    stages = state.record.stages
    rows = [
        (
            s.name,
            f"{s.start_s * 1000:.1f}",
            f"{s.end_s * 1000:.1f}",
            f"{(s.end_s - s.start_s) * 1000:.1f}",
            f"{s.cpu_s * 1000:.1f}",
        )
        for s in stages
    ]
    print_table(("STAGE", "FROM ms", "TO ms", "TOOK ms", "CPU ms"), rows)
