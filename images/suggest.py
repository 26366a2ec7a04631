"""What to say to somebody whose image is not there."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from smr.images.layout import Entry
from smr.images.reference import Reference


def suggestion(reference: Reference, entries: Sequence[Entry]) -> str:
    """The hint of IMAGE_NOT_FOUND: other tags of the name, else similar names, else how to get an image."""
    tags = [entry.reference for entry in entries if entry.name and entry.name == reference.name]
    names = {entry.name: entry.reference for entry in entries} | {entry.reference: entry.reference for entry in entries}
    close = tags or list(dict.fromkeys(names[name] for name in _close(reference, list(names))))
    if close:
        return "did you mean " + " or ".join(close[:3]) + "?"
    if entries:
        return "'smr images ls' lists the images of this node"
    return "this store is empty: make an image with 'smr checkpoint CONTAINER -n NAME'"


def _close(reference: Reference, names: Sequence[str]) -> list[str]:
    wanted = (reference.digest,) if reference.digest else (str(reference), reference.name)
    return [match for text in wanted for match in get_close_matches(text, names, n=3)]
