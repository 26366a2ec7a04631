"""TOML text edited in place: proved, and taken back to the byte."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smr.proto.errors import Code, SmrError
from smr.shim.register.toml_edit import add_tables, at, has_header, merge, parse, render, set_value, strip

FILE = Path("/etc/thing.toml")
ADDITION: dict[str, object] = {"plugins": {"io.x.v1": {"runtimes": {"smr": {"path": "/a b/c", "list": ["x.*"], "on": True}}}}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "version = 2",
        "version = 2\n",
        "# only a comment\r\nversion = 2\r\n",
        '[plugins]\n  # runtimes\n  [plugins."io.x.v1".runtimes]\n    [plugins."io.x.v1".runtimes.runc]\n    path = "r"\n\n\n',
        'text = """\n[not.a.table]\n"""\n',
    ],
)
def test_added_tables_are_in_force_and_strip_restores_every_byte(text: str) -> None:
    """The result means old plus addition; strip gives the old text back exactly."""
    added = add_tables(text, ADDITION, FILE)
    assert tomllib.loads(added) == merge(tomllib.loads(text), ADDITION)
    assert added.startswith(text)
    assert strip(added) == text


def test_text_added_behind_the_block_by_others_survives_strip() -> None:
    """Only our lines are taken away."""
    added = add_tables("a = 1\n", ADDITION, FILE) + "[other]\nb = 2\n"
    assert strip(added) == "a = 1\n[other]\nb = 2\n"


@pytest.mark.parametrize(
    "text", ["plugins = {}\n", '[plugins]\n"io.x.v1" = { a = 1 }\n', '[plugins]\n"io.x.v1".runtimes.smr.a = 1\n']
)
def test_inline_and_dotted_parents_are_refused_with_the_lines_to_add(text: str) -> None:
    """TOML cannot extend them: the file is left to its owner."""
    with pytest.raises(SmrError, match=r"cannot add to /etc/thing.toml") as caught:
        add_tables(text, ADDITION, FILE)
    assert caught.value.code is Code.CONFIG_INVALID
    assert 'path = "/a b/c"' in caught.value.hint


TABLE = ["plugins", "cri", "containerd"]


@pytest.mark.parametrize(
    "body",
    [
        '  default = "runc"  # the default\r\n  b = 1\r\n',
        "b = 1\n[plugins.cri.containerd.runtimes]\n",
        'list = [\n  "x",\n]\ndefault="runc"\n',
        "",
    ],
)
def test_a_value_is_set_in_its_table_and_strip_restores_every_byte(body: str) -> None:
    """An assignment is replaced where there is one, else added; the rest of the table is untouched."""
    text = f'version = 2\n  [plugins . "cri" . containerd] # here\n{body}[after]\ndefault = "other"\n'
    changed = set_value(text, TABLE, "default", "smr", FILE)
    document = tomllib.loads(changed)
    assert document == merge(tomllib.loads(text), {"plugins": {"cri": {"containerd": {"default": "smr"}}}})
    assert document["after"] == {"default": "other"}
    assert strip(changed) == text


def test_a_value_and_a_block_are_taken_back_together() -> None:
    """The two kinds of edit do not hinder each other."""
    text = '[plugins.cri.containerd]\ndefault = "runc"\n'
    changed = add_tables(set_value(text, TABLE, "default", "smr", FILE), ADDITION, FILE)
    assert at(tomllib.loads(changed), *TABLE) == {"default": "smr"}
    assert strip(changed) == text


def test_a_header_is_found_however_it_is_spelt() -> None:
    """Quotes and spaces in a header do not matter; an array of tables and a parent are not it."""
    assert has_header("['plugins'.\"cri\". containerd]\n", TABLE)
    assert not has_header("[[plugins.cri.containerd]]\n", TABLE)
    assert not has_header("[plugins.cri]\n[plugins.cri.containerd.runtimes]\n", TABLE)


def test_invalid_toml_is_an_error_that_names_the_file() -> None:
    """The user learns which file to correct."""
    with pytest.raises(SmrError, match=r"/etc/thing.toml is not valid TOML"):
        parse("a = \n", FILE)


_SCALARS = st.one_of(st.booleans(), st.integers(-(2**60), 2**60), st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
_DOCUMENTS = st.recursive(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5), _SCALARS | st.lists(_SCALARS, max_size=3)
    ),
    lambda inner: st.dictionaries(st.text(min_size=1, max_size=5), _SCALARS | inner, max_size=4),
    max_leaves=8,
)


@given(_DOCUMENTS)
def test_rendered_documents_are_read_back_the_same(document: dict[str, object]) -> None:
    """Any key and any string survives, empty tables too."""
    assert tomllib.loads(render(document)) == document


def test_what_toml_text_cannot_be_made_of_is_refused() -> None:
    """A date in a runtime's table, say, is not guessed at."""
    import datetime

    with pytest.raises(SmrError, match="cannot write"):
        render({"a": datetime.date(2020, 1, 1)})
