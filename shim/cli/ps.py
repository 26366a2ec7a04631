"""`smr ps`."""

from __future__ import annotations

import click

from smr.shim.cli.output import json_option, print_json, print_table


@click.command()
@json_option
def ps(as_json: bool) -> None:
    """List the containers of this node that asked for a restore: restored ones, and cold ones with the reason."""
    from smr.shim.config import load
    from smr.shim.inspect import summaries

    found = summaries(load())
    if as_json:
        print_json([summary.as_json() for summary in found])
        return
    rows = [(s.id[:12], s.status, s.image, s.started[:19], f"{s.total_s * 1000:.0f} ms", str(s.pid), s.reason) for s in found]
    print_table(("CONTAINER", "STATUS", "IMAGE", "STARTED", "RESTORE", "PID", "REASON"), rows)
