"""Images in memory: `smr prefetch`, `smr pin` and `smr unpin`; and what these share with `smr images`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from smr.proto.errors import Code, SmrError
from smr.shim.cli.output import json_option, print_json, print_table, size
from smr.shim.config import load

if TYPE_CHECKING:
    from smr.images.store import Store


def open_store() -> Store:
    """The store of this node."""
    from smr.images.store import Store

    return Store(load().store)


def run_dir() -> Path:
    """The state directory of this node."""
    return load().run


def complete_image(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of images, for the shell."""
    return [image.reference for image in open_store().images() if image.reference.startswith(incomplete)]


@click.command()
@click.argument("image", shell_complete=complete_image)
@click.option("--threads", type=click.IntRange(1, 64), help="Pieces read at a time; as many as the device makes use of.")
@json_option
def prefetch(image: str, threads: int | None, as_json: bool) -> None:
    """Read IMAGE into memory, so that the next restore from it need not wait for the disk."""
    from smr.images.prefetch import prefetch as read_ahead

    found = open_store().resolve(image)
    with bytes_bar("prefetch", sum({layer.digest: layer.size_bytes for layer in found.layers}.values())) as progress:
        result = read_ahead(found, threads=threads, share=load().cache_share, progress=progress)
    if as_json:
        print_json(asdict(result))
        return
    left = f", {size(result.left_bytes)} left on disk for want of memory" if result.left_bytes else ""
    click.echo(f"{size(result.read_bytes)} read, {size(result.cached_bytes)} were in memory{left}")


@click.command()
@click.argument("image", required=False, shell_complete=complete_image)
@click.option("--list", "list_pins", is_flag=True, help="Show what is pinned.")
@json_option
def pin(image: str | None, list_pins: bool, as_json: bool) -> None:
    """Keep IMAGE in memory until 'smr unpin' or the next boot, whatever else the node reads."""
    if list_pins == (image is not None):
        raise SmrError("needed an IMAGE or --list", hint="smr pin --help", code=Code.USAGE)
    if image is None:
        _list_pins(as_json)
        return
    from smr.images.pin import pin as keep

    store = open_store()
    found = store.resolve(image)
    with bytes_bar("pin", sum({layer.digest: layer.size_bytes for layer in found.layers}.values())) as progress:
        pinned = keep(run_dir(), store, found, share=load().cache_share, progress=progress)
    if as_json:
        print_json(asdict(pinned))
        return
    click.echo(f"{found.reference}: pinned, {size(pinned.bytes)}")


@click.command()
@click.argument("image", shell_complete=complete_image)
@json_option
def unpin(image: str, as_json: bool) -> None:
    """Let IMAGE leave memory again when the node needs it for other things."""
    from smr.images.pin import pinned_digest
    from smr.images.pin import unpin as release

    digest = pinned_digest(run_dir(), open_store(), image)
    released = release(run_dir(), digest)
    if as_json:
        print_json({"digest": digest, "unpinned": released is not None, "bytes": released.bytes if released else 0})
        return
    click.echo(f"{image}: unpinned, {size(released.bytes)}" if released else f"{image}: was not pinned")


def _list_pins(as_json: bool) -> None:
    from smr.images.pin import pins

    found = pins(run_dir())
    if as_json:
        print_json([asdict(pin) for pin in found])
        return
    print_table(
        ("IMAGE", "DIGEST", "SIZE", "PID"),
        [(pin.reference, pin.digest[7:19], size(pin.bytes), str(pin.pid)) for pin in found],
    )


@contextmanager
def bytes_bar(what: str, total_bytes: int) -> Iterator[Callable[[int], object]]:
    """A progress bar in bytes on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda count: bar.advance(task, count)
