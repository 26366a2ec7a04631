"""`smr checkpoint`."""

from __future__ import annotations

import click

from smr.shim.cli.output import json_option, print_json, progress, size


@click.command()
@click.argument("container")
@click.option("-n", "--name", required=True, help="Name of the image: NAME[:TAG].")
@click.option("--engine", type=click.Choice(["auto", "podman", "containerd", "runc"]), default="auto", show_default=True)
@click.option("--root", default="", help="The runtime's --root, for containers of a runtime driven by hand.")
@click.option("--leave-running/--stop", default=True, show_default=True, help="What becomes of the container afterwards.")
@click.option(
    "--tcp",
    type=click.Choice(["close", "established", "auto"]),
    default="close",
    show_default=True,
    help="Connections to others. close: they are not saved, and go on here. established, auto: they are saved.",
)
@click.option(
    "--compress", is_flag=True, help="Store memory compressed where that pays: less to read from a slow disk or to send."
)
@click.option("--quiesce", default="", metavar="HOOK", help="What the container does before it is paused (smr.quiesce).")
@click.option("--resume", default="", metavar="HOOK", help="What undoes that, now and after each restore (smr.resume).")
@click.option("--hook-timeout", default=0.0, metavar="SECONDS", help="For each step of the hooks; 30 by default.")
@json_option
def checkpoint(
    container: str,
    name: str,
    engine: str,
    root: str,
    leave_running: bool,
    tcp: str,
    compress: bool,
    quiesce: str,
    resume: str,
    hook_timeout: float,
    as_json: bool,
) -> None:
    """Make an image of a running CONTAINER (name or id of podman, containerd or the runtime)."""
    from smr.proto.annotations import Tcp
    from smr.shim import checkpoint as work
    from smr.shim import rootless
    from smr.shim.config import load
    from smr.shim.engines import locate
    from smr.shim.hold import hooks_of
    from smr.shim.real_runtime import real_runtime

    rootless.check()  # before files of others are looked into
    config = load()
    target = locate.find(container, engine=engine, runtime=real_runtime(config), root=root)
    hooks = hooks_of(target, quiesce, resume, hook_timeout)
    with progress(f"checkpoint {container}") as step:
        result = work.checkpoint(
            target, name, config, tcp=Tcp(tcp), stop=not leave_running, compress=compress, hooks=hooks, progress=step
        )
    image = result.image
    if as_json:
        print_json(
            {
                "image": image.reference,
                "digest": image.digest,
                "size_bytes": image.size_bytes,
                "engine": target.engine.value,
                "container": target.id,
                "pause_s": result.pause_s,
                "stages_s": result.stages_s,
                "warnings": list(result.warnings),
            }
        )
        return
    for warning in result.warnings:
        click.echo(f"smr: warning: {warning}", err=True)
    click.echo(f"{image.reference}  {image.digest[:19]}  {size(image.size_bytes)}  paused for {result.pause_s:.2f} s")
    click.echo(f"restore it with: smr restore {image.reference}, or annotation smr.restore={image.reference}")
