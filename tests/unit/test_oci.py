"""The OCI spec as SMR reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smr.proto.errors import Code, SmrError
from smr.proto.oci import Mount, load_spec, parse_spec

DOCUMENT: dict[str, object] = {
    "ociVersion": "1.0.2",
    "hostname": "box",
    "process": {"args": ["serve", "--port", "80"], "terminal": True, "cwd": "/"},
    "root": {"path": "/var/lib/root", "readonly": True},
    "annotations": {"smr.restore": "llama"},
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/data", "type": "bind", "source": "/srv", "options": ["rbind", "ro"]},
        {"destination": "/dev/shm", "type": "none", "source": "/run/shm", "options": ["rbind"]},
        {"destination": "/x", "type": "tmpfs", "source": "tmpfs", "options": None},
    ],
    "linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/n"}], "cgroupsPath": "/default/c"},
}


def test_fields_of_a_spec() -> None:
    """Each member comes from its place in the document, which is kept whole."""
    spec = parse_spec(DOCUMENT)
    assert spec.args == ("serve", "--port", "80")
    assert (spec.terminal, spec.rootfs, spec.rootfs_readonly, spec.hostname) == (True, "/var/lib/root", True, "box")
    assert spec.annotations == {"smr.restore": "llama"}
    assert spec.namespaces == {"pid": "", "network": "/run/netns/n"}
    assert spec.cgroups_path == "/default/c"
    assert spec.mounts[1] == Mount(destination="/data", type="bind", source="/srv", options=("rbind", "ro"))
    assert spec.document is DOCUMENT


def test_bind_by_type_or_by_option() -> None:
    """runc takes either for a bind mount."""
    assert [mount.destination for mount in parse_spec(DOCUMENT).mounts if mount.is_bind] == ["/data", "/dev/shm"]


@pytest.mark.parametrize("document", [{}, {"process": None, "root": None, "linux": None, "mounts": None, "annotations": None}])
def test_missing_and_null_are_defaults(document: dict[str, object]) -> None:
    """runc's own files leave fields out, others write null."""
    spec = parse_spec(document)
    assert (spec.args, spec.terminal, spec.rootfs, spec.mounts, spec.namespaces, spec.annotations) == (
        (),
        False,
        "rootfs",
        (),
        {},
        {},
    )


@pytest.mark.parametrize(("rootfs", "path"), [("rootfs", "/b/rootfs"), ("/abs", "/abs")])
def test_root_may_be_relative_to_the_bundle(rootfs: str, path: str) -> None:
    """`root.path` is the bundle's, unless absolute."""
    assert parse_spec({"root": {"path": rootfs}}).rootfs_path(Path("/b")) == Path(path)


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"process": []}, "process"),
        ({"process": {"args": "sh"}}, "process.args"),
        ({"root": "rootfs"}, "root"),
        ({"mounts": {}}, "mounts"),
        ({"mounts": ["x"]}, "mounts[]"),
        ({"mounts": [{"options": "ro"}]}, "mounts[].options"),
        ({"linux": {"namespaces": [1]}}, "linux.namespaces[]"),
        ({"annotations": ["a"]}, "annotations"),
    ],
)
def test_wrong_type_names_the_field(document: dict[str, object], named: str) -> None:
    """The message says which field, what was needed and what was found."""
    with pytest.raises(SmrError) as caught:
        parse_spec(document)
    assert caught.value.code is Code.SPEC_INVALID
    assert caught.value.message.startswith(f"{named}: needed a JSON ")


@pytest.mark.parametrize("text", [None, "", "{", "[]", '"x"', "\xff"])
def test_unreadable_bundle_names_the_file(tmp_path: Path, text: str | None) -> None:
    """No config.json, no JSON, no object: SPEC_INVALID with the path."""
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SmrError) as caught:
        load_spec(tmp_path)
    assert caught.value.code is Code.SPEC_INVALID
    assert str(tmp_path / "config.json") in caught.value.message


def test_load_reads_the_bundle(tmp_path: Path) -> None:
    """A bundle's config.json is the spec."""
    (tmp_path / "config.json").write_text(json.dumps(DOCUMENT))
    assert load_spec(tmp_path) == parse_spec(DOCUMENT)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("process", "root", "linux", "mounts", "annotations", "hostname"), _JSON))
)
def test_any_json_is_a_spec_or_spec_invalid(document: dict[str, object]) -> None:
    """Nothing else escapes, whatever an engine writes."""
    try:
        spec = parse_spec(document)
    except SmrError as error:
        assert error.code is Code.SPEC_INVALID
    else:
        assert all(isinstance(value, str) for value in spec.annotations.values())
