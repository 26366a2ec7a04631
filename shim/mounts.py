"""Mounts of the new container against those of the checkpoint, before anything is touched.

    the checkpoint had a bind mount     the new container needs one of the same destination, from its spec or from smr.mounts
    it had another kind of mount there  the same kind: processes have its files open, and CRIU makes it anew
    it had nothing there                the mount is given after the restore (smr.shim.extra_mounts)

A source must exist; and what processes had open or mapped on an external mount must be what it was, in type, permissions and
size, because CRIU opens it by its path and refuses otherwise, without saying whose it is. A GPU's devices and its driver's files
are the node's: what is missing of them is found elsewhere on the node (smr.shim.gpu.device_mounts).
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from smr.proto.annotations import Annotations
from smr.proto.checkpoint import CheckpointConfig, HeldFile
from smr.proto.errors import Code, SmrError
from smr.proto.mount_list import clean
from smr.proto.oci import Mount, Spec, parse_spec

_KINDS: Mapping[int, str] = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a directory",
    stat.S_IFSOCK: "a socket",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a symbolic link",
}


def asked_mounts(spec: Spec, annotations: Annotations) -> tuple[Mount, ...]:
    """The mounts of a spec in their order, with those of smr.mounts in place of others at their destination, or at the end."""
    named = {
        destination: Mount(destination=destination, type="bind", source=source, options=("rbind",))
        for destination, source in annotations.mounts.items()
    }
    own = tuple(mount for mount in spec.mounts if clean(mount.destination) not in named)
    return (*own, *named.values())


def by_destination(spec: Spec, annotations: Annotations) -> dict[str, Mount]:
    """The same by their destinations."""
    return {clean(mount.destination): mount for mount in asked_mounts(spec, annotations)}


def source_below(destination: str, given: Mapping[str, Mount]) -> str:
    """Where a destination that lies in a recursive bind mount comes from; "" where it lies in none."""
    above = [one for one, mount in given.items() if destination.startswith(f"{one}/") and "rbind" in mount.options]
    nearest = max(above, key=len, default="")
    return posixpath.join(given[nearest].source, posixpath.relpath(destination, nearest)) if nearest else ""


def bound_paths(spec: Spec, rootfs: Path, *, but: Collection[str] = ()) -> dict[str, str]:
    """Path in the container, symbolic links of its root followed, to destination, of each bind mount that is not among `but`."""
    found = {}
    for mount in spec.mounts:
        destination = clean(mount.destination)
        if mount.is_bind and destination not in but:
            found[_real(rootfs, destination)] = found[destination] = destination
    return found


def _real(rootfs: Path, destination: str) -> str:
    from smr.shim.inside import open_in_root

    root = os.open(rootfs, os.O_PATH | os.O_CLOEXEC)
    try:
        fd = open_in_root(root, destination, os.O_PATH, symlinks=True)
    except OSError:
        return destination
    finally:
        os.close(root)
    try:
        real = str(Path(f"/proc/self/fd/{fd}").readlink())
    finally:
        os.close(fd)
    top = os.path.realpath(rootfs)
    return f"/{os.path.relpath(real, top)}" if real.startswith(f"{top}/") else destination


def check(config: CheckpointConfig, spec: Spec, annotations: Annotations) -> None:
    """Raise MOUNT_MISMATCH for the first mount, source or file that is not as the checkpoint needs it."""
    old = {clean(mount.destination): mount for mount in parse_spec(config.spec).mounts}
    given = by_destination(spec, annotations)
    external = [clean(destination) for destination in config.external_mounts]
    nodes = of_node(config)
    for destination in external:
        mount = given.get(destination)
        if mount is None and not nodes(destination):
            below = source_below(destination, given)
            if not below:
                raise _missing(destination)
            if not os.path.exists(below):  # noqa: PTH110
                raise _no_source(destination, below, annotations)
        if mount is not None and not mount.is_bind:
            raise _changed(destination, "a bind mount", _kind(mount))
    for destination, mount in given.items():
        before = old.get(destination)
        if before is not None and not before.is_bind and mount.is_bind and destination not in external:
            raise _changed(destination, _kind(before), "a bind mount")
        if mount.is_bind and not nodes(destination):
            _check_source(mount, destination, annotations)
    _check_id_mapped(old, given)
    check_held(config.held_files, given, modes="skip-file-rwx-check" not in annotations.criu)


@contextlib.contextmanager
def explained(config: CheckpointConfig, spec: Spec, annotations: Annotations) -> Iterator[None]:
    """What CRIU fails for, in our words where it is a mount or a file that went or changed since the check."""
    try:
        yield
    except SmrError as error:
        if error.code is Code.CRIU_FAILED:
            try:
                check(config, spec, annotations)
            except SmrError as cause:
                raise cause from error
        raise


def of_node(config: CheckpointConfig) -> Callable[[str], bool]:
    """Whether a destination is the node's to fill, not the user's."""
    if config.gpu is None:
        return lambda _: False
    from smr.shim.gpu.device_mounts import is_device_mount

    return is_device_mount


def _missing(destination: str) -> SmrError:
    return SmrError(
        f"mount {destination} of the checkpoint is missing in this container",
        hint=f"add -v SOURCE:{destination}, or the annotation smr.mounts={destination}=SOURCE",
        code=Code.MOUNT_MISMATCH,
        mount=destination,
    )


def _changed(destination: str, before: str, now: str) -> SmrError:
    return SmrError(
        f"{destination} is {now} in this container, and was {before} at the checkpoint: needed the same",
        hint=f"give the container {destination} as {before}",
        code=Code.MOUNT_MISMATCH,
        mount=destination,
    )


def _kind(mount: Mount) -> str:
    return f"a mount of type {mount.type or 'none'}"


def _check_source(mount: Mount, destination: str, annotations: Annotations) -> None:
    # A relative source is the bundle's, and the runtime's to find.
    if not mount.source.startswith("/") or os.path.exists(mount.source):  # noqa: PTH110  # one call for each mount
        return
    raise _no_source(destination, mount.source, annotations)


def _no_source(destination: str, source: str, annotations: Annotations) -> SmrError:
    named = f"smr.mounts: {destination}" if destination in annotations.mounts else f"mount {destination}"
    return SmrError(
        f"{named}: its source {source} does not exist on this node",
        hint=f"make {source}, or name another source with smr.mounts={destination}=SOURCE",
        code=Code.MOUNT_MISMATCH,
        mount=destination,
    )


def _check_id_mapped(old: Mapping[str, Mount], given: Mapping[str, Mount]) -> None:
    """CRIU has no notion of a mount that maps ids: it would come back with the ids of the host's files."""
    for destination, mount in (*old.items(), *given.items()):
        if mount.is_bind and {"idmap", "ridmap"} & set(mount.options):
            raise SmrError(
                f"the mount {destination} is ID-mapped: CRIU cannot restore such a mount",
                hint="leave out 'idmap', and give the files to the ids that the container has on the host",
                code=Code.UNSUPPORTED,
                mount=destination,
            )


