"""What the new container's spec mounts, masks or makes read-only and the checkpoint had not: given to the stopped tree.

    bind mounts, tmpfs      made in our mount namespace, attached nowhere, then moved to their destination in the container's, in
                            the order of the spec; what later entries of the spec have mounted below is moved onto the new mount
    maskedPaths             the container's /dev/null over files, an empty read-only tmpfs over directories, as runtimes do it
    readonlyPaths           the path bound to itself, read-only
    propagation             shared, slave or private as the spec says; CRIU restores what the image has, and a mount joins the
                            group of its new source
    proc, sysfs and others  cannot be given from outside; a warning says so

What is a mount already is left alone, whoever has made it: what the spec wants of its flags is seen to afterwards
(smr.shim.mount_flags), also for what is given here. Nothing of the tree has run. Paths are the container's and are resolved below
its root; a mount point that is missing is made, owned by the container's root, as runtimes do. Other mount namespaces of the tree
get nothing. Files that processes have open where something is mounted now stay what they were.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from smr.proto.annotations import Annotations
from smr.proto.errors import Code, SmrError
from smr.proto.mount_list import clean
from smr.proto.oci import Mount, Spec, as_list, as_object
from smr.shim import mount_calls, mounts, nested_mounts
from smr.shim.mount_flags import FLAGS
from smr.shim.mount_points import found, make_point, owner_of
from smr.shim.mountinfo import unescape

_PROPAGATION: Mapping[str, int] = {
    "private": mount_calls.PRIVATE,
    "slave": mount_calls.SLAVE,
    "shared": mount_calls.SHARED,
    "unbindable": mount_calls.UNBINDABLE,
}
# How mountinfo shows them: what is shared in the container is a slave of the host's group as well, as runtimes have it.
_SHARING: Mapping[int, frozenset[str]] = {
    mount_calls.SLAVE: frozenset({"master"}),
    mount_calls.SHARED: frozenset({"shared", "master"}),
}
_NO_TMPFS_OPTIONS = frozenset({"defaults", "rw", "suid", "dev", "exec", "tmpcopyup", "bind", "rbind", "symfollow", "relatime"})
_CGROUPS = frozenset({"cgroup", "cgroup2"})
_NULL = (1, 3)
_PATH = os.O_PATH | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """A mount to give, unattached. `covers`: destinations of later entries of the spec, which must not disappear below it."""

    destination: str
    mount: int
    directory: bool
    covers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Joined:
    """A mount that the checkpoint had, and its propagation; `origin` is a clone of its source, whose group it is to join."""

    destination: str
    kind: int
    origin: int = -1


def give(
    pid: int, spec: Spec, rootfs: str, annotations: Annotations, left_out: Callable[[str], bool] = lambda _: False
) -> tuple[str, ...]:
    """Give the stopped tree of `pid` what it lacks of its spec; returns warnings. Raises MOUNT_MISMATCH.

    `rootfs`: the root on the host, where mount points can be made when the container's is read-only. `left_out`: not these.
    """
    here = _points(pid)
    wanted = [mount for mount in mounts.asked_mounts(spec, annotations) if not left_out(clean(mount.destination))]
    wanted += nested_mounts.more(wanted, here)
    missing = [mount for mount in wanted if clean(mount.destination) not in here]
    linux = as_object(spec.document.get("linux"), "linux")
    masked, read_only = _paths(linux, "maskedPaths", here, pid), _paths(linux, "readonlyPaths", here, pid)
    with ExitStack() as stack:
        joins = list(_joins([mount for mount in wanted if clean(mount.destination) in here], here, stack))
        if not (missing or masked or read_only or joins):
            return ()
        root = os.open(rootfs, _PATH)
        stack.callback(os.close, root)
        work = _Work(pid=pid, host_root=root, stack=stack)
        work.given = [one for mount in missing if (one := _made(mount, wanted, work)) is not None]
        work.masked, work.read_only, work.joins = masked, read_only, joins
        try:
            mount_calls.in_mount_namespace(f"/proc/{pid}/ns/mnt", work.run)
        except OSError as error:
            raise _failed(work.doing, error) from error
    return tuple(work.warnings)


class _Work:
    """What is to be done in the container's mount namespace."""

    def __init__(self, *, pid: int, host_root: int, stack: ExitStack) -> None:
        self.pid, self.host_root, self.stack = pid, host_root, stack
        self.owner = owner_of(pid)
        self.given: list[_Given] = []
        self.joins: list[_Joined] = []
        self.masked: list[str] = []
        self.read_only: list[str] = []
        self.warnings: list[str] = []
        self.doing = "the mounts of the container"

    def run(self, proc: int) -> None:
        """In a thread of that namespace; `proc` is our /proc/thread-self. What was imported here would be the container's."""
        with mount_calls.opened("/", os.O_PATH) as root:
            for given in self.given:
                self.doing = f"the mount {given.destination}"
                self._attach(given, root, proc)
            for joined in self.joins:
                self.doing = f"the propagation of the mount {joined.destination}"
                self._join(joined, root)
            for path in self.read_only:
                self.doing = f"the read-only path {path}"
                self._make_read_only(path, root, proc)
            for path in self.masked:
                self.doing = f"the masked path {path}"
                self._mask(path, root, proc)

    def _attach(self, given: _Given, root: int, proc: int) -> None:
        point = self._point(root, given.destination, given.directory)
        try:
            path = os.readlink(f"fd/{point}", dir_fd=proc)
            with ExitStack() as stack:
                table = _mounted(proc)
                if table.get(_mount_id(point, proc)) == path:
                    return  # reached by a symbolic link: the checkpoint had it
                below = [
                    (at, _held(at, stack))
                    for at in _topmost(table.values(), path)
                    if any(_is_below(at, one) for one in given.covers)
                ]
                mount_calls.attach(given.mount, point)
                for at, mount in below:
                    again = self._point(root, at, stat.S_ISDIR(os.fstat(mount).st_mode))
                    stack.callback(os.close, again)
                    mount_calls.attach(mount, again)
        finally:
            os.close(point)

    def _point(self, root: int, path: str, directory: bool) -> int:
        return make_point(root, path, directory=directory, owner=self.owner, outside=self.host_root)

    def _join(self, joined: _Joined, root: int) -> None:
        with found(root, joined.destination) as mount:
            try:
                if joined.origin >= 0:
                    mount_calls.set_attributes(mount, propagation=mount_calls.PRIVATE)
                    mount_calls.join_group(joined.origin, mount)
                    mount_calls.set_attributes(mount, propagation=mount_calls.SLAVE)
                if joined.kind != mount_calls.SLAVE:
                    mount_calls.set_attributes(mount, propagation=joined.kind)
            except OSError as error:
                needed = next(name for name, value in _PROPAGATION.items() if value == joined.kind)
                self.warnings.append(f"the propagation of the mount {joined.destination} is not {needed}: {error.strerror}")

    def _make_read_only(self, path: str, root: int, proc: int) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), found(root, path) as place:
            if _mounted(proc).get(_mount_id(place, proc)) == os.readlink(f"fd/{place}", dir_fd=proc):
                return
            mount = mount_calls.clone("", deep=True, folder=place)
            try:
                mount_calls.set_attributes(mount, on=FLAGS["ro"], deep=True)
                mount_calls.attach(mount, place)
            finally:
                os.close(mount)

    def _mask(self, path: str, root: int, proc: int) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), found(root, path) as place:
            status = os.fstat(place)
            if _is_null(status):
                return
            if stat.S_ISDIR(status.st_mode):
                own = _mounted(proc).get(_mount_id(place, proc)) == os.readlink(f"fd/{place}", dir_fd=proc)
                if own and os.fstatvfs(place).f_flag & os.ST_RDONLY and not _listed(place):
                    return
                mount = mount_calls.make_tmpfs({"size": "0", "nr_inodes": "2"})
                mount_calls.set_attributes(mount, on=FLAGS["ro"])
            else:
                mount = self._null(root)
            try:
                mount_calls.attach(mount, place)
            finally:
                os.close(mount)

    def _null(self, root: int) -> int:
        with found(root, "/dev/null") as null:
            if not _is_null(os.fstat(null)):
                raise OSError(0, "/dev/null in the container is no null device")
            return mount_calls.clone("", deep=False, folder=null)


