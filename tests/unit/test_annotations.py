"""Annotations: what a container may ask for, and what it is told when it asks wrongly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smr.proto.annotations import (
    CRIU_OPTIONS,
    KEYS,
    OWN_STATUS,
    Annotations,
    Check,
    Fallback,
    Pages,
    Tcp,
    check_reference,
    parse,
    wanted,
)
from smr.proto.errors import Code, SmrError


def failure(annotations: dict[str, str]) -> SmrError:
    """The error that these annotations give."""
    with pytest.raises(SmrError) as caught:
        parse(annotations)
    return caught.value


def test_no_annotation_of_ours_asks_for_nothing() -> None:
    """Annotations of others, even similar ones, are not ours."""
    assert parse({}) is None
    assert parse({"io.podman.annotations.seccomp": "x", "smrx.restore": "a", "org.smr.restore": "a"}) is None


def test_image_alone_gives_the_defaults() -> None:
    """Cold start on failure, TCP connections closed, everything checked."""
    assert parse({"smr.restore": "llama:warm"}) == Annotations(
        restore="llama:warm",
        fallback=Fallback.COLD,
        tcp=Tcp.CLOSE,
        pages=Pages.AUTO,
        rootfs=Check.CHECK,
        command=Check.CHECK,
        mounts={},
        criu={},
    )


def test_every_key_is_read() -> None:
    """Each annotation reaches its member."""
    found = parse(
        {
            "smr.restore": "llama",
            "smr.fallback": "fail",
            "smr.tcp": "established",
            "smr.pages": "criu",
            "smr.rootfs": "force",
            "smr.command": "force",
            "smr.mount./data/in": "/srv/data",
            "smr.criu.ghost-limit": "4M",
            "smr.criu.link-remap": "",
        }
    )
    assert found == Annotations(
        restore="llama",
        fallback=Fallback.FAIL,
        tcp=Tcp.ESTABLISHED,
        pages=Pages.CRIU,
        rootfs=Check.FORCE,
        command=Check.FORCE,
        mounts={"/data/in": "/srv/data"},
        criu={"ghost-limit": "4M", "link-remap": ""},
    )


@pytest.mark.parametrize("typo", ["smr.resotre", "smr.restor", "smr.Restore", "smr.restore2"])
def test_mistyped_restore_is_an_error_that_suggests_it(typo: str) -> None:
    """A mistyped key must not start a cold container without a word."""
    error = failure({typo: "llama"})
    assert error.code is Code.ANNOTATION_UNKNOWN
    assert typo in error.message
    assert error.hint == "did you mean smr.restore?"


def test_unlike_key_lists_the_known_ones() -> None:
    """Without a close match the hint has them all."""
    error = failure({"smr.zzzzzz": "1", "smr.restore": "llama"})
    assert error.code is Code.ANNOTATION_UNKNOWN
    assert all(key in error.hint for key in KEYS)


@pytest.mark.parametrize("fallback", ["cold", "fail"])
def test_fallback_never_hides_an_unknown_key(fallback: str) -> None:
    """The error is raised whatever smr.fallback says."""
    assert failure({"smr.restore": "a", "smr.fallback": fallback, "smr.tpc": "close"}).hint == "did you mean smr.tcp?"


def test_options_without_an_image_are_an_error() -> None:
    """There is nothing to apply them to."""
    error = failure({"smr.tcp": "close"})
    assert error.code is Code.ANNOTATION_INVALID
    assert "smr.tcp" in error.message
    assert "smr.restore" in error.hint


@pytest.mark.parametrize("key", ["smr.fallback", "smr.tcp", "smr.pages", "smr.rootfs", "smr.command"])
@pytest.mark.parametrize("value", ["", "yes", "COLD", "close "])
def test_other_values_are_errors_that_list_the_allowed(key: str, value: str) -> None:
    """The hint is the annotation with every value it may have."""
    error = failure({"smr.restore": "llama", key: value})
    assert error.code is Code.ANNOTATION_INVALID
    assert f"{key}={value}" in error.message
    assert error.hint.startswith(f"use {key}=")
    assert "|" in error.hint


@pytest.mark.parametrize(
    "reference", ["a", "llama:Warm_1.2", "team/llama", "r.example/a-b/c__d:x", "sha256:abcdef", "a@sha256:" + "0" * 64]
)
def test_references_of_images(reference: str) -> None:
    """NAME[:TAG] as OCI has it, a digest or six digits of it, or both."""
    assert check_reference(reference) == reference


@pytest.mark.parametrize(
    "reference",
    [
        "",
        " ",
        "Llama",
        "a:",
        ":a",
        "../x",
        "/a",
        "a//b/",
        "a b",
        "a\n",
        "a:b:c",
        "sha256:abc",
        "sha256:xyzxyz",
        "a@",
        "-a",
        "a:" + "x" * 129,
    ],
)
def test_what_is_no_reference(reference: str) -> None:
    """Anything else is refused with the value in the message."""
    error = failure({"smr.restore": reference})
    assert error.code is Code.ANNOTATION_INVALID
    assert f"'{reference}'" in error.message


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("/data=/srv/data", {"/data": "/srv/data"}),
        (" /data = /srv/data , /m=/mnt/models,", {"/data": "/srv/data", "/m": "/mnt/models"}),
        ("/data//in/=/srv/a=b", {"/data/in": "/srv/a=b"}),
        (r"/a\,b=/srv/c\,d,/e\=f=/srv/\\", {"/a,b": "/srv/c,d", "/e=f": "/srv/\\"}),
        ("", {}),
    ],
)
def test_a_list_of_mounts(value: str, found: dict[str, str]) -> None:
    """DEST=SOURCE, with commas between; a backslash takes the meaning from a comma or an equal sign."""
    parsed = parse({"smr.restore": "a", "smr.mounts": value, "smr.mount./own": "/srv"})
    assert parsed is not None
    assert parsed.mounts == {"/own": "/srv", **found}


@pytest.mark.parametrize(
    "value", ["/data", "data=/srv", "/data=srv", "/data=", "=/srv", "/=/srv", "/../x=/srv", "/a=/b,/a/=/c", "/own/=/srv"]
)
def test_a_bad_list_of_mounts(value: str) -> None:
    """What is not understood is shown."""
    error = failure({"smr.restore": "a", "smr.mounts": value, "smr.mount./own": "/srv"})
    assert error.code is Code.ANNOTATION_INVALID
    assert "smr.mounts" in error.message
    assert "smr.mounts=/data=" in error.hint or "once" in error.hint


@pytest.mark.parametrize(
    ("key", "value"), [("smr.mount.data", "/srv"), ("smr.mount.", "/srv"), ("smr.mount./data", "srv"), ("smr.mount./data", "")]
)
def test_mounts_are_absolute_on_both_sides(key: str, value: str) -> None:
    """A relative path has no meaning for a runtime."""
    error = failure({"smr.restore": "llama", key: value})
    assert error.code is Code.ANNOTATION_INVALID
    assert key in error.message
    assert "absolute" in error.message


@pytest.mark.parametrize(
    "option", ["action-script", "libdir", "external", "exec-cmd", "lsm-profile", "ghost-limit x", "", "tcp_close"]
)
def test_criu_options_that_could_hand_out_the_host_are_refused(option: str) -> None:
    """Only those of the list pass; the hint is the list."""
    error = failure({"smr.restore": "llama", f"smr.criu.{option}": "x"})
    assert error.code is Code.ANNOTATION_INVALID
    assert all(allowed in error.hint for allowed in CRIU_OPTIONS)


@pytest.mark.parametrize("value", ["1\naction-script /tmp/x", "a b", "/etc", "1\r", "é", "x" * 65, "$(x)", "#"])
def test_value_of_a_criu_option_cannot_become_another_option(value: str) -> None:
    """The value stands in a line of CRIU's configuration file: no newline, no space, no path."""
    error = failure({"smr.restore": "llama", "smr.criu.timeout": value})
    assert error.code is Code.ANNOTATION_INVALID
    assert "smr.criu.timeout" in error.message


