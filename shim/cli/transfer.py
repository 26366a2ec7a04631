"""`smr import` and `smr export`."""

from __future__ import annotations

from pathlib import Path

import click

from smr.shim.cli.output import json_option, print_json, progress, size


@click.command("import")
@click.argument("archive", type=click.Path(path_type=Path))
@click.option("-n", "--name", required=True, metavar="NAME[:TAG]", help="Name of the image to make.")
@click.option("--no-replace", is_flag=True, help="Fail when an image of that name exists.")
@json_option
def import_command(archive: Path, name: str, no_replace: bool, as_json: bool) -> None:
    """Make an image of a checkpoint archive.

    ARCHIVE is what 'podman container checkpoint --export', CRI-O, 'ctr images export --skip-manifest-json' of a containerd
    checkpoint, or 'smr export' has written, plain or compressed. It is not trusted: what is unsafe or damaged in it is refused,
    and nothing is left behind.
    """
    from smr.images.archive import import_archive
    from smr.images.store import Store
    from smr.shim.config import load

    with progress(f"importing {archive.name}"):
        image = import_archive(archive, Store(load().store), name, replace=not no_replace)
    source = image.config.source
    if as_json:
        layers = [{"kind": layer.kind.name.lower(), "title": layer.title, "bytes": layer.size_bytes} for layer in image.layers]
        document = {"image": image.reference, "digest": image.digest, "bytes": image.size_bytes, "layers": layers}
        print_json(document | {"engine": source.engine, "container": source.container_name, "source_image": source.image})
        return
    click.echo(f"{image.reference}  {image.digest}  {size(image.size_bytes)}")


@click.command("export")
@click.argument("image")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="File to write.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["podman", "oci"]),
    default="podman",
    show_default=True,
    help="podman: for 'podman container restore --import'; oci: the image itself, for 'smr import' and OCI tools.",
)
@json_option
def export_command(image: str, output: Path, form: str, as_json: bool) -> None:
    """Write an image to a file.

    With --format podman the file's name decides the compression: .tar is plain, .tar.zst zstd, anything else gzip.
    """
    from smr.images.archive import export_archive
    from smr.images.store import Store
    from smr.shim.config import load

    with Store(load().store).leased(image) as found, progress(f"exporting {found.reference}"):
        notes = export_archive(found, output, format=form)
    written = output.stat().st_size
    if as_json:
        print_json({"image": found.reference, "digest": found.digest, "file": output, "bytes": written, "notes": list(notes)})
        return
    for note in notes:
        click.echo(f"smr: note: {note}", err=True)
    click.echo(f"{output}  {size(written)}")
