"""What an overlayfs upper directory says about its container's root: what was made, changed and removed.

`Walker` goes through an upper directory (or a plain tree) once, by descriptors and never through a symbolic link, because a
running container may edit it meanwhile. It yields `Found` in tar order: a directory before what is in it.

Overlay's marks (Documentation/filesystems/overlayfs.rst): a whiteout is a character device 0:0, or since 6.7 an empty file with
the attribute `overlay.whiteout`; `overlay.opaque` = y hides a directory of the lower layers; `overlay.redirect` says that a
renamed directory (or a file with `overlay.metacopy`) has its content elsewhere in the lower layers. The attributes' namespace is
`trusted.`, or `user.` for mounts with `userxattr`. A renamed directory is walked merged with its lower content, behind an opaque
mark. fuse-overlayfs has the same marks, and others by name where it may not make devices (and both for an opaque directory):
`.wh.NAME`, `.wh..wh..opq`, `.wh..opq`; such names mean that only when `marks_in_names`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from smr.images.tarsafe import Parts, read_xattrs, read_xattrs_of, safe_parts
from smr.proto.errors import Code, SmrError

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
MAX_DEPTH = 256
_WHITEOUT = ".wh."
_OPAQUE_NAMES = frozenset({".wh..wh..opq", ".wh..opq"})


class Mark(Enum):
    """What was found."""

    OBJECT = auto()
    WHITEOUT = auto()
    OPAQUE = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One finding at `path`. `parent` is the directory that holds it; `content` where a file's bytes are when not there."""

    mark: Mark
    path: Parts
    parent: int
    stat: os.stat_result
    xattrs: Mapping[str, bytes]
    content: Path | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """A directory being walked: its layers, top first, and where its lower content is (None: it has none)."""

    path: Parts
    layers: tuple[int, ...]
    lower: Parts | None
    merged: bool


class Walker:
    """Walks `top`, a path or a descriptor; paths begin with `prefix`.

    `lowers` are the lower layers, the highest first, looked at only for renamed directories and metacopy files.
    """

    def __init__(
        self,
        top: Path | int,
        lowers: Sequence[Path] = (),
        *,
        exclude: Collection[Parts] = (),
        overlay: bool = True,
        prefix: Parts = (),
        marks_in_names: bool = False,
    ) -> None:
        self._top = top
        self._marks_in_names = marks_in_names
        self._prefix = prefix
        self._lowers = [lower.resolve() for lower in lowers]  # containers/storage names them by links
        self._exclude = frozenset(exclude)
        self._overlay = overlay
        self.excluded = 0

    def __iter__(self) -> Iterator[Found]:
        root = os.dup(self._top) if isinstance(self._top, int) else os.open(self._top, _DIRECTORY & ~os.O_NOFOLLOW)
        try:
            attributes = read_xattrs(root, ".")
            yield Found(mark=Mark.OBJECT, path=self._prefix, parent=root, stat=os.fstat(root), xattrs=attributes)
            yield from self._directory(_Place(self._prefix, (root,), (), merged=False))
        finally:
            os.close(root)

    def _directory(self, place: _Place) -> Iterator[Found]:
        if len(place.path) > MAX_DEPTH:
            raise SmrError(f"/{'/'.join(place.path[:8])}/... is more than {MAX_DEPTH} directories deep", code=Code.UNSUPPORTED)
        seen: set[str] = set()
        for depth, layer in enumerate(place.layers):
            with os.scandir(layer) as entries:
                names = sorted(entry.name for entry in entries)
            for name in names:
                if name not in seen:
                    seen.add(name)
                    yield from self._child(place, depth, name)

    def merged_child(self, place: _Place, depth: int, name: str) -> Iterator[Found]:
        """For `walk_below`."""
        return self._child(place, depth, name)

    def _child(self, place: _Place, depth: int, name: str) -> Iterator[Found]:
        path = (*place.path, name)
        if path in self._exclude:
            self.excluded += 1
            return
        parent = place.layers[depth]
        if self._marks_in_names and name.startswith(_WHITEOUT):
            yield from self._named_mark(path, parent)
            return
        try:
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
            attributes = read_xattrs(parent, name)
        except FileNotFoundError:  # removed by a running container
            return
        if self._overlay and _is_whiteout(status, attributes):
            if not place.merged:
                yield Found(mark=Mark.WHITEOUT, path=path, parent=parent, stat=status, xattrs={})
            return
        content = self._content(place, depth, name, attributes) if stat.S_ISREG(status.st_mode) else None
        found = Found(mark=Mark.OBJECT, path=path, parent=parent, stat=status, xattrs=attributes, content=content)
        yield found
        if stat.S_ISDIR(status.st_mode):
            yield from self._enter(place, depth, found)

    def _named_mark(self, path: Parts, parent: int) -> Iterator[Found]:
        if path[-1] not in _OPAQUE_NAMES:
            hidden = (*path[:-1], path[-1].removeprefix(_WHITEOUT))
            yield Found(mark=Mark.WHITEOUT, path=hidden, parent=parent, stat=os.fstat(parent), xattrs={})
        elif path[-1] == ".wh..wh..opq":  # there is one wherever there is the other
            yield Found(mark=Mark.OPAQUE, path=path[:-1], parent=parent, stat=os.fstat(parent), xattrs={})

    def _enter(self, place: _Place, depth: int, found: Found) -> Iterator[Found]:
        name, redirect = found.path[-1], _attribute(found.xattrs, "redirect") if self._overlay else None
        opaque = self._overlay and _attribute(found.xattrs, "opaque") == b"y"
        with ExitStack() as held:
            layers = [held.enter_context(_opened(found.parent, name))]
            merged = place.merged or redirect is not None
            lower = None if place.lower is None or opaque else _redirected(place.lower, name, redirect)
            if merged and not opaque:
                if redirect is not None and lower is not None:
                    layers += self._lower_directories(held, lower)
                else:
                    layers += _descend(held, place.layers[depth + 1 :], name)
            if opaque or (merged and not place.merged):
                yield Found(mark=Mark.OPAQUE, path=found.path, parent=found.parent, stat=found.stat, xattrs={})
            yield from self._directory(_Place(found.path, tuple(layers), lower, merged))

    def _lower_directories(self, held: ExitStack, path: Parts) -> list[int]:
        layers = [held.enter_context(_opened(None, str(lower))) for lower in self._lowers]
        for part in path:
            layers = _descend(held, layers, part)
        return layers

    def _content(self, place: _Place, depth: int, name: str, attributes: Mapping[str, bytes]) -> Path | None:
        if not self._overlay or _attribute(attributes, "metacopy") is None or place.lower is None:
            return None
        path = _redirected(place.lower, name, _attribute(attributes, "redirect"))
        for lower in self._lowers:
            candidate = lower.joinpath(*path)
            if candidate.is_symlink() or not candidate.is_file() or candidate.parent.resolve() != candidate.parent:
                continue
            found = read_xattrs_of(candidate)
            if _attribute(found, "metacopy") is None:
                return candidate
            path = _redirected(path[:-1], path[-1], _attribute(found, "redirect"))  # a copy of a copy
        raise SmrError(
            f"/{'/'.join((*place.path, name))} is a metadata-only copy whose content is in none of the lower layers",
            hint="the overlay's lower directories must be given",
            code=Code.ROOTFS_FAILED,
        )