def fit_files(config: CheckpointConfig, spec: Spec, annotations: Annotations, folder: Path) -> None:
    """Give files of CRIU's images in `folder` the names that they have in this container's projected volumes."""
    if any(_is_projected(file.path) for file in config.held_files):
        moved = check_held(config.held_files, by_destination(spec, annotations), modes=False)
        if moved:
            from smr.images.held_files import rename

            rename(folder, moved)


def check_held(files: tuple[HeldFile, ...], given: Mapping[str, Mount], *, modes: bool) -> dict[int, tuple[str, str]]:
    """Raise MOUNT_MISMATCH for the first file that CRIU would refuse, or not find. `given`: mounts by destination.

    `modes`: permissions count. Returns old and new path of files of projected volumes, by their ids.
    """
    roots: dict[str, int] = {}
    moved: dict[int, tuple[str, str]] = {}
    with contextlib.ExitStack() as stack:
        for file in files:
            mount = given.get(clean(file.mount))
            if mount is None or not mount.is_bind or not mount.source.startswith("/"):
                continue
            if mount.source not in roots:
                fd = _opened(mount.source)
                stack.callback(os.close, fd)
                roots[mount.source] = fd
            now = _check_file(file, mount.source, roots[mount.source], modes=modes)
            if now != file.path:
                moved[file.file] = (file.path, now)
    return moved


