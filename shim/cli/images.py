"""`smr images`: what is in the store of this node, and its upkeep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from smr.proto.errors import Code, SmrError, exit_status
from smr.shim.cli.memory import bytes_bar, complete_image, open_store, prefetch, run_dir
from smr.shim.cli.output import json_option, print_json, print_table, size

if TYPE_CHECKING:
    from smr.images.pin import Pin
    from smr.images.store import Broken, Image, Removed, Store
    from smr.images.verify import Verification
    from smr.proto.checkpoint import CheckpointConfig


@click.group()
def images() -> None:
    """List, inspect, check and remove the checkpoint images of this node."""


@images.command("ls")
@json_option
def list_images(as_json: bool) -> None:
    """List the images, newest first."""
    store, pinned = open_store(), _pinned()
    found, broken = store.images(), store.broken()
    if as_json:
        print_json([*(_summary(image, pinned) for image in found), *(_broken_summary(item) for item in broken)])
        return
    rows = [(*_columns(image), _cached(image, pinned), *_facts(image)) for image in found]
    rows += [(item.reference, item.digest[7:19], "", "", "", "", _unreadable(item.error)) for item in broken]
    print_table(("IMAGE", "DIGEST", "CREATED", "SIZE", "CACHED", "MEMORY", "CONTAINER"), rows)


@images.command("inspect")
@click.argument("image", shell_complete=complete_image)
@json_option
def inspect_image(image: str, as_json: bool) -> None:
    """Show what IMAGE holds: the container it was, the machine, the processes, the layers."""
    from dataclasses import asdict

    found, pinned = open_store().resolve(image), _pinned()
    if as_json:
        layers = [layer.descriptor.as_json() | {"path": str(layer.path)} for layer in found.layers]
        details = {"layers": layers, "annotations": dict(found.manifest.annotations)}
        print_json(_summary(found, pinned) | details | {"config": asdict(found.config)})
        return
    for key, value in _described(found, _cached(found, pinned)):
        if value:
            click.echo(f"{key:<16}{value}")
    if options := list(_options(found.config)):
        print_table(("CRIU OPTION", "AT", "VALUE", "WHY"), options)
        click.echo()
    rows = [(layer.kind.name.lower(), layer.title, size(layer.size_bytes), layer.digest[7:19]) for layer in found.layers]
    print_table(("LAYER", "NAME", "SIZE", "DIGEST"), rows)


@images.command("rm")
@click.argument("names", metavar="IMAGE...", nargs=-1, required=True, shell_complete=complete_image)
@click.option("--force", "-f", is_flag=True, help="Also an image that a restore is using; its data go when that ends.")
@json_option
def remove_images(names: Sequence[str], force: bool, as_json: bool) -> None:
    """Remove images: the name, and with the last name the data that no other image needs."""
    store = open_store()
    removed = []
    for name in names:
        result = _remove(store, name, force)
        removed.append({"names": list(result.names), "digest": result.digest, "bytes": result.size_bytes})
        if not as_json:
            click.echo(f"{', '.join(result.names)}: {f'removed, {size(result.size_bytes)}' if result.digest else 'name removed'}")
    if as_json:
        print_json(removed)


def _remove(store: Store, name: str, force: bool) -> Removed:
    """A pin is a lease: forced, it ends first, so that the memory is given back too."""
    from smr.images.pin import find_pin, unpin

    try:
        return store.remove(name)
    except SmrError as error:
        if error.code is not Code.IMAGE_IN_USE:
            raise
        image = store.resolve(name)
        if find_pin(run_dir(), image.digest) is None and not force:
            raise
        if not force:
            raise SmrError(
                f"image {image.reference} is pinned in memory",
                hint=f"'smr unpin {image.reference}' first, or 'smr images rm --force {image.reference}'",
                code=Code.IMAGE_IN_USE,
                image=image.reference,
            ) from error
        unpin(run_dir(), image.digest)
    return store.remove(name, force=True)


@images.command("verify")
@click.argument("names", metavar="[IMAGE...]", nargs=-1, shell_complete=complete_image)
@json_option
def verify_images(names: Sequence[str], as_json: bool) -> int:
    """Read every byte of the images (all of them when none is named) and compare it with the digests.

    The exit status is that of a damaged image when one is damaged.
    """
    store = open_store()
    found = [store.resolve(name) for name in names] or store.images()
    broken = [] if names else store.broken()
    with bytes_bar("verify", sum(image.size_bytes for image in found)) as progress:
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
    collected = open_store().gc()
    if as_json:
        print_json({"blobs": collected.blobs, "bytes": collected.size_bytes, "ingests": collected.ingests})
        return
    click.echo(f"{collected.blobs} blobs ({size(collected.size_bytes)}), {collected.ingests} abandoned ingests")


images.add_command(prefetch)


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


def _described(image: Image, cached: str) -> Iterator[tuple[str, str]]:
    config = image.config
    yield "image", image.reference
    yield "digest", image.digest
    yield "created", image.created
    yield "size", f"{size(image.size_bytes)}, in memory: {cached}"
    yield "memory", size(config.memory_bytes)
    yield "container", f"{config.source.engine} {config.source.container_name or config.source.container_id}"
    yield "source image", f"{config.source.image} {config.source.image_digest}".strip() or config.source.rootfs
    yield "host", f"{config.host.architecture}, Linux {config.host.kernel}, CRIU {config.host.criu}, {config.host.runtime}"
    yield "cpu", config.host.cpu_model
    yield "processes", ", ".join(f"{task.pid} {task.command}" for task in config.tasks)
    yield from _gpus(config)
    yield "mounts", ", ".join(config.external_mounts)
    yield "addresses", ", ".join(config.addresses)
    yield "tcp", _connections(config)
    yield "pause", f"{config.pause_s:.3f} s" if config.pause_s else ""
    yield "quiesce", config.hooks.quiesce
    yield "resume", config.hooks.resume


def _options(config: CheckpointConfig) -> Iterator[tuple[str, str, str, str]]:
    """CRIU's options: those that the dump had, and which of them a restore has too."""
    for name in sorted({*config.criu_dump, *config.criu_options}):
        both = (name in config.criu_dump, name in config.criu_options)
        at = {(True, True): "dump, restore", (True, False): "dump"}.get(both, "restore")
        yield name, at, ", ".join(config.criu_dump.get(name, "").split("\n")), config.criu_why.get(name, "")


