"""Errors: one line for engines, JSON for programs, an exit status for scripts; and the documents that list them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from smr.proto.errors import Code, SmrError, exit_status

DOCS = Path(__file__).parents[2] / "docs"


def test_line_has_message_and_hint() -> None:
    """Engines print one line: what failed, then what to do, in brackets."""
    assert str(SmrError("image a is missing", hint="smr images ls")) == "image a is missing (smr images ls)"
    assert str(SmrError("image a is missing")) == "image a is missing"


def test_json_keeps_numbers_and_spells_out_the_rest() -> None:
    """Context is printed as it is where JSON can, else as text."""
    error = SmrError("m", hint="h", code=Code.DISK_FULL, path=Path("/x"), free_bytes=12, share=0.5, whole=True)
    assert json.loads(json.dumps(error.as_json())) == {
        "code": "disk_full",
        "message": "m",
        "hint": "h",
        "context": {"path": "/x", "free_bytes": 12, "share": 0.5, "whole": True},
    }


def test_code_is_internal_unless_said() -> None:
    """An error that nobody has given a code counts as ours."""
    assert SmrError("m").code is Code.INTERNAL


def test_every_code_has_a_status_and_no_failure_succeeds() -> None:
    """Statuses are 1 to 7, never 0."""
    assert {exit_status(code) for code in Code} == set(range(1, 8))


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (Code.INTERNAL, 1),
        (Code.USAGE, 2),
        (Code.IMAGE_NOT_FOUND, 3),
        (Code.CPU_MISMATCH, 4),
        (Code.IMAGE_CORRUPT, 5),
        (Code.IMAGE_IN_USE, 6),
        (Code.CRIU_TOO_OLD, 7),
    ],
)
def test_status_of_each_kind(code: Code, status: int) -> None:
    """Scripts tell kinds of failures apart."""
    assert exit_status(code) == status


def test_values_are_plain_words() -> None:
    """Codes are what metrics count by: lower case with underscores, each once."""
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code.value) for code in Code)
    assert len({code.value for code in Code}) == len(list(Code))


def test_cli_document_has_the_exit_codes() -> None:
    """docs/cli.md: rows "| N | meaning | `code`, `code` |" hold every code once, under its status."""
    listed: dict[str, int] = {}
    for status, codes in re.findall(r"^\| (\d+) \|[^|]*\|([^|]*)\|$", (DOCS / "cli.md").read_text(), re.MULTILINE):
        for code in re.findall(r"`([a-z_]+)`", codes):
            assert code not in listed, f"{code} stands twice"
            listed[code] = int(status)
    assert listed == {code.value: exit_status(code) for code in Code}


def test_errors_document_has_every_code() -> None:
    """docs/errors.md: a row "| `code` | ..." for each code, and for nothing else."""
    rows = re.findall(r"^\| `([a-z_]+)` \|", (DOCS / "errors.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(code.value for code in Code)