@pytest.mark.parametrize(
    "mark", [{"io.kubernetes.cri.container-type": "sandbox"}, {"io.kubernetes.cri-o.ContainerType": "sandbox"}]
)
def test_pod_sandbox_is_never_ours(mark: dict[str, str]) -> None:
    """It carries the annotations of its pod, valid or not."""
    assert not wanted({**mark, "smr.restore": "llama"})
    assert parse({**mark, "smr.resotre": "llama"}) is None


def test_container_of_a_pod_is_ours() -> None:
    """The same key says container there."""
    found = parse({"io.kubernetes.cri.container-type": "container", "smr.restore": "llama"})
    assert found is not None
    assert found.restore == "llama"


def test_own_status_is_no_request() -> None:
    """What SMR wrote into a container's annotations is not read back, alone or beside a request."""
    status = dict.fromkeys(OWN_STATUS, "cold")
    assert not wanted(status)
    assert parse(status) is None
    assert parse({**status, "smr.restore": "llama"}) == parse({"smr.restore": "llama"})


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=20)), st.text(max_size=20), st.text(max_size=20))
def test_any_annotations_parse_or_give_a_clear_error(others: dict[str, str], suffix: str, value: str) -> None:
    """Whatever the keys and values: a result that names a valid image, None, or an error of annotations with a hint."""
    annotations = {**others, f"smr.{suffix}": value}
    try:
        found = parse(annotations)
    except SmrError as error:
        assert error.code in {Code.ANNOTATION_UNKNOWN, Code.ANNOTATION_INVALID}
        assert error.message
        assert error.hint
    else:
        assert (found is not None) == wanted(annotations)
        if found is not None:
            assert check_reference(found.restore) == annotations["smr.restore"]


