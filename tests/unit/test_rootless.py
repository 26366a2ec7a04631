"""Without the node's root nothing is checkpointed or restored, and the reason says what is missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from smr.proto.errors import Code, SmrError
from smr.shim import rootless


@pytest.mark.parametrize(
    ("uid", "uid_map", "words"),
    [
        (1000, "0 0 4294967295", "uid 1000"),
        (0, "0 3333 1\n1 100000 65536", "the node's uid 3333"),
        (0, "0 100000 65536", "the node's uid 100000"),
        (0, "0 0 1", "the node's uid 0"),
        (0, "5 0 1", "nobody"),
    ],
)
def test_rootless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uid: int, uid_map: str, words: str) -> None:
    """A user, and root of a user namespace, whatever ids it has."""
    (tmp_path / "uid_map").write_text(uid_map)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    with pytest.raises(SmrError) as caught:
        rootless.check(tmp_path / "uid_map")
    assert caught.value.code is Code.PERMISSION
    assert words in caught.value.message
    assert "as root" in caught.value.hint


def test_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The node's root may."""
    (tmp_path / "uid_map").write_text("         0          0 4294967295\n")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    rootless.check(tmp_path / "uid_map")