def _made(mount: Mount, wanted: Sequence[Mount], work: _Work) -> _Given | None:
    """The mount, attached nowhere; None and a warning for what cannot be made so."""
    destination = clean(mount.destination)
    if not mount.is_bind and mount.type != "tmpfs":
        if mount.type not in _CGROUPS:
            work.warnings.append(
                f"the checkpoint has no {mount.type} on {destination}, and it cannot be given to restored processes"
            )
        return None
    try:
        made = _made_bind(mount) if mount.is_bind else _made_tmpfs(mount, work)
    except OSError as error:
        raise _failed(f"the mount {destination} (source {mount.source})", error) from error
    work.stack.callback(os.close, made)
    later = wanted[wanted.index(mount) + 1 :]
    covers = tuple(clean(one.destination) for one in later if _is_below(clean(one.destination), destination))
    return _Given(destination=destination, mount=made, directory=stat.S_ISDIR(os.fstat(made).st_mode), covers=covers)


def _made_bind(mount: Mount) -> int:
    made = mount_calls.clone(mount.source, deep="rbind" in mount.options)
    try:
        propagation, deep = _propagation(mount)
        # Without a word of the spec it is a slave, as with runtimes, whose mount namespaces are slaves of the host's.
        if propagation != mount_calls.PRIVATE:
            mount_calls.set_attributes(made, propagation=mount_calls.SLAVE, deep=True)
        if propagation not in {0, mount_calls.SLAVE}:
            mount_calls.set_attributes(made, propagation=propagation, deep=deep)
    except BaseException:
        os.close(made)
        raise
    return made


