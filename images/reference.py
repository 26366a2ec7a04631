"""References to images: NAME[:TAG], sha256:HEX (6 digits or more), NAME@sha256:HEX."""

from __future__ import annotations

from dataclasses import dataclass

from smr.proto.annotations import check_reference
from smr.proto.errors import Code, SmrError

DEFAULT_TAG = "latest"
_DIGEST_PREFIX = "sha256:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A parsed reference. `digest` is a prefix of one, or empty; a reference by digest has no tag."""

    name: str = ""
    tag: str = ""
    digest: str = ""

    def __str__(self) -> str:
        """The reference in full, the default tag spelled out."""
        if self.digest:
            return f"{self.name}@{self.digest}" if self.name else self.digest
        return f"{self.name}:{self.tag}"


def parse_reference(text: str) -> Reference:
    """Parse any reference; ANNOTATION_INVALID when it is none."""
    check_reference(text)
    name, at, digest = text.rpartition("@")
    if at or text.startswith(_DIGEST_PREFIX):
        return Reference(name=name, digest=digest)
    name, _, tag = text.partition(":")
    return Reference(name=name, tag=tag or DEFAULT_TAG)


def parse_name(text: str) -> Reference:
    """Parse NAME[:TAG], as a new image gets it; ANNOTATION_INVALID for a digest, which nobody can choose."""
    reference = parse_reference(text)
    if reference.digest:
        raise SmrError(
            f"'{text}' is a digest: needed NAME[:TAG]",
            hint="name the image, for example llama:warm",
            code=Code.ANNOTATION_INVALID,
        )
    return reference
