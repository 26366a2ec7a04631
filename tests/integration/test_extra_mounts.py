"""Mounts, masked and read-only paths that the new container's spec has and the checkpoint had not, on real runtimes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.command import run
from tests.integration.runc import Edit, Runc

FAIL = {"smr.fallback": "fail"}
COMMAND = ("python3", "/app/workload.py")


@pytest.fixture
def sources(restoring_runc: Runc) -> Iterator[Path]:
    """Folders of the host's."""
    folder = restoring_runc.path.with_name(f"{restoring_runc.path.name}-sources")
    for name in ("kept", "token", "parent", "parent/below", "outer"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text(f"{name}\n")
    (folder / "single").write_text("single\n")
    yield folder
    run(["rm", "-r", folder])


def bind(destination: str, source: Path, *options: str) -> dict[str, object]:
    """An entry of `mounts`."""
    return {"destination": destination, "type": "bind", "source": str(source), "options": ["rbind", *options]}


def mounting(*mounts: dict[str, object], **linux: list[str]) -> Edit:
    """A spec with these mounts, and these lists of paths."""

    def edit(spec: dict[str, object]) -> None:
        entries, part = spec["mounts"], spec["linux"]
        assert isinstance(entries, list)
        assert isinstance(part, dict)
        entries += mounts
        part.update(linux)

    return edit


def test_what_the_checkpoint_had_not(restoring_runc: Runc, sources: Path) -> None:
    """Folders, a file, a tmpfs, one below another, one over a mount of the checkpoint's: all there, as in a cold start."""
    runc = restoring_runc
    runc.start("source", edit=mounting(bind("/outer/kept", sources / "kept"), maskedPaths=[], readonlyPaths=[]))
    runc.ready("source")
    runc.exec("source", "sh", "-c", "ln -s /run /var/link; mkdir /secret; echo s >/secret/s; echo t >/secret-file; mkdir /frozen")
    runc.checkpoint("source", "extra:1")
    runc.remove("source")
    edit = mounting(
        bind("/outer", sources / "outer"),
        bind("/outer/kept", sources / "kept"),
        bind("/var/link/token", sources / "token", "ro", "nosuid", "nodev", "noexec"),
        bind("/etc/single", sources / "single"),
        {"destination": "/scratch", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "size=64k", "mode=1750"]},
        bind("/scratch/deep", sources / "parent", "ro", "rslave"),
        maskedPaths=["/proc/version", "/secret", "/secret-file", "/not-there"],
        readonlyPaths=["/proc/sys", "/frozen", "/not-there"],
    )
    folder = runc.bundle("again", *COMMAND, annotations={"smr.restore": "extra:1", **FAIL}, edit=edit)
    runc.create("again", folder)
    runc("start", "again")

    def shell(command: str) -> str:
        return runc.exec("again", "sh", "-c", f"({command}) 2>&1", check=False).stdout.strip()

    assert runc.ask("again", "count")["count"] == 1
    assert shell(
        "cat /outer/file /outer/kept/file /run/token/file /etc/single /scratch/deep/file /scratch/deep/below/file"
    ).split() == [*("outer", "kept", "token", "single", "parent", "parent/below")]
    assert shell("stat -c %a /scratch") == "1750"
    shell("head -c 100000 /dev/zero >/scratch/large")
    assert int(shell("stat -c %s /scratch/large")) <= 64 << 10
    assert "ead-only" in shell("touch /run/token/new")
    assert "ead-only" in shell("touch /scratch/deep/new")
    assert shell("echo more >>/etc/single; echo new >/outer/new; echo new >/outer/kept/new") == ""
    assert (sources / "single").read_text() == "single\nmore\n"
    assert (sources / "outer/new").exists()
    assert (sources / "kept/new").exists()
    assert shell("ls -A /secret; cat /secret-file; head -c 1 /proc/version") == ""
    assert "ead-only" in shell("echo x >/proc/sys/kernel/hostname")
    assert "ead-only" in shell("touch /frozen/new")
    warnings = runc.node.records()["again"]["warnings"]
    assert warnings == []
    runc.checkpoint("again", "extra:2")
    runc.remove("again")
    folder = runc.bundle("again", *COMMAND, annotations={"smr.restore": "extra:2", **FAIL}, edit=edit)
    runc.create("again", folder)
    runc("start", "again")
    assert runc.ask("again", "count")["count"] == 2
    assert shell("cat /outer/kept/new /scratch/deep/file; ls -A /secret; cat /secret-file").split() == ["new", "parent"]