def _connections(config: CheckpointConfig) -> str:
    found = config.connections
    if found is None:
        return f"{config.tcp}, by CRIU"
    saved = f", {found.saved} of them saved" if found.saved else ""
    return f"{config.tcp}; connected sockets: {found.inner} inside, {found.outer} to others{saved}"


def _gpus(config: CheckpointConfig) -> Iterator[tuple[str, str]]:
    """A line for all GPUs of a model, and one for what each process had of GPU memory."""
    state = config.gpu
    if state is None:
        return
    counts = Counter(f"{gpu.name}, {size(gpu.memory_bytes)}" for gpu in state.gpus)
    models = "; ".join(f"{count} x {model}" for model, count in counts.items())
    yield "gpus", f"{models or 'none'}; driver {state.driver}"
    names = {task.pid: f"{task.pid} {task.command}" for task in config.tasks}
    yield (
        "gpu memory",
        ", ".join(
            f"{names.get(task.pid, task.pid)}: {' + '.join(size(count) for count in task.vram_bytes.values()) or size(0)}"
            for task in state.tasks
        ),
    )


def _pinned() -> Mapping[str, Pin]:
    from smr.images.pin import pins

    return {pin.digest: pin for pin in pins(run_dir())}


def _cached(image: Image, pinned: Mapping[str, Pin]) -> str:
    from smr.images.prefetch import cached_share

    return "pinned" if image.digest in pinned else f"{cached_share(image):.0%}"


def _summary(image: Image, pinned: Mapping[str, Pin]) -> dict[str, object]:
    from smr.images.prefetch import cached_share

    return {
        "reference": image.reference,
        "name": image.name,
        "tag": image.tag,
        "digest": image.digest,
        "created": image.created,
        "size_bytes": image.size_bytes,
        "cached_share": cached_share(image),
        "pinned": image.digest in pinned,
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
