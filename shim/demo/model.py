"""The model that the demo's server loads, and the interpreter that runs it: found, checked and made outside the container.

CACHE/smr-demo/llama-SIZE-DTYPE/    config.json, model.safetensors; CACHE is XDG_CACHE_HOME or ~/.cache
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from smr.proto.errors import Code, SmrError
from smr.shim.demo import server
from smr.shim.run import run, tail

_FACTS = "import sys, torch, transformers, safetensors; print(sys.prefix); print(sys.base_prefix)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    """A Python that has torch and transformers, and the folders it lives in."""

    path: Path
    folders: tuple[Path, ...]


def find_interpreter(path: Path) -> Interpreter:
    """Check that `path` can run the server. USAGE when it cannot."""
    done = run([path, "-I", "-c", _FACTS], timeout_s=120, check=False, code=Code.USAGE)
    if done.returncode != 0:
        raise SmrError(
            f"{path} cannot run the demo's server: {tail(done.stderr).splitlines()[-1]}",
            hint="run dev/demo, which sets all up, or name an interpreter with torch and transformers by --python",
            code=Code.USAGE,
        )
    return Interpreter(path=path, folders=tuple(Path(line) for line in done.stdout.splitlines()))


def prepare(interpreter: Interpreter, params: str) -> Path:
    """The directory of the model of this size, made when it is not there, and read into the page cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smr-demo"
    cache.mkdir(parents=True, exist_ok=True)
    model = cache / f"llama-{params}-{server.dtype_name()}"
    argv: list[str | Path] = [interpreter.path, "-I", server.__file__, model, "--make", params]
    run(argv, timeout_s=600, code=Code.ENGINE_FAILED)
    with (model / "model.safetensors").open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass
    return model
