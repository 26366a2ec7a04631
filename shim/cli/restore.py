"""`smr restore`."""

from __future__ import annotations

import shlex

import click

from smr.shim.cli.output import json_option, print_json


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("image")
@click.option("--engine", type=click.Choice(["auto", "podman", "containerd"]), default="auto", show_default=True)
@click.option("--name", default="", help="Name of the new container.")
@click.option("--dry-run", is_flag=True, help="Print the engine's command and do not run it.")
@json_option
@click.argument("engine_args", nargs=-1, type=click.UNPROCESSED)
def restore(image: str, engine: str, name: str, dry_run: bool, as_json: bool, engine_args: tuple[str, ...]) -> None:
    """Start a container from IMAGE with the engine it came from. ENGINE_ARGS after -- go to the engine's run command."""
    from smr.images.store import Store
    from smr.proto.errors import Code
    from smr.shim import launch
    from smr.shim.config import load
    from smr.shim.run import run

    found = Store(load().store).resolve(image)
    argv = launch.command(found.reference, found.config, engine, name, engine_args)
    if dry_run:
        print_json({"command": argv}) if as_json else click.echo(shlex.join(argv))
        return
    result = run(argv, timeout_s=600, code=Code.ENGINE_FAILED)
    started = result.stdout.strip().splitlines()
    container = started[-1] if started else name
    print_json({"command": argv, "container": container}) if as_json else click.echo(container)
