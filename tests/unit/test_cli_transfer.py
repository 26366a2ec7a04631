"""`smr import` and `smr export` as commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from smr.proto.errors import Code, SmrError
from smr.shim.cli.transfer import export_command, import_command
from tests.tar_support import file, podman_items, tar_bytes, write_tar


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node whose store is in the test's directory, with an archive beside it."""
    monkeypatch.setenv("SMR_CONFIG", str(tmp_path / "none.toml"))
    monkeypatch.setenv("SMR_STORE", str(tmp_path / "store"))
    rootfs = tar_bytes(tmp_path, [file("d/.wh..wh..opq", b""), file("d/x", b"1")])
    write_tar(
        tmp_path / "a.tar",
        podman_items({"id": "1", "rootfsImageName": "i:1"}, extra=[file("status"), file("rootfs-diff.tar", rootfs)]),
    )
    return tmp_path


def called(command: object, *words: object) -> Result:
    """The result of a command that must not fail."""
    return CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)  # type: ignore[arg-type]


def test_import_and_export_print_json(node: Path) -> None:
    """`--json` says what was made and from what; notes are part of it."""
    made = json.loads(called(import_command, node / "a.tar", "-n", "warm:1", "--json").stdout)
    assert (made["image"], made["engine"], made["source_image"]) == ("warm:1", "containerd", "i:1")
    assert {layer["kind"] for layer in made["layers"]} == {"pages", "criu", "rootfs", "engine"}
    written = json.loads(called(export_command, "warm:1", "-o", node / "b.tar.gz", "--json").stdout)
    assert written["bytes"] == (node / "b.tar.gz").stat().st_size
    assert len(written["notes"]) == 1
    oci = json.loads(called(export_command, "warm:1", "-o", node / "c.tar", "--format", "oci", "--json").stdout)
    assert (oci["digest"], oci["notes"]) == (made["digest"], [])


def test_notes_go_to_stderr(node: Path) -> None:
    """Without `--json` stdout has one line, and what podman's format cannot hold is said on stderr."""
    assert called(import_command, node / "a.tar", "-n", "warm:1").stdout.startswith("warm:1  sha256:")
    result = called(export_command, "warm:1", "-o", node / "b.tar.gz")
    assert "smr: note: /d was emptied" in result.output
    assert len([line for line in result.output.splitlines() if not line.startswith("smr: note: ")]) == 1


def test_an_existing_name_can_be_kept(node: Path) -> None:
    """`--no-replace` refuses a name that is taken."""
    called(import_command, node / "a.tar", "-n", "warm:1", "--no-replace")
    with pytest.raises(SmrError) as caught:
        called(import_command, node / "a.tar", "-n", "warm:1", "--no-replace")
    assert caught.value.code is Code.IMAGE_EXISTS


def test_a_wrong_name_is_refused_before_the_archive_is_read(node: Path) -> None:
    """A name that is no reference fails at once, whatever the archive is."""
    with pytest.raises(SmrError) as caught:
        called(import_command, node / "none.tar", "-n", "Not A Name")
    assert caught.value.code is Code.ANNOTATION_INVALID
