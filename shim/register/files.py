"""A plan: the files that should exist on a node, what they should say, and what the user should know.

install.sh reads the plan from stdout, one change a line, fields separated by tabs and never empty:

    file  MODE  PATH  STAGED  POLICY  WHY        a file of ours; POLICY `keep` leaves one that the user edited
    edit  PATH  STAGED  BASE  WHY                someone else's file with our lines; BASE is the file without them
    link  PATH  TARGET  WHY
    note  TEXT

Paths are those on the node: install.sh puts --root in front. STAGED and BASE are files in the staging directory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from smr.proto.errors import Code, SmrError


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What is registered where. `root` is put in front of every path that is read; contents never name it.

    `settings`: more for smr.toml, checked by smr.shim.config.
    """

    prefix: Path
    root: Path = Path("/")
    criu: Path
    runtime: Path
    default_runtime: bool = False
    settings: Mapping[str, str | float] = field(default_factory=dict)

    def at(self, path: Path) -> Path:
        """Where `path` of the node lies on this machine."""
        return self.root / path.relative_to("/")

    def read(self, path: Path) -> str | None:
        """Text of a file of the node, None where there is none."""
        try:
            return self.at(path).read_bytes().decode()  # line ends as they are
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise SmrError(f"cannot read {path}: {error}", hint=f"make {path} readable text", code=Code.CONFIG_INVALID) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file that is ours alone."""

    path: Path
    text: str
    why: str
    mode: int = 0o644
    keep_edited: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """Someone else's file with our lines added: `base` is its text without them."""

    path: Path
    text: str
    base: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A symbolic link that is ours alone."""

    path: Path
    target: Path
    why: str


@dataclass(frozen=True, slots=True)
class Note:
    """One line for the user; changes nothing."""

    text: str


Change = File | Edit | Link | Note


def stage(changes: Sequence[Change], directory: Path) -> list[str]:
    """Write the contents under `directory` and return the plan's lines."""
    return [_line(change, directory / f"{number:03}") for number, change in enumerate(changes)]


def _line(change: Change, staged: Path) -> str:
    match change:
        case File():
            staged.write_bytes(change.text.encode())
            policy = "keep" if change.keep_edited else "replace"
            return _join("file", f"{change.mode:04o}", change.path, staged, policy, change.why)
        case Edit():
            base = staged.with_suffix(".base")
            staged.write_bytes(change.text.encode())
            base.write_bytes(change.base.encode())
            return _join("edit", change.path, staged, base, change.why)
        case Link():
            return _join("link", change.path, change.target, change.why)
        case Note():
            return _join("note", change.text)


def _join(*fields: object) -> str:
    texts = [str(field) for field in fields]
    for text in texts:
        if not text or "\t" in text or "\n" in text:
            raise SmrError(f"a path or message cannot be empty or hold a tab or a line break: {text!r}", code=Code.CONFIG_INVALID)
    return "\t".join(texts)
