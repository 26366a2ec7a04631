"""docs/engines.md says what docs/engines.json has."""

from __future__ import annotations

import json

import pytest

from bench import engines


def test_the_table_is_that_of_the_run() -> None:
    """Written by dev/engines, not by hand."""
    page = engines.PAGE.read_text()
    assert engines.with_table(page, json.loads(engines.JSON.read_text())) == page


def test_a_run_is_shown_row_by_row() -> None:
    """Machine, engine, versions, and how the tests ended; what stands around the table stays."""
    row = {"engine": "podman", "version": "4.3.1", "runtime": "runc 1.1.5", "criu": "4.2.1", "cgroups": "v1"}
    machine = {"date": "2026-01-02", "system": "Debian 12", "kernel": "6.18", "architecture": "x86_64", "python": "3.11"}
    run = {"machine": machine, "rows": [row | {"passed": 7, "failed": 1, "skipped": 2}]}
    page = engines.with_table("before\n<!-- begin: engines -->\nold\n<!-- end: engines -->\nafter\n", run)
    assert "old" not in page
    assert page.startswith("before\n") and page.endswith("after\n")
    assert "Run on 2026-01-02: Debian 12, Linux 6.18, x86_64, Python 3.11." in page
    assert "| podman | 4.3.1 | runc 1.1.5 | 4.2.1 | v1 | 7 | 1 | 2 |" in page


def test_what_was_run_again_counts_as_in_the_later_run() -> None:
    """Row by row; more than had failed is an error."""
    row = {"engine": "podman", "version": "4.3.1", "passed": 7, "failed": 2, "skipped": 0}
    again = {"engine": "podman", "version": "4.3.1", "passed": 1, "failed": 1, "skipped": 0}
    run = {"machine": {}, "rows": [row, row | {"version": "5"}]}
    found = engines.with_again(run, {"rows": [again]})
    assert found["rows"] == [row | {"passed": 8, "failed": 1}, row | {"version": "5"}]
    with pytest.raises(ValueError, match="more tests"):
        engines.with_again(run, {"rows": [again | {"passed": 2}]})
