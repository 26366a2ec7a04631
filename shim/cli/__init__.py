"""The `smr` command: one module a command or group, put together here. Nothing is imported before a command needs it."""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import click

from smr.proto.errors import Code, SmrError, exit_status

# Command -> module under smr.shim.cli and the object in it. Loaded when it is called, or listed by --help.
_COMMANDS = {
    "agent": ("agent", "agent"),
    "check": ("check", "check"),
    "checkpoint": ("checkpoint", "checkpoint"),
    "completion": ("completion", "completion"),
    "demo": ("demo", "demo"),
    "doctor": ("doctor", "doctor"),
    "export": ("transfer", "export_command"),
    "gc": ("gc", "gc"),
    "images": ("images", "images"),
    "import": ("transfer", "import_command"),
    "inspect": ("inspect", "inspect"),
    "pin": ("memory", "pin"),
    "prefetch": ("memory", "prefetch"),
    "ps": ("ps", "ps"),
    "restore": ("restore", "restore"),
    "trace": ("trace", "trace"),
    "unpin": ("memory", "unpin"),
}


class _Lazy(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands."""
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name]
        command = getattr(importlib.import_module(f"smr.shim.cli.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="smr-restore", prog_name="smr")
def cli() -> None:
    """Save, Migrate, Resume: containers that start by restoring a checkpoint of a warm one.

    Start a container with the annotation smr.restore=IMAGE, and it comes up as it was at the checkpoint.
    """


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script. Exit status: see docs/cli.md."""
    arguments = sys.argv[1:] if argv is None else argv
    ended: list[int] = []
    try:
        with _ended_as_interrupted(ended):
            result = cli.main(arguments, prog_name="smr", standalone_mode=False)
    except SmrError as error:
        _fail(error, "--json" in arguments)
    except (click.Abort, KeyboardInterrupt):
        _fail(SmrError("interrupted", code=Code.INTERNAL), as_json=False, status=128 + (ended or [signal.SIGINT])[0])
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    sys.exit(result if isinstance(result, int) else 0)


@contextlib.contextmanager
def _ended_as_interrupted(ended: list[int]) -> Iterator[None]:
    """SIGTERM and SIGHUP end a command as Ctrl-C does, so that it takes back what it has done; they are noted in `ended`.

    Only the first does: the next would end that. One that the caller ignores (nohup) stays ignored.
    """

    def end(number: int, frame: FrameType | None) -> None:
        ended.append(number)
        if len(ended) == 1:
            raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, end) for number in numbers if signal.getsignal(number) is signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(error: SmrError, as_json: bool, status: int | None = None) -> None:
    if as_json:
        click.echo(json.dumps({"error": error.as_json()}))
    click.echo(f"smr: {error.message}", err=True)
    if error.hint:
        click.echo(f"     {error.hint}", err=True)
    sys.exit(exit_status(error.code) if status is None else status)
