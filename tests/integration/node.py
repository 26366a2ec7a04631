"""An installed SMR with a store, a state and a log of its own, in front of one real runtime.

NODE/bin/        smr, smr-runtime and the shims as an engine finds them: they set this node's environment, then exec the next
NODE/libexec/    the repository's scripts, and a python3 that is the one the tests run on
NODE/store run smr.log smr.toml
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.integration.command import Done, run

REPOSITORY = Path(__file__).parents[2]
_SCRIPTS = ("smr-runtime", "containerd-shim-smr-v1", "containerd-shim-smr-v2")


class Node:
    """One SMR. `env` is what its command line and its engines run with."""

    def __init__(self, path: Path, *, runtime: Path, criu: Path, search: str) -> None:
        self.path, self.runtime, self.criu = path, runtime, criu
        self.bin, self.store, self.run_dir, self.log = path / "bin", path / "store", path / "run", path / "smr.log"
        for folder in (self.bin, path / "libexec", path / "runtime"):
            folder.mkdir(parents=True)
        (path / "runtime/runc").symlink_to(runtime)
        self.settings = {
            "SMR_CONFIG": str(path / "smr.toml"),
            "SMR_RUN": str(self.run_dir),
            "SMR_RUNTIME": str(runtime),
            "TMPDIR": str(path.parent / "tmp"),
        }
        self._toml: dict[str, object] = {"store": self.store, "criu": criu, "runtime": runtime, "log": self.log}
        self._toml["capture_free_share"] = 0  # however full this machine's disk is
        self._write_settings(self._toml)
        self.env: dict[str, str] = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SMR_", "CONTAINER"))},
            **self.settings,
            "PATH": f"{self.bin}:{path / 'runtime'}:{search}",
        }
        self.criu_folder = path / "criu"
        self.criu_folder.mkdir()
        (self.criu_folder / "criu").symlink_to(criu)
        self._install()

    def _write_settings(self, settings: Mapping[str, object]) -> None:
        (self.path / "smr.toml").write_text("[smr]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in settings.items()))

    @contextlib.contextmanager
    def setting(self, **settings: object) -> Iterator[None]:
        """Other settings for a while."""
        self._write_settings(self._toml | settings)
        try:
            yield
        finally:
            self._write_settings(self._toml)

    def _install(self) -> None:
        for name in _SCRIPTS:
            shutil.copy2(REPOSITORY / "shim/bin" / name, self.path / "libexec" / name)
            self._script(self.bin / name, f'exec {self.path}/libexec/{name} "$@"', self.settings)
        self._script(self.path / "libexec/python3", f'exec {sys.executable} "$@"', {})
        self._script(self.bin / "smr", f'exec {Path(sys.executable).with_name("smr")} "$@"', self.settings)
        self._script(self.bin / "smr-hook", f'exec {Path(sys.executable).with_name("smr-hook")} "$@"', self.settings)

    @staticmethod
    def _script(path: Path, last: str, environment: Mapping[str, str]) -> None:
        lines = ["#!/bin/sh", *(f"export {key}='{value}'" for key, value in environment.items()), last, ""]
        path.write_text("\n".join(lines))
        path.chmod(0o755)

    def smr(self, *words: object, check: bool = True, env: Mapping[str, str] | None = None, timeout_s: float = 120) -> Done:
        """Run the `smr` command line."""
        return run([self.bin / "smr", *words], env={**self.env, **(env or {})}, check=check, timeout_s=timeout_s)

    def records(self) -> dict[str, dict[str, object]]:
        """SMR's record of every annotated container, by container id."""
        found = (json.loads(file.read_text()) for file in (self.run_dir / "containers").glob("**/state.json"))
        return {str(record["id"]): record for record in found}

    def only_record(self, status: str) -> dict[str, object]:
        """The record of the only annotated container; LookupError unless it is one, with this status."""
        found = list(self.records().values())
        if len(found) != 1 or found[0]["status"] != status:
            raise LookupError(f"{len(found)} records: {found}")
        return found[0]

    def log_text(self) -> str:
        """SMR's own log."""
        return self.log.read_text() if self.log.exists() else ""


def _toml(value: object) -> str:
    return json.dumps(value if isinstance(value, int | float) else str(value))
