"""The image of the servers, and its files unpacked: clients run there, by chroot, in the network of the host."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tests.integration import testimage
from tests.integration.command import run

NAME = "localhost/smr-programs:1"
GUEST = Path(__file__).with_name("guest")
_DEVICES = {"null": (1, 3), "zero": (1, 5), "random": (1, 8), "urandom": (1, 9)}


def archive(engines: Path) -> Path:
    """The OCI archive, made when it is not there yet. LookupError when the packages are missing."""
    copies = {f"app/{file.name}": file for file in GUEST.iterdir() if file.is_file() and file.suffix != ".java"}
    return testimage.make(engines, "programs", NAME, ("debs", "debs-programs"), copies)


def client_root(engines: Path, folder: Path) -> Path:
    """The image's files in a new `folder`, with the device nodes that programs open."""
    folder.mkdir()
    testimage.unpack(archive(engines), folder)
    for name, number in _DEVICES.items():
        os.mknod(folder / "dev" / name, stat.S_IFCHR | 0o666, os.makedev(*number))
    return folder


def classes(source: str, folder: Path) -> Path:
    """A Java program of the guest's, compiled by this machine's javac into a new `folder`."""
    folder.mkdir()
    run(["javac", "-d", folder, GUEST / source], timeout_s=120)
    return folder
