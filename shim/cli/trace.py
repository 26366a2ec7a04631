"""`smr trace`."""

from __future__ import annotations

from pathlib import Path

import click

from smr.shim.cli.output import json_option, print_json


@click.command()
@click.argument("container")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="FILE.html, or FILE.png with Pillow."
)
@json_option
def trace(container: str, output: Path, as_json: bool) -> None:
    """Draw the stages of a CONTAINER's restore over time: which took how long, and which ran side by side."""
    from smr.shim import inspect
    from smr.shim import trace as picture
    from smr.shim.config import load

    picture.check_target(output)
    state = inspect.find(load(), container)
    name = "" if state.record.id.startswith(container) else container
    picture.write(picture.chart(state.record, name), output)
    if as_json:
        print_json(
            {"file": str(output.absolute()), "container": state.record.id, "total_s": picture.total_s(state.record.stages)}
        )
        return
    click.echo(f"wrote {output}")
