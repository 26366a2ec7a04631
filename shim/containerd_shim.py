"""containerd-shim-smr-v1, the part behind the sh fast path: an annotated container's `start` and `delete`.

The stock shim does all the work; before it is exec'ed, the pages of the image are read ahead by a process of its own, and a
folder in which `runc` and `crun` are smr-runtime is put first on PATH. So it is our runtime that the stock shim finds for an
empty BinaryName, and that nvidia-container-runtime finds below itself. An absolute BinaryName that is runc or crun itself goes
past us: that is said in the log and in the container's record, for the request cannot be changed here.

stdout carries the shim protocol, and containerd reads stderr into the same reply: nothing is printed but a failure's reason.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from smr.proto.annotations import parse
from smr.proto.errors import Code, SmrError
from smr.proto.oci import load_spec
from smr.shim import config as settings
from smr.shim.config import Config
from smr.shim.containerd_options import RuncOptions, parse_start, read_bundle
from smr.shim.real_runtime import FOLDER, NAMES, real_runtime


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare and become the stock shim; `argv` is the stock shim and its arguments. Returns only when that failed."""
    stock, *arguments = sys.argv[1:] if argv is None else argv
    try:
        env = prepare(arguments, settings_or_defaults(), Path.cwd())
        os.execvpe(stock, [stock, *arguments], env)
    except (OSError, SmrError) as error:
        print(f"smr: cannot start {stock}: {error}", file=sys.stderr)  # noqa: T201  # the end of this start
    return 1


def settings_or_defaults() -> Config:
    """Settings of this node. Bad ones are for `create` to report, through a shim that runs."""
    try:
        return settings.load()
    except SmrError:
        return settings.defaults()


def prepare(arguments: Sequence[str], config: Config, bundle: Path) -> dict[str, str]:
    """All that comes before the stock shim; returns its environment."""
    starting = "start" in arguments
    options = parse_start(stdin_again()) if starting else read_bundle(bundle)
    folder = make_path_folder(config.run)
    if starting:
        note_bypass(arguments, config, bundle, options)
        start_prefetch(config, bundle)
    path = f"{folder}:{os.environ.get('PATH', os.defpath)}"
    real = real_runtime(config, asked="crun" if options.binary_name == "crun" else "")
    return {**os.environ, "PATH": path, "SMR_RUNTIME": real}


def stdin_again() -> bytes:
    """Read all of stdin, and put the same bytes there for the stock shim. A terminal is left alone."""
    if stat.S_ISCHR(os.fstat(0).st_mode):
        return b""
    with open(0, "rb", closefd=False) as stdin:  # a descriptor
        data = stdin.read()
    copy = os.memfd_create("stdin")
    try:
        with open(copy, "wb", closefd=False) as file:
            file.write(data)
        os.lseek(copy, 0, os.SEEK_SET)
        os.dup2(copy, 0)
    finally:
        os.close(copy)
    return data


def note_bypass(arguments: Sequence[str], config: Config, bundle: Path, options: RuncOptions) -> None:
    """Say where a user looks that a BinaryName keeps us from restoring. Nothing of this may fail the container."""
    name = options.binary_name
    if not name.startswith("/") or Path(name).name not in NAMES:
        return
    with contextlib.suppress(SmrError, OSError):
        annotations = parse(load_spec(bundle).annotations)
        if annotations is not None:
            _record_bypass(f"{options.root}/{_namespace(arguments, bundle)}", config, bundle, annotations.restore, name)


def _record_bypass(root: str, config: Config, bundle: Path, image: str, runtime: str) -> None:
    from smr.shim.events import emit
    from smr.shim.state import Record, Status, begin
    from smr.shim.sweep import sweep

    reason = f"the client asked for {runtime} by its path, which goes past SMR (leave BinaryName empty, or give the name alone)"
    facts = {"container": bundle.name, "image": image, "runtime": runtime, "reason": reason}
    emit(config, "runtime_bypassed", {"level": "warning", "code": Code.UNSUPPORTED.value, **facts})
    sweep(config)  # nobody tells us when such a container ends
    record = Record(
        id=bundle.name,
        root=root,
        bundle=str(bundle),
        image=image,
        runtime=runtime,
        status=Status.COLD,
        reason=reason,
        reason_code=Code.UNSUPPORTED.value,
    )
    begin(config.run, record)


def _namespace(arguments: Sequence[str], bundle: Path) -> str:
    """containerd's namespace, an argument of the shim; the folder of the bundle bears its name too."""
    return next((value for option, value in pairwise(arguments) if option == "-namespace"), bundle.parent.name)


def make_path_folder(run: Path) -> Path:
    """The folder with `runc` and `crun` as links to smr-runtime, which lies beside this interpreter, else on PATH."""
    folder = run / FOLDER
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    target = Path(sys.executable).parent / "smr-runtime"
    if not target.exists():
        target = Path(shutil.which("smr-runtime") or target)
    for name in NAMES:
        link = folder / name
        if not link.is_symlink() or link.readlink() != target:
            temporary = folder / f".{name}.{os.getpid()}"
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target)
            temporary.rename(link)
    return folder


def start_prefetch(config: Config, bundle: Path) -> None:
    """Read ahead what the annotation of the bundle names. Whatever is wrong with it is for `create` to report."""
    try:
        spec = load_spec(bundle)
        annotations = parse(spec.annotations)
    except SmrError:
        return
    if annotations is not None and ":" not in annotations.restore:
        from smr.shim.capture_key import resolved

        annotations = resolved(annotations, spec, bundle, bundle.name, config)
    if annotations is not None:
        start_prefetch_of(config, annotations.restore, "--while", str(bundle))


def start_prefetch_of(config: Config, reference: str, *options: str) -> None:
    """Read an image's pages ahead in a process that nobody waits for."""
    # Its own session and stdio: containerd waits for the end of file of the shim's pipes.
    argv = [sys.executable, "-I", "-m", "smr.images.prefetch", str(config.store), reference]
    argv += [*options, "--share", str(config.cache_share)]
    null = subprocess.DEVNULL
    with contextlib.suppress(OSError):
        subprocess.Popen(argv, stdin=null, stdout=null, stderr=null, start_new_session=True)


if __name__ == "__main__":
    sys.exit(main())
