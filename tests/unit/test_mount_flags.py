"""What is to be changed on the mounts of a restored container, from spec and mountinfo alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from smr.proto.annotations import Annotations
from smr.proto.oci import parse_spec
from smr.shim import mount_flags
from smr.shim.mount_flags import Mounted, Place, Wanted

NONE = Annotations(restore="app:warm")
HARD = frozenset({"ro", "nosuid", "nodev", "noexec"})


def want(options: list[str], source: Path, annotations: Annotations = NONE, kind: str = "bind") -> Wanted:
    """What is wanted of /data, mounted from `source` with these options."""
    mount = {"destination": "/data", "type": kind, "source": str(source), "options": options}
    rules = mount_flags.wanted(parse_spec({"mounts": [mount]}), str(source), annotations)
    return rules[-1]


@pytest.mark.parametrize(
    ("options", "on"),
    [
        (["rbind", "rprivate"], set()),
        (["bind", "ro"], {"ro"}),
        (["rbind", "rw", "nosuid", "nodev"], {"nosuid", "nodev"}),
        (["rbind", "ro", "rw"], set()),
        (["rbind", "noexec", "exec", "nodev"], {"nodev"}),
        (["rbind", "rro"], {"ro"}),
        (["rbind", "relatime", "nosymfollow"], {"nosymfollow"}),
    ],
)
def test_options_of_a_bind_mount(tmp_path: Path, options: list[str], on: set[str]) -> None:
    """Flags are set as the options say, the last word counting; all others are cleared that the source does not have."""
    found = want(options, tmp_path)
    assert found.on == on
    assert not found.off & found.on
    assert found.off <= mount_flags.FLAGS.keys() - on
    assert ("ro" in found.off) == ("ro" not in on)


def test_a_source_that_is_restricted_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a word on flags the mount is as its source; with one, what only the source has is neither set nor cleared."""
    line = f"21 1 8:1 /host / rw,nosuid,nodev,relatime - ext4 /dev/sda rw\n22 21 8:2 / {tmp_path} ro - ext4 /dev/sdb rw\n"
    own = mount_flags._mounted(line)
    monkeypatch.setattr(mount_flags, "_mounted", lambda _: own)
    monkeypatch.setattr(mount_flags, "_mount_id", lambda _: 21)
    silent, speaking = want(["rbind"], Path("/usr")), want(["rbind", "rw"], Path("/usr"))
    assert silent.on == {"nosuid", "nodev"}
    assert not speaking.on
    assert speaking.off == {"ro", "noexec", "nosymfollow"}
    assert speaking.source == Place(device="8:1", root="/host/usr")


def test_a_source_of_an_annotation(tmp_path: Path) -> None:
    """smr.mount.DEST may not make a mount writable that the spec or the checkpoint has read-only."""
    other = Annotations(restore="app:warm", mounts={"/data": str(tmp_path)})
    found = want(["bind", "ro"], Path("/nowhere"), other)
    assert (found.on, found.off) == ({"ro"}, frozenset())
    assert want(["bind", "rw"], Path("/nowhere"), other).off == frozenset()


def test_mounts_of_other_kinds(tmp_path: Path) -> None:
    """What they are to have is set, nothing is cleared; cgroups are the runtime's."""
    assert want(["ro", "nosuid"], tmp_path, kind="tmpfs") == Wanted(destination="/data", on=frozenset({"ro", "nosuid"}))
    assert want(["ro"], tmp_path, kind="cgroup").destination == "/"


def mounted(number: int, point: str, *flags: str, device: str = "8:1", root: str = "/srv/data") -> Mounted:
    """A line of a mountinfo."""
    return Mounted(id=number, place=Place(device=device, root=root), point=point, flags=frozenset(flags))


def changed(rules: dict[int, Wanted], *mounts: Mounted) -> dict[str, tuple[set[str], set[str]]]:
    """Mount point to what is set and what is cleared there."""
    found = mount_flags.changes({mount.id: mount for mount in mounts}, rules, list(rules.values()))
    return {mount.point: (set(on), set(off)) for mount, on, off in found}


DATA = Place(device="8:1", root="/srv/data")


def test_what_is_changed() -> None:
    """Only what differs; what is wanted on is never cleared."""
    rule = Wanted(destination="/data", on=frozenset({"ro"}), off=frozenset({"noexec", "nodev"}), source=DATA)
    assert changed({1: rule}, mounted(1, "/data", "ro", "nosuid")) == {}
    assert changed({1: rule}, mounted(1, "/data", "noexec")) == {"/data": ({"ro"}, {"noexec"})}


def test_a_source_at_places_without_a_rule() -> None:
    """What all mounts of the source have in common holds wherever it, or a part of it, is mounted, and nowhere else."""
    hard = Wanted(destination="/a", on=HARD, source=DATA)
    soft = Wanted(destination="/b", on=frozenset({"nodev"}), source=DATA)
    at_a = mounted(1, "/a", *HARD)
    part = mounted(3, "/part", root="/srv/data/deep")
    others = (mounted(4, "/c", root="/srv/database"), mounted(5, "/d", device="8:2"))
    assert changed({1: hard}, at_a, part, *others) == {"/part": (set(HARD), set())}
    assert changed({1: hard, 2: soft}, at_a, mounted(2, "/b", "nodev"), part, *others) == {"/part": ({"nodev"}, set())}


def test_a_flag_for_what_is_below() -> None:
    """rro is for mounts below, also those of other file systems; ro is not."""
    rules = {1: Wanted(destination="/a", on=frozenset({"ro"}), deep=frozenset({"ro"}), source=DATA)}
    below = mounted(2, "/a/disk", device="8:2", root="/")
    beside = mounted(3, "/ab", device="8:2", root="/")
    assert changed(rules, mounted(1, "/a", "ro"), below, beside) == {"/a/disk": ({"ro"}, set())}


def test_the_root(tmp_path: Path) -> None:
    """Read-only or writable as the spec says."""
    read_only = mount_flags.wanted(parse_spec({"root": {"path": "rootfs", "readonly": True}}), str(tmp_path), NONE)
    writable = mount_flags.wanted(parse_spec({"root": {"path": "rootfs"}}), str(tmp_path), NONE)
    assert (read_only[0].on, read_only[0].off) == ({"ro"}, frozenset())
    assert (writable[0].on, writable[0].off) == (frozenset(), {"ro"})


def test_read_only_paths() -> None:
    """Are to be read-only."""
    rules = mount_flags.wanted(parse_spec({"linux": {"readonlyPaths": ["/proc/sys"]}}), "/", NONE)
    assert rules[-1] == Wanted(destination="/proc/sys", on=frozenset({"ro"}))
