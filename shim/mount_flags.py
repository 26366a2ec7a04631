"""Mounts of a restored container get the flags of its own spec: CRIU mounts with those that the image has.

An image that was made with a writable volume, or was altered, would otherwise make the volume writable where the new container's
spec has it read-only. Nothing of the tree has run yet.

    a bind mount of the spec       read-only, nosuid, nodev, noexec and nosymfollow as its options say, set or cleared; with
                                   options that say nothing at all, the source's, as runc does
    other mounts, read-only paths  what their options set is set, nothing is cleared; cgroups are the runtime's
    the root                       read-only or not
    a bind mount's source          at a place that the spec does not name: what all its mounts in the spec have in common is set

In other mount namespaces of the tree only the last holds. Options that begin with r (`rro`) hold for what is mounted below.
Mounts are changed by a thread of ours in the container's mount namespace, by mount_setattr(2) (Linux 5.12), each as one that
was looked up by its number: paths are the container's. The kernel refuses to make a mount read-only while a file there is
open for writing; then the restore is given up.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from smr.proto.annotations import Annotations
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Mount, Spec, as_list, as_object
from smr.shim import procs
from smr.shim.mount_calls import in_mount_namespace, opened, set_attributes
from smr.shim.mountinfo import unescape

# As options and mountinfo write them, with MOUNT_ATTR_*.
FLAGS: Mapping[str, int] = {"ro": 0x1, "nosuid": 0x2, "nodev": 0x4, "noexec": 0x8, "nosymfollow": 0x200000}
_CGROUPS = ("cgroup", "cgroup2")
_OPPOSITE = {"rw": "ro", "suid": "nosuid", "dev": "nodev", "exec": "noexec", "symfollow": "nosymfollow"}
# Options of runc's that change no flag, with those of propagation: with only these it leaves the source's flags.
_NO_FLAGS = frozenset({"bind", "rbind", "defaults", "remount", "idmap", "ridmap", "tmpcopyup"}) | {
    f"{deep}{kind}" for deep in ("", "r") for kind in ("private", "shared", "slave", "unbindable")
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A folder or file of a file system: `device` as mountinfo writes it (0:52), the path within it."""

    device: str
    root: str

    def holds(self, other: Place) -> bool:
        """Whether `other` is it or below it."""
        return self.device == other.device and _below(other.root, self.root)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mounted:
    """One line of a mountinfo."""

    id: int
    place: Place
    point: str
    flags: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is wanted of the mount at a destination; `deep` of those below it as well. `source`: a bind mount's."""

    destination: str
    on: frozenset[str] = frozenset()
    off: frozenset[str] = frozenset()
    deep: frozenset[str] = frozenset()
    source: Place | None = None


def keep_to_spec(pid: int, spec: Spec, rootfs: str, annotations: Annotations) -> None:
    """Change the mounts of the stopped tree of `pid` to what `spec` says. Raises MOUNT_MISMATCH where that cannot be done.

    `rootfs` is the root's place on the host.
    """
    rules = wanted(spec, rootfs, annotations)
    namespaces: dict[int, int] = {}
    for process in procs.tree(pid):
        with contextlib.suppress(FileNotFoundError):  # a zombie has none
            namespaces.setdefault(Path(f"/proc/{process.pid}/ns/mnt").stat().st_ino, process.pid)
    namespaces.pop(Path("/proc/self/ns/mnt").stat().st_ino, None)
    for one in namespaces.values():
        _in_namespace(f"/proc/{one}/ns/mnt", rules, named=one == pid)


def wanted(spec: Spec, rootfs: str, annotations: Annotations) -> list[Wanted]:
    """What a spec says of its mounts, in their order; of one that smr.mount.* gives another source only what it sets."""
    own = _mounted(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))
    linux = as_object(spec.document.get("linux"), "linux")
    paths = [str(path) for path in as_list(linux.get("readonlyPaths"), "linux.readonlyPaths")]
    return [
        _root(spec, rootfs, own),
        *(
            _bind(mount, own, annotations) if mount.is_bind else Wanted(destination=mount.destination, on=_on(mount)[0])
            for mount in spec.mounts
            if mount.type not in _CGROUPS
        ),
        *(Wanted(destination=path, on=frozenset({"ro"})) for path in paths),
    ]


def _root(spec: Spec, rootfs: str, own: Mapping[int, Mounted]) -> Wanted:
    read_only = frozenset({"ro"})
    if spec.rootfs_readonly:
        return Wanted(destination="/", on=read_only)
    found = _source(rootfs, own)
    return Wanted(destination="/", off=read_only - found[1] if found is not None else frozenset())


def _bind(mount: Mount, own: Mapping[int, Mounted], annotations: Annotations) -> Wanted:
    on, deep = _on(mount)
    given = mount.destination in annotations.mounts
    found = _source(annotations.mounts[mount.destination] if given else mount.source, own)
    if found is None:
        return Wanted(destination=mount.destination, on=on, deep=deep)
    place, flags = found
    if all(option in _NO_FLAGS for option in mount.options):
        on |= flags
    off = frozenset() if given else FLAGS.keys() - on - flags
    return Wanted(destination=mount.destination, on=on, off=frozenset(off), deep=deep, source=place)


