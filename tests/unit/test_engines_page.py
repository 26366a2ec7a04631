"""docs/engines.md says what docs/engines.json has."""

from __future__ import annotations

import json

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