def _opened(source: str) -> int:
    try:
        return os.open(source, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise SmrError(
            f"the source {source} of a mount cannot be opened: {error.strerror}", code=Code.MOUNT_MISMATCH, mount=source
        ) from error


def _check_file(file: HeldFile, source: str, root: int, *, modes: bool) -> str:
    """The path that the file has now."""
    path, found = file.path, _status(root, file.path)
    if found == errno.ENOENT and _is_projected(path):
        path = _projected(root, path)
        found = _status(root, path)
    if isinstance(found, os.stat_result):
        if difference := _difference(file, found, modes=modes):
            raise _differs(replace(file, path=path), source, difference)
    elif found in {errno.ENOENT, errno.ENOTDIR}:
        raise _differs(file, source, "is missing")
    # Whatever else keeps us from looking, such as a symbolic link on the way, is CRIU's to judge.
    return path


def _is_projected(path: str) -> bool:
    """Whether a path leads through the folder of one version of a config map or secret, such as ..2024_05_01_12_00_00.1"""
    return any(part.startswith("..") and part != ".." for part in path.split("/"))


def _projected(root: int, path: str) -> str:
    """The same file in the version that there is now, which the link ..data beside it names; `path` where there is none."""
    from smr.shim.inside import open_in_root

    parts = path.split("/")
    place = next(number for number, part in enumerate(parts) if part.startswith("..") and part != "..")
    try:
        folder = open_in_root(root, "/".join(parts[:place]) or ".", os.O_PATH | os.O_DIRECTORY)
    except OSError:
        return path
    try:
        now = os.readlink("..data", dir_fd=folder)
    except OSError:
        return path
    finally:
        os.close(folder)
    return "/".join([*parts[:place], now, *parts[place + 1 :]]) if "/" not in now else path


def _status(root: int, path: str) -> os.stat_result | int:
    """Of a file below `root`, or the errno of why it cannot be looked at. Links are not followed: here they lead elsewhere."""
    from smr.shim.inside import open_in_root

    if not path:
        return os.fstat(root)
    try:
        fd = open_in_root(root, path, os.O_PATH | os.O_NOFOLLOW)
    except OSError as error:
        return error.errno or errno.EIO
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def _difference(file: HeldFile, now: os.stat_result, *, modes: bool) -> str:
    if stat.S_IFMT(now.st_mode) != stat.S_IFMT(file.mode):
        return f"is {_what(now.st_mode)}, and was {_what(file.mode)} at the checkpoint"
    if file.size_bytes >= 0 and now.st_size != file.size_bytes:
        return f"has {now.st_size} bytes, and had {file.size_bytes} at the checkpoint"
    if modes and stat.S_IMODE(now.st_mode) != stat.S_IMODE(file.mode):
        return f"has mode {stat.S_IMODE(now.st_mode):04o}, and had {stat.S_IMODE(file.mode):04o} at the checkpoint"
    return ""


def _what(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "something else")


def _differs(file: HeldFile, source: str, difference: str) -> SmrError:
    held = f", which {file.holder} has {'open for writing' if file.writable else 'open'}," if file.holder else ""
    path = f"{source.rstrip('/')}/{file.path}" if file.path else source
    return SmrError(
        f"mount {file.mount}: {path}{held} {difference}",
        hint="put back the file as it was at the checkpoint, or checkpoint again; a file open for appending alone may grow",
        code=Code.MOUNT_MISMATCH,
        mount=file.mount,
        file=path,
    )
