"""The programs of SMR that are sh, installed beside fakes that record how they are called. Needs no root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
_FAKE = REPOSITORY / "tests/fakes/recorder"
_SCRIPTS = ("smr-runtime", "containerd-shim-smr-v1", "containerd-shim-smr-v2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Called:
    """How a fake was called."""

    argv: list[str]
    environ: dict[str, str]
    stdin: bytes
    cwd: str


class Recorder:
    """PATH/bin with the sh programs, and fakes; `python` names what stands beside the scripts as python3, None for a fake."""

    def __init__(self, path: Path, *, python: Path | None = None) -> None:
        self.path, self.bin, self.run_dir = path, path / "bin", path / "run"
        self.bin.mkdir(parents=True)
        (path / "called").mkdir()
        for name in _SCRIPTS:
            shutil.copy2(REPOSITORY / "shim/bin" / name, self.bin / name)
        if python is None:
            self.fake("python3")
        else:
            self.wrap(self.bin / "python3", python)
        self.env = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "SMR_RUN": str(self.run_dir),
            "SMR_CONFIG": str(path / "smr.toml"),
            "SMR_LOG": str(path / "smr.log"),
            "SMR_STORE": str(path / "store"),
            "FAKE_RECORD": str(path / "called"),
            "FAKE_STDIN": "1",
        }

    def fake(self, name: str, folder: Path | None = None) -> Path:
        """A fake by that name, in `bin` or elsewhere."""
        folder = folder or self.bin
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(_FAKE)
        return folder / name

    @staticmethod
    def wrap(path: Path, program: Path) -> None:
        """A program that is another one: not a link, so that an interpreter still finds its environment."""
        path.write_text(f'#!/bin/sh\nexec {program} "$@"\n')
        path.chmod(0o755)

    def __call__(
        self,
        *argv: str | Path,
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        cwd: Path | None = None,
        fds: Sequence[int] = (),
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program of `bin`."""
        for folder in (self.path / "called").iterdir():
            shutil.rmtree(folder)
        program = self.bin / argv[0]
        return subprocess.run(
            [program, *argv[1:]],
            env={**self.env, **(env or {})},
            input=stdin,
            cwd=cwd or self.path,
            capture_output=True,
            check=False,
            timeout=60,
            pass_fds=fds,
        )

    def called(self, name: str) -> Called | None:
        """How the fake `name` was called by the last run; None when it was not."""
        folder = self.path / "called" / name
        if not folder.exists():
            return None
        environ = (line.partition("=") for line in (folder / "environ").read_text().split("\0") if line)
        return Called(
            argv=[os.fsdecode(word) for word in (folder / "argv").read_bytes().split(b"\0")[:-1]],
            environ={key: value for key, _, value in environ},
            stdin=(folder / "stdin").read_bytes(),
            cwd=(folder / "cwd").read_text().strip(),
        )

    def all_called(self) -> set[str]:
        """Names of the fakes that the last run called."""
        return {folder.name for folder in (self.path / "called").iterdir()}
