"""`smr images`: what is in the store of this node, and its upkeep; and `smr prefetch`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from smr.proto.errors import SmrError, exit_status
from smr.shim.cli.output import json_option, print_json, print_table, size

if TYPE_CHECKING:
    from smr.images.store import Broken, Image, Store
    from smr.images.verify import Verification


def _complete(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    return [image.reference for image in _store().images() if image.reference.startswith(incomplete)]


@click.group()
def images() -> None:
    """List, inspect, check and remove the checkpoint images of this node."""


@images.command("ls")
@json_option
def list_images(as_json: bool) -> None:
    """List the images, newest first."""
    store = _store()
    found, broken = store.images(), store.broken()
    if as_json:
        print_json([*(_summary(image) for image in found), *(_broken_summary(item) for item in broken)])
        return
    rows = [(*_columns(image), *_facts(image)) for image in found]
    rows += [(item.reference, item.digest[7:19], "", "", "", _unreadable(item.error)) for item in broken]
    print_table(("IMAGE", "DIGEST", "CREATED", "SIZE", "MEMORY", "CONTAINER"), rows)


@images.command("inspect")
@click.argument("image", shell_complete=_complete)
@json_option
def inspect_image(image: str, as_json: bool) -> None:
    """Show what IMAGE holds: the container it was, the machine, the processes, the layers."""
    from dataclasses import asdict

    from smr.images.prefetch import cached_share

    found = _store().resolve(image)
    share = cached_share(found)
    if as_json:
        layers = [layer.descriptor.as_json() | {"path": str(layer.path)} for layer in found.layers]
        details = {"cached_share": share, "layers": layers, "annotations": dict(found.manifest.annotations)}
        print_json(_summary(found) | details | {"config": asdict(found.config)})
        return
    for key, value in _described(found, share):
        if value:
            click.echo(f"{key:<16}{value}")
    rows = [(layer.kind.name.lower(), layer.title, size(layer.size_bytes), layer.digest[7:19]) for layer in found.layers]
    print_table(("LAYER", "NAME", "SIZE", "DIGEST"), rows)


@images.command("rm")
@click.argument("names", metavar="IMAGE...", nargs=-1, required=True, shell_complete=_complete)
@click.option("--force", "-f", is_flag=True, help="Also an image that a restore is using; its data go when that ends.")
@json_option
def remove_images(names: Sequence[str], force: bool, as_json: bool) -> None:
    """Remove images: the name, and with the last name the data that no other image needs."""
    store = _store()
    removed = []
    for name in names:
        result = store.remove(name, force=force)
        removed.append({"names": list(result.names), "digest": result.digest, "bytes": result.size_bytes})
        if not as_json:
            click.echo(f"{', '.join(result.names)}: {f'removed, {size(result.size_bytes)}' if result.digest else 'name removed'}")
    if as_json:
        print_json(removed)


@images.command("verify")
@click.argument("names", metavar="[IMAGE...]", nargs=-1, shell_complete=_complete)
@json_option
def verify_images(names: Sequence[str], as_json: bool) -> int:
    """Read every byte of the images (all of them when none is named) and compare it with the digests.

    The exit status is that of a damaged image when one is damaged.
    """
    store = _store()
    found = [store.resolve(name) for name in names] or store.images()
    broken = [] if names else store.broken()
    with _bytes_bar("verify", sum(image.size_bytes for image in found)) as progress:
        results = [store.verify(image, progress=progress) for image in found]
    if as_json:
        print_json([*(_verification(result) for result in results), *(_broken_verification(item) for item in broken)])
    else:
        _print_verifications(results, broken)
    errors = [problem.error for result in results for problem in result.problems] + [item.error for item in broken]
    return exit_status(errors[0].code) if errors else 0


@images.command("gc")
@json_option
def collect_garbage(as_json: bool) -> None:
    """Drop data that no image needs, and what killed checkpoints and imports left."""
    collected = _store().gc()
    if as_json:
        print_json({"blobs": collected.blobs, "bytes": collected.size_bytes, "ingests": collected.ingests})
        return
    click.echo(f"{collected.blobs} blobs ({size(collected.size_bytes)}), {collected.ingests} abandoned ingests")


@click.command()
@click.argument("image", shell_complete=_complete)
@click.option("--threads", type=click.IntRange(1, 64), default=8, show_default=True, help="Pieces read at a time.")
@json_option
def prefetch(image: str, threads: int, as_json: bool) -> None:
    """Read IMAGE into memory, so that the next restore from it need not wait for the disk."""
    from dataclasses import asdict

    from smr.images.prefetch import prefetch as read_ahead

    result = read_ahead(_store().resolve(image), threads=threads)
    if as_json:
        print_json(asdict(result))
        return
    left = f", {size(result.left_bytes)} left on disk for want of memory" if result.left_bytes else ""
    click.echo(f"{size(result.read_bytes)} read, {size(result.cached_bytes)} were in memory{left}")


images.add_command(prefetch)


def _store() -> Store:
    from smr.images.store import Store
    from smr.shim.config import load

    return Store(load().store)


def _columns(image: Image) -> tuple[str, str, str, str]:
    reference = image.reference if image.name else "<none>"
    return reference, image.digest[7:19], image.created[:19].replace("T", " "), size(image.size_bytes)


def _facts(image: Image) -> tuple[str, str]:
    """Memory and container, from the config; one that cannot be read is said in its line, and the list goes on."""
    try:
        config = image.config
    except SmrError as error:
        return "", _unreadable(error)
    source = config.source
    return size(config.memory_bytes), f"{source.engine} {source.container_name or source.container_id[:12]}"


def _unreadable(error: SmrError) -> str:
    return f"{error.code.value}: see 'smr images verify'"


def _described(image: Image, share: float) -> Iterator[tuple[str, str]]:
    config = image.config
    yield "image", image.reference
    yield "digest", image.digest
    yield "created", image.created
    yield "size", f"{size(image.size_bytes)}, {share:.0%} in memory"
    yield "memory", size(config.memory_bytes)
    yield "container", f"{config.source.engine} {config.source.container_name or config.source.container_id}"
    yield "source image", f"{config.source.image} {config.source.image_digest}".strip() or config.source.rootfs
    yield "host", f"{config.host.architecture}, Linux {config.host.kernel}, CRIU {config.host.criu}, {config.host.runtime}"
    yield "cpu", config.host.cpu_model
    yield "processes", ", ".join(f"{task.pid} {task.command}" for task in config.tasks)
    yield "mounts", ", ".join(config.external_mounts)
    yield "addresses", ", ".join(config.addresses)
    yield "tcp", config.tcp
    yield "pause", f"{config.pause_s:.3f} s" if config.pause_s else ""


def _summary(image: Image) -> dict[str, object]:
    return {
        "reference": image.reference,
        "name": image.name,
        "tag": image.tag,
        "digest": image.digest,
        "created": image.created,
        "size_bytes": image.size_bytes,
    }


def _broken_summary(item: Broken) -> dict[str, object]:
    return {"reference": item.reference, "digest": item.digest, "error": item.error.as_json()}


def _verification(result: Verification) -> dict[str, object]:
    problems = [{"blob": item.what, "digest": item.digest, "error": item.error.as_json()} for item in result.problems]
    return {
        "reference": result.reference,
        "ok": result.ok,
        "blobs": result.blobs,
        "size_bytes": result.size_bytes,
        "problems": problems,
    }


def _broken_verification(item: Broken) -> dict[str, object]:
    problem = {"blob": "manifest", "digest": item.digest, "error": item.error.as_json()}
    return {"reference": item.reference, "ok": False, "blobs": 0, "size_bytes": 0, "problems": [problem]}


def _print_verifications(results: Sequence[Verification], broken: Sequence[Broken]) -> None:
    for result in results:
        click.echo(f"{result.reference}: {'good' if result.ok else 'DAMAGED'}, {result.blobs} blobs, {size(result.size_bytes)}")
        for problem in result.problems:
            click.echo(f"  {problem.error.message}")
    for item in broken:
        click.echo(f"{item.reference}: DAMAGED\n  {item.error.message}")


@contextmanager
def _bytes_bar(what: str, total_bytes: int) -> Iterator[Callable[[int], object]]:
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
