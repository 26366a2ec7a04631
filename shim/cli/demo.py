"""`smr demo`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from smr.shim.cli.output import json_option, print_json, print_table, progress
from smr.shim.demo.server import SIZES

_ENGINES = ("podman", "containerd")


@click.command()
@click.option("--params", type=click.Choice(list(SIZES)), default="400m", show_default=True, help="Parameters of the model.")
@click.option("--runs", type=click.IntRange(min=1), default=1, show_default=True, help="Starts of each kind; medians are shown.")
@click.option("--engine", "engines", type=click.Choice(_ENGINES), multiple=True, help="Only this engine; may be repeated.")
@click.option(
    "--python",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Interpreter with torch and transformers, for the server.  [default: SMR's own]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("smr-demo.html"),
    show_default=True,
    help="The picture: FILE.html or FILE.png.",
)
@json_option
def demo(params: str, runs: int, engines: tuple[str, ...], python: Path | None, output: Path, as_json: bool) -> int:
    """Start an inference server cold, checkpoint it, restore it by annotation, and compare times and tokens.

    A LLaMA-architecture model with random weights answers over HTTP in a container whose root is this machine's own under a
    layer in memory. podman and containerd run with storage and state of their own, and everything is removed at the end.
    Exit status 1 when an engine failed or the tokens differ.
    """
    from smr.shim import trace
    from smr.shim.config import load
    from smr.shim.demo import report
    from smr.shim.demo.demo import Plan, machine, measure

    trace.check_target(output)
    # Not resolved: a virtual environment's interpreter is a link, and is known by its place.
    plan = Plan(params=params, runs=runs, engines=engines or _ENGINES, python=(python or Path(sys.executable)).absolute())
    with progress("demo") as step:
        result = measure(plan, load(), step)
    done = report.restored(result)
    if done:
        trace.write(report.chart(result), output)
    if as_json:
        print_json(report.as_json(result))
    else:
        click.echo(f"{result.model} on {machine()}; time to first token, median of {runs}")
        print_table(report.COLUMNS, report.rows(result))
        if done:
            click.echo()
            print_table(("STAGE", *(outcome.engine.upper() for outcome in done)), report.stage_rows(result))
    for outcome in result.outcomes:
        if outcome.skipped or outcome.error is not None:
            click.echo(f"{outcome.engine}: {outcome.skipped or outcome.error}", err=True)
    if done:
        click.echo(f"picture: {output}", err=True)
    return 0 if all(outcome.error is None and outcome.tokens_equal for outcome in result.outcomes) else 1
