"""containerd-shim-smr-v1, the part behind the sh fast path: an annotated container's `start` and `delete`.

The stock shim does all the work; before it is exec'ed, the pages of the image are read ahead by a process of its own, and a
folder in which `runc` and `crun` are smr-runtime is put first on PATH. So it is our runtime that the stock shim finds for an
empty BinaryName, and that nvidia-container-runtime finds below itself. An absolute BinaryName that is runc itself goes past us:
that is said in the log, for the request cannot be changed here.

stdout carries the shim protocol and stderr would corrupt the start reply: nothing is printed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from smr.proto.annotations import parse
from smr.proto.errors import SmrError
from smr.proto.oci import load_spec
from smr.shim import config as settings
from smr.shim.config import Config

FOLDER = "smr-path"  # the sh part of smr-runtime passes over a folder of this name when it looks for the real runtime


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare and become the stock shim; `argv` is the stock shim and its arguments."""
    stock, *arguments = sys.argv[1:] if argv is None else argv
    config = settings.load()
    real = _real_runtime(config)
    folder = make_path_folder(config.run)
    if "start" in arguments:
        start_prefetch(config, Path.cwd())
    env = {**os.environ, "PATH": f"{folder}:{os.environ.get('PATH', os.defpath)}", "SMR_RUNTIME": real}
    os.execvpe(stock, [stock, *arguments], env)


def _real_runtime(config: Config) -> str:
    """What `runc` would have been without us."""
    path = os.pathsep.join(part for part in os.get_exec_path() if Path(part).name != FOLDER)
    configured = Path("/etc/smr/runtime")
    names = [os.environ.get("SMR_RUNTIME", ""), config.runtime, _first_line(configured), "runc", "crun"]
    return next((found for name in names if name and (found := shutil.which(name, path=path))), "runc")


def _first_line(file: Path) -> str:
    try:
        return next(iter(file.read_text().splitlines()), "")
    except OSError:
        return ""


def make_path_folder(run: Path) -> Path:
    """The folder with `runc` and `crun` as links to smr-runtime, which lies beside this interpreter."""
    folder = run / FOLDER
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    target = Path(sys.executable).parent / "smr-runtime"
    for name in ("runc", "crun"):
        link = folder / name
        if not link.is_symlink() or link.readlink() != target:
            temporary = folder / f".{name}.{os.getpid()}"
            temporary.symlink_to(target)
            temporary.rename(link)
    return folder


def start_prefetch(config: Config, bundle: Path) -> None:
    """Read ahead what the annotation of the bundle names. Whatever is wrong with it is for `create` to report."""
    try:
        annotations = parse(load_spec(bundle).annotations)
    except SmrError:
        return
    if annotations is not None:
        start_prefetch_of(config, annotations.restore)


def start_prefetch_of(config: Config, reference: str) -> None:
    """Read an image's pages ahead in a process that nobody waits for."""
    # Its own session and stdio: containerd waits for the end of file of the shim's pipes.
    argv = [sys.executable, "-I", "-m", "smr.images.prefetch", str(config.store), reference]
    null = subprocess.DEVNULL
    try:
        subprocess.Popen(argv, stdin=null, stdout=null, stderr=null, start_new_session=True)
    except OSError:
        return


if __name__ == "__main__":
    main()