def _made_tmpfs(mount: Mount, work: _Work) -> int:
    options: dict[str, str | None] = {"uid": str(work.owner.uid), "gid": str(work.owner.gid)}
    for option in mount.options:
        key, equals, value = option.partition("=")
        if option not in FLAGS and option not in _NO_TMPFS_OPTIONS and key.removeprefix("r") not in _PROPAGATION:
            options[key] = value if equals else None
    made = mount_calls.make_tmpfs(options)
    if "tmpcopyup" in mount.options:
        _copy_up(work, clean(mount.destination), made)
        if mode := options.get("mode"):
            os.chmod(f"/proc/self/fd/{made}", int(mode, 8))  # noqa: PTH101  # what was copied has brought its own
    return made


def _copy_up(work: _Work, destination: str, target: int) -> None:
    """What the root has at the destination, into the tmpfs that will lie over it: `tmpcopyup`, as podman asks for."""
    import tempfile

    from smr.images.layer import pack_tree, unpack_tree
    from smr.shim.inside import open_in_root

    try:
        source = open_in_root(work.host_root, destination, os.O_RDONLY | os.O_DIRECTORY, symlinks=True)
    except OSError:
        return
    try:
        if os.listdir(source):  # noqa: PTH208  # a descriptor
            with tempfile.TemporaryDirectory(prefix="smr-") as folder:
                pack_tree(Path(f"/proc/self/fd/{source}"), Path(folder, "tar"))
                unpack_tree(Path(folder, "tar"), Path(f"/proc/self/fd/{target}"))
    finally:
        os.close(source)


