"""`smr agent`: the agent itself, and what it answers."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from smr.shim.cli.output import json_option, print_json, print_table, size

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from smr.proto.agent.agent_pb2 import Event, Pod

_socket_option = click.option("--socket", default="", metavar="PATH", help="The agent's socket; by default that of the settings.")


@click.group(invoke_without_command=True)
@click.option("--socket", metavar="PATH", help="Where to listen for calls.  [default: agent.sock in the state directory]")
@click.option("--listen", metavar="ADDRESS", help="Metrics and health: HOST:PORT or unix:PATH; '' for none.  [127.0.0.1:9464]")
@click.option("--events", type=click.Choice(["auto", "off"]), help="Events of pods, where there is a token.  [default: auto]")
@click.pass_context
def agent(ctx: click.Context, socket: str | None, listen: str | None, events: str | None) -> None:
    """Run the node agent, or, with a command, ask the one that runs.

    It serves images and checkpoints over gRPC, metrics and health over HTTP. Restores do not need it.
    """
    if ctx.invoked_subcommand is not None:
        return
    given = {"--socket": socket, "--listen": listen, "--events": events}
    flags = [f"{name}={value}" for name, value in given.items() if value is not None]
    # A process without the command line's libraries: it stays for long, and is to be small.
    os.execv(sys.executable, [sys.executable, "-I", "-m", "smr.shim.agent.main", *flags])


@agent.command()
@click.argument("container", default="")
@_socket_option
@json_option
def status(container: str, socket: str, as_json: bool) -> int:
    """Show the agent's health, and the containers it sees, or CONTAINER. Exit status 1 when something is wrong."""
    from smr.shim.agent import client

    found = client.status(_path(socket), container)
    if as_json:
        print_json(_document(found))
        return 0 if found.healthy else 1
    click.echo(f"agent {found.version}, process {found.pid}, since {found.started}: {found.health_reason or 'healthy'}")
    print_table(
        ("CONTAINER", "POD", "STATUS", "IMAGE", "STARTED", "RESTORE", "REASON"),
        [
            (one.id[:12], _pod(one.pod), one.status, one.image, one.started[:19], f"{one.total_s * 1000:.0f} ms", one.reason)
            for one in found.containers
        ],
    )
    return 0 if found.healthy else 1


@agent.command("list")
@_socket_option
@json_option
def list_command(socket: str, as_json: bool) -> None:
    """List the images of the node, and how much of each is in memory."""
    from smr.shim.agent import client

    found = client.images(_path(socket)).images
    if as_json:
        print_json([_document(image) for image in found])
        return
    rows = [
        (
            " ".join(image.tags) or image.reference,
            image.digest[7:19],
            size(image.size_bytes),
            "pinned" if image.pinned else f"{image.cached_share:.0%}",
            image.error.message,
        )
        for image in found
    ]
    print_table(("IMAGE", "DIGEST", "SIZE", "IN MEMORY", "ERROR"), rows)


@agent.command()
@click.option("--replay", is_flag=True, help="First what the node still remembers.")
@_socket_option
@json_option
def watch(replay: bool, socket: str, as_json: bool) -> None:
    """Print what happens on the node, a line an event, until Ctrl-C."""
    import json

    from smr.shim.agent import client

    def told(event: Event) -> None:
        where = f"{_pod(event.pod)} {event.container[:12]}".strip()
        taken = f"{event.total_s * 1000:.0f} ms" if event.total_s else ""
        words = (event.time, event.kind, where, event.image, taken, event.reason_code, event.reason)
        click.echo(json.dumps(_document(event)) if as_json else "  ".join(word for word in words if word))

    client.watch(_path(socket), told, replay=replay)


def _path(given: str) -> Path:
    from smr.shim.agent.address import socket_path
    from smr.shim.config import load

    return socket_path(load(), given)


def _pod(pod: Pod) -> str:
    return f"{pod.namespace}/{pod.name}/{pod.container}" if pod.name else ""


def _document(message: Message) -> dict[str, object]:
    from google.protobuf.json_format import MessageToDict

    document: dict[str, object] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return document