def walk_below(lowers: Sequence[Path], path: Parts) -> Iterator[Found]:
    """What the lower layers, the highest first, have at `path` and below it, merged as a mount without an upper shows them."""
    with ExitStack() as held:
        layers = [held.enter_context(_opened(None, str(lower.resolve()))) for lower in lowers]
        for part in path[:-1]:
            layers = _descend(held, layers, part)
        place = _Place(path[:-1], tuple(layers), path[:-1], merged=True)
        for depth, layer in enumerate(layers):
            with suppress(FileNotFoundError):
                os.stat(path[-1], dir_fd=layer, follow_symlinks=False)
                found = Walker(layer, lowers).merged_child(place, depth, path[-1])
                yield from (item for item in found if item.mark is Mark.OBJECT)
                return


class _opened:  # noqa: N801  # used as a function
    """A directory opened for the length of a `with`."""

    def __init__(self, parent: int | None, name: str) -> None:
        self._fd = os.open(name, _DIRECTORY, dir_fd=parent)

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _descend(held: ExitStack, layers: Sequence[int], name: str) -> list[int]:
    """The directories `name` of a stack of layers that are seen merged: up to the first that is no directory, or is opaque."""
    found: list[int] = []
    for layer in layers:
        try:
            status = os.stat(name, dir_fd=layer, follow_symlinks=False)
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(status.st_mode):
            break
        found.append(held.enter_context(_opened(layer, name)))
        if _attribute(read_xattrs(layer, name), "opaque") == b"y":
            break
    return found


def _redirected(lower: Parts, name: str, redirect: bytes | None) -> Parts:
    if redirect is None:
        return (*lower, name)
    target = os.fsdecode(redirect)
    return safe_parts(target.lstrip("/")) if target.startswith("/") else (*lower, *safe_parts(target))


def _is_whiteout(status: os.stat_result, attributes: Mapping[str, bytes]) -> bool:
    if stat.S_ISCHR(status.st_mode):
        return status.st_rdev == 0
    return stat.S_ISREG(status.st_mode) and status.st_size == 0 and _attribute(attributes, "whiteout") is not None


def _attribute(attributes: Mapping[str, bytes], name: str) -> bytes | None:
    return attributes.get(f"trusted.overlay.{name}", attributes.get(f"user.overlay.{name}"))