def _joins(present: Sequence[Mount], here: Mapping[str, frozenset[str]], stack: ExitStack) -> Iterator[_Joined]:
    """Mounts of the checkpoint whose propagation is not what the spec says; where it says nothing, slave, as with runtimes."""
    groups = _shared_sources() if any(mount.is_bind for mount in present) else frozenset()
    for mount in present:
        destination = clean(mount.destination)
        kind = (_propagation(mount)[0] or mount_calls.SLAVE) if mount.is_bind else 0
        has = here[destination]
        if kind == mount_calls.PRIVATE and has:
            yield _Joined(destination=destination, kind=kind)
        elif kind in _SHARING and has != _SHARING[kind] and _mount_of(mount.source) in groups:
            try:
                origin = mount_calls.clone(mount.source, deep=False)
            except OSError as error:
                raise _failed(f"the mount {destination} (source {mount.source})", error) from error
            stack.callback(os.close, origin)
            yield _Joined(destination=destination, kind=kind, origin=origin)


def _shared_sources() -> frozenset[int]:
    """Numbers of our own mounts that take part in the mounts of others."""
    numbers = set()
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").split("\n"):
        words = line.partition(" - ")[0].split(" ")
        if any(word.startswith(("shared:", "master:")) for word in words[6:]):
            numbers.add(int(words[0]))
    return frozenset(numbers)


def _mount_of(path: str) -> int:
    """The number of the mount that a path of ours lies on; -1 when it is not there."""
    try:
        fd = os.open(path, _PATH)
    except OSError:
        return -1
    try:
        text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    finally:
        os.close(fd)
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("mnt_id:"))


def _propagation(mount: Mount) -> tuple[int, bool]:
    """The last of its options that speaks of propagation, and whether it holds for what is mounted below."""
    found = (0, False)
    for option in mount.options:
        for name, value in _PROPAGATION.items():
            if option in {name, f"r{name}"}:
                found = (value, option != name)
    return found


def _paths(linux: Mapping[str, object], key: str, here: Collection[str], pid: int) -> list[str]:
    """Paths of a list of the spec that are there and no mounts of their own."""
    paths = [clean(str(path)) for path in as_list(linux.get(key), f"linux.{key}")]
    # Whether it is there is seen from outside, where a link could lead elsewhere: that costs a look inside, and nothing else.
    return [path for path in paths if path not in here and os.path.lexists(f"/proc/{pid}/root{path}")]


def _points(pid: int) -> dict[str, frozenset[str]]:
    """Mount points of the container, with `shared` and `master` where what is mounted there is that."""
    points: dict[str, frozenset[str]] = {}
    for line in Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape").split("\n"):
        words = line.partition(" - ")[0].split(" ")
        if len(words) > 5:
            points[unescape(words[4])] = frozenset(word.partition(":")[0] for word in words[6:]) & {"shared", "master"}
    return points


def _mounted(proc: int) -> dict[int, str]:
    """The mounts' numbers and points, of the namespace that the thread of `proc` is in."""
    fd = os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    with os.fdopen(fd, errors="surrogateescape") as file:
        lines = [line.split(" ") for line in file.read().split("\n") if line]
    return {int(words[0]): unescape(words[4]) for words in lines}


def _mount_id(fd: int, proc: int) -> int:
    with os.fdopen(os.open(f"fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)) as file:
        return next(int(line.split()[1]) for line in file if line.startswith("mnt_id:"))


def _topmost(points: Iterable[str], path: str) -> list[str]:
    """Mount points below `path` that are below no other of them."""
    below = sorted({point for point in points if point != path and _is_below(point, path)})
    return [point for point in below if not any(other != point and _is_below(point, other) for other in below)]


def _held(point: str, stack: ExitStack) -> int:
    fd = os.open(point, _PATH)
    stack.callback(os.close, fd)
    return fd


def _listed(found: int) -> list[str]:
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=found)
    try:
        return os.listdir(fd)  # noqa: PTH208  # a descriptor
    finally:
        os.close(fd)


def _is_null(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and (os.major(status.st_rdev), os.minor(status.st_rdev)) == _NULL


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def _failed(what: str, error: OSError) -> SmrError:
    return SmrError(
        f"{what} cannot be given to the restored container: {error.strerror}",
        hint="leave it out, or checkpoint a container that has it",
        code=Code.MOUNT_MISMATCH,
    )
