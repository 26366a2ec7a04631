"""`smr doctor`."""

from __future__ import annotations

from pathlib import Path

import click

from smr.shim.cli.output import json_option, print_json, progress, size


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write FILE.tar.gz, for a bug report.")
@json_option
def doctor(output: Path | None, as_json: bool) -> None:
    """Collect what a bug report needs of this node: versions, settings, checks, states, ends of logs. Secrets are left out.

    Environment variables, annotations other than SMR's, and memory are never collected. Read what you send all the same.
    """
    from smr.shim.doctor import archive
    from smr.shim.doctor.collect import collect

    if output is not None:
        archive.check_target(output)
    with progress("doctor") as step:
        step("collecting")
        report = collect()
    failed = [name for name, part in report.items() if part.error]
    if output is None:
        print_json(archive.to_json(report)) if as_json else click.echo(archive.to_text(report))
        return
    archive.write(report, output)
    written = output.stat().st_size
    if as_json:
        print_json({"file": str(output.absolute()), "bytes": written, "sections": list(report), "failed": failed})
        return
    click.echo(f"{output}  {size(written)}, {len(report)} sections{f'; not collected: {chr(44).join(failed)}' if failed else ''}")
    click.echo("look through it before you send it: tar -xOf FILE shows all of it", err=True)
