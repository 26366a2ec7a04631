"""`smr completion`."""

from __future__ import annotations

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for SHELL: eval "$(smr completion bash)"."""
    from click.shell_completion import get_completion_class

    from smr.shim.cli import cli

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "smr", "_SMR_COMPLETE").source())
