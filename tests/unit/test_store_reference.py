"""References to images: every form parses to what it says, and prints back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smr.images.reference import Reference, parse_name, parse_reference
from smr.proto.errors import Code, SmrError

WORDS = st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True)
NAMES = st.lists(WORDS, min_size=1, max_size=4).flatmap(
    lambda words: st.lists(st.sampled_from([".", "_", "-", "/", "--"]), min_size=len(words) - 1, max_size=len(words) - 1).map(
        lambda joints: "".join(word + joint for word, joint in zip(words, [*joints, ""], strict=True))
    )
)
TAGS = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,40}", fullmatch=True)
DIGESTS = st.from_regex(r"sha256:[0-9a-f]{6,64}", fullmatch=True)


@given(NAMES, TAGS)
def test_name_and_tag(name: str, tag: str) -> None:
    """NAME:TAG is that name and that tag, unless it has the form of a digest, which nobody can have as a name."""
    found = parse_reference(f"{name}:{tag}")
    if found.digest:
        assert (name, f"{name}:{tag}") == ("sha256", found.digest)
    else:
        assert found == Reference(name=name, tag=tag)
        assert parse_name(str(found)) == found


@given(NAMES)
def test_tag_defaults_to_latest(name: str) -> None:
    """NAME alone means NAME:latest."""
    assert parse_reference(name) == parse_reference(f"{name}:latest") == Reference(name=name, tag="latest")


@given(NAMES, DIGESTS)
def test_digest_with_and_without_a_name(name: str, digest: str) -> None:
    """A digest has no tag, may have a name before it, and is no name for a new image."""
    assert parse_reference(digest) == Reference(digest=digest)
    assert parse_reference(f"{name}@{digest}") == Reference(name=name, digest=digest)
    assert str(parse_reference(f"{name}@{digest}")) == f"{name}@{digest}"
    for text in (digest, f"{name}@{digest}"):
        with pytest.raises(SmrError) as caught:
            parse_name(text)
        assert caught.value.code is Code.ANNOTATION_INVALID


@given(st.text(max_size=80))
def test_any_text_parses_or_is_refused(text: str) -> None:
    """What parses is made of safe characters, whatever was given; everything else is ANNOTATION_INVALID."""
    try:
        found = parse_reference(text)
    except SmrError as error:
        assert error.code is Code.ANNOTATION_INVALID
        return
    assert found.digest or (found.name and found.tag)
    assert not set(str(found)) & set(" \n\0*?\\'\"$")
    assert ".." not in found.name.split("/")
    assert parse_reference(str(found)) == found


@pytest.mark.parametrize(
    "text",
    ["", "Llama", "llama:", ":tag", "a b", "/a", "a/", "-a", "a:b:c", "sha256:abc/", "a@sha256:abc", "a@md5:abcdef", "a\n"],
)
def test_malformed_references_are_refused(text: str) -> None:
    """The error shows the text and says which forms there are."""
    with pytest.raises(SmrError, match="NAME") as caught:
        parse_reference(text)
    assert caught.value.code is Code.ANNOTATION_INVALID
