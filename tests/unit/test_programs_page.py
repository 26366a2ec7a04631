"""docs/programs.md says what docs/programs.json has."""

from __future__ import annotations

import json

import pytest

from bench import programs

CELL = {"program": "Redis", "engine": "podman", "family": "IPv4", "address": "new", "result": "ok", "restore_s": 0.25}
STAGES = {"locate": 0.001, "rewrite": 0.002, "create": 0.2, "adopt": 0.003}


def test_the_pages_tables_are_those_of_the_results() -> None:
    """What is committed is what `python -m bench.programs --tables` writes."""
    document = json.loads(programs.RESULTS.read_text())
    page = programs.PAGE.read_text()
    assert programs.with_tables(page, document["cells"]) == page


def test_every_cell_of_the_results_is_there_once() -> None:
    """No restore is in the file twice, and each has its stages when it went well."""
    cells = json.loads(programs.RESULTS.read_text())["cells"]
    assert len(programs.merged(cells, [])) == len(cells)
    assert all(cell["stages"] and cell["restore_s"] for cell in cells if cell["result"] == "ok")


def test_a_row_has_seconds_or_the_reason() -> None:
    """A restore that failed shows the first line of why; one that was not run says so."""
    failed = CELL | {"address": "same", "result": "again: exit status 1\nits output"}
    (row,) = programs.results_table([CELL | {"stages": STAGES}, failed | {"stages": {}}]).splitlines()[2:]
    assert row == "| Redis | podman | fails: again: exit status 1 | 0.25 s | not run | not run | not run | not run |"


def test_stages_are_medians() -> None:
    """Medians are in milliseconds, also those of what is SMR's and of its processor time."""
    slower = CELL | {"address": "same", "stages": STAGES | {"rewrite": 0.042}, "share_s": 0.05, "share_cpu_s": 0.014}
    (row,) = programs.stages_table([CELL | {"stages": STAGES, "share_s": 0.01, "share_cpu_s": 0.008}, slower]).splitlines()[2:]
    assert row == "| Redis | 1 | 22 | 200 | 3 | 250 | 30 | 11 |"


def test_a_part_of_the_matrix_replaces_its_own_cells() -> None:
    """Cells that were not run again stay."""
    old = [CELL, CELL | {"family": "IPv6"}]
    new = [CELL | {"restore_s": 0.5}]
    assert programs.merged(old, new) == [CELL | {"restore_s": 0.5}, CELL | {"family": "IPv6"}]


def test_a_page_without_marks_is_an_error() -> None:
    """A table is never appended somewhere."""
    with pytest.raises(ValueError, match="substring"):
        programs.with_tables("# Programs\n", [])