def test_options_of_a_dump_without_a_restore() -> None:
    """A container may ask for what counts at its own checkpoint; what counts at a restore only needs one."""
    assert parse({"smr.criu.ghost-limit": "4G", "smr.quiesce": "vllm"}) is None
    assert failure({"smr.criu.weak-sysctls": ""}).code is Code.ANNOTATION_INVALID
    assert failure({"smr.criu.ghost-limit": "much"}).code is Code.ANNOTATION_INVALID


@given(st.sampled_from(sorted(CRIU_OPTIONS)), st.text(max_size=80))
def test_accepted_criu_values_are_one_word(option: str, value: str) -> None:
    """Whatever is accepted fits a line of CRIU's configuration file as one word."""
    try:
        found = parse({"smr.restore": "llama", f"smr.criu.{option}": value})
    except SmrError as error:
        assert error.code is Code.ANNOTATION_INVALID
    else:
        assert found is not None
        assert found.criu == {option: value}
        assert value.isascii()
        assert value.split() == ([value] if value else [])


def test_addresses_are_pairs_of_a_kind() -> None:
    """Addresses in any spelling, interfaces by name; blanks around them do not matter."""
    found = parse({"smr.restore": "app", "smr.addresses": "10.0.0.1 = 10.0.0.2, FD00::01=fd00:0::2,eth0=net1"})
    assert found is not None
    assert found.addresses == {"10.0.0.1": "10.0.0.2", "fd00::1": "fd00::2", "eth0": "net1"}


@pytest.mark.parametrize(
    "value", ["x", "10.0.0.1=", "=10.0.0.1", "10.0.0.1=fd00::1", "10.0.0.1=eth0", "10.0.0.256=10.0.0.1", "a=b,a=c", "a/b=c", ","]
)
def test_addresses_that_are_none(value: str) -> None:
    """Never a cold start: the pair is in the message."""
    with pytest.raises(SmrError) as caught:
        parse({"smr.restore": "app", "smr.addresses": value})
    assert caught.value.code is Code.ANNOTATION_INVALID
    assert "smr.addresses=OLD=NEW" in caught.value.hint