def _on(mount: Mount) -> tuple[frozenset[str], frozenset[str]]:
    """Flags that the options set, and those of them that hold for what is mounted below; the last word counts, as in runc."""
    on: set[str] = set()
    deep: set[str] = set()
    for option in mount.options:
        word = option[1:] if option.startswith("r") and option not in FLAGS and option not in _OPPOSITE else option
        if word in FLAGS:
            on.add(word)
        elif word in _OPPOSITE:
            on.discard(_OPPOSITE[word])
        if word != option:
            (deep.add if word in FLAGS else deep.discard)(_OPPOSITE.get(word, word))
    return frozenset(on), frozenset(deep & FLAGS.keys())


def _source(path: str, own: Mapping[int, Mounted]) -> tuple[Place, frozenset[str]] | None:
    """Where a path of the host's lies, and the flags of its mount; None when it is not there."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        mount = own.get(_mount_id(fd))
        real = str(Path(f"/proc/self/fd/{fd}").readlink())
    finally:
        os.close(fd)
    if mount is None or not _below(real, mount.point):
        return None
    within = os.path.relpath(real, mount.point)
    return Place(device=mount.place.device, root=os.path.normpath(f"{mount.place.root.rstrip('/')}/{within}")), mount.flags


def changes(
    mounts: Mapping[int, Mounted], at: Mapping[int, Wanted], rules: Sequence[Wanted]
) -> Iterator[tuple[Mounted, frozenset[str], frozenset[str]]]:
    """Each mount that is not as it should be, with flags to set and to clear. `at`: the rules of mounts, by their number."""
    for mount in mounts.values():
        rule = at.get(mount.id)
        on = rule.on if rule is not None else _in_common(mount, rules)
        off = rule.off if rule is not None else frozenset()
        for above in at.values():
            if above.deep and _below(mount.point, above.destination):
                on |= above.deep
        if on - mount.flags or (off - on) & mount.flags:
            yield mount, on - mount.flags, (off - on) & mount.flags


def _in_common(mount: Mounted, rules: Iterable[Wanted]) -> frozenset[str]:
    """What holds for each of the spec's mounts of that source."""
    found = [rule.on for rule in rules if rule.source is not None and rule.source.holds(mount.place)]
    return frozenset.intersection(*found) if found else frozenset()


def _in_namespace(namespace: str, rules: Sequence[Wanted], *, named: bool) -> None:
    """`named`: destinations of the rules are paths there."""
    try:
        in_mount_namespace(namespace, lambda proc: _apply(proc, rules, named=named))
    except OSError as error:
        raise SmrError(f"the mounts of the restored container cannot be looked at: {error}", code=Code.MOUNT_MISMATCH) from error


def _apply(proc: int, rules: Sequence[Wanted], *, named: bool) -> None:
    mounts = _mounted(_read("mountinfo", proc))
    at: dict[int, Wanted] = {}
    for rule in rules if named else ():
        with contextlib.suppress(OSError), opened(rule.destination, os.O_PATH) as fd:
            number, path = _mount_id(fd, proc), os.readlink(f"fd/{fd}", dir_fd=proc)
            if number in mounts and mounts[number].point == path:
                at[number] = Wanted(destination=path, on=rule.on, off=rule.off, deep=rule.deep, source=rule.source)
    for mount, on, off in list(changes(mounts, at, rules)):
        for part in ((on, frozenset[str]()), (frozenset[str](), off)):
            if any(part):
                _change(mount, *part, proc)


def _change(mount: Mounted, on: frozenset[str], off: frozenset[str], proc: int) -> None:
    try:
        with opened(mount.point, os.O_PATH) as fd:
            if _mount_id(fd, proc) != mount.id:
                raise OSError(errno.EXDEV, "another mount lies over it")
            set_attributes(fd, on=_bits(on), off=_bits(off))
    except OSError as error:
        if not on and "ro" not in off:
            return  # more than the spec asks for: a user namespace's mounts keep such flags, and runc leaves them too
        raise _mismatch(mount, on, error) from error


def _mismatch(mount: Mounted, on: frozenset[str], error: OSError) -> SmrError:
    has, needs = ("without " + ", ".join(sorted(on)), "with it") if on else ("read-only", "writable")
    hint = "make the checkpoint from a container whose mounts have the same options"
    if error.errno == errno.EBUSY:
        hint = f"a process of the checkpoint has a file there open for writing: give the container {mount.point} writable"
    elif error.errno == errno.ENOSYS:
        hint += "; on Linux 5.12 and newer SMR changes them"
    return SmrError(
        f"the image has the mount {mount.point} {has}, this container {needs}, and it cannot be changed: {error.strerror}",
        hint=hint,
        code=Code.MOUNT_MISMATCH,
        mount=mount.point,
    )


def _mounted(text: str) -> dict[int, Mounted]:
    """A mountinfo (proc_pid_mountinfo(5)), by the mounts' numbers."""
    found = {}
    for line in text.split("\n"):
        words = line.split(" ")
        if len(words) > 5:
            place = Place(device=words[2], root=unescape(words[3]))
            flags = frozenset(words[5].split(",")) & FLAGS.keys()
            found[int(words[0])] = Mounted(id=int(words[0]), place=place, point=unescape(words[4]), flags=frozenset(flags))
    return found


def _mount_id(fd: int, proc: int | None = None) -> int:
    """The number of the mount that an open file is on; `proc` is /proc/thread-self, where that is not to be found by path."""
    text = _read(f"fdinfo/{fd}" if proc is not None else f"/proc/self/fdinfo/{fd}", proc)
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("mnt_id:"))


def _read(path: str, folder: int | None) -> str:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder), errors="surrogateescape") as file:
        return file.read()


def _bits(names: Iterable[str]) -> int:
    return sum(FLAGS[name] for name in names)


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")
