"""The matrix of docs/programs.md: runs it (`python -m bench.programs`) and writes its tables from what was measured (`--tables`).

A run is tests/integration/test_programs.py with all of its cells, against real engines. Results go to docs/programs.json: the
machine, and a cell for each restore. A part of the matrix (`-k EXPRESSION` of pytest) replaces the cells that it has run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from bench.machine import describe

REPOSITORY = Path(__file__).parents[1]
RESULTS, PAGE = REPOSITORY / "docs/programs.json", REPOSITORY / "docs/programs.md"
_BEGIN, _END = "<!-- begin: {} -->\n", "<!-- end: {} -->\n"
_ADDRESSES = {"same": "same address", "new": "new address", "kept": "clients kept"}
_COLUMNS = [(family, address) for family in ("IPv4", "IPv6") for address in _ADDRESSES]
_PROGRAMS = {"podman": ["podman", "--version"], "containerd": ["containerd", "--version"], "runc": ["runc", "--version"]}

Cell = dict[str, Any]


def results_table(cells: Sequence[Cell]) -> str:
    """A row for each program and engine: seconds of the restore, or what went wrong, by family and address."""
    head = ["Program", "Engine", *(f"{family}, {_ADDRESSES[address]}" for family, address in _COLUMNS)]
    lines = [_row(head), _row(["---"] * len(head))]
    for program in _ordered(cells, "program"):
        for engine in _ordered(cells, "engine"):
            found = {(c["family"], c["address"]): c for c in cells if c["program"] == program and c["engine"] == engine}
            lines.append(_row([program, engine, *(_result(found.get(column)) for column in _COLUMNS)]))
    return "\n".join(lines) + "\n"


def stages_table(cells: Sequence[Cell]) -> str:
    """A row for each program: the median of each stage over its restores in milliseconds, and what of it is SMR's."""
    good = [cell for cell in cells if cell["result"] == "ok"]
    names = [name for name in dict.fromkeys(name for cell in good for name in cell["stages"]) if name != "resume"]
    head = ["Program", *(f"`{name}`" for name in names), "all", "SMR's share", "its CPU time"]
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    for program in _ordered(good, "program"):
        mine = [cell for cell in good if cell["program"] == program]
        stages = [_ms(cell["stages"].get(name, 0.0) for cell in mine) for name in names]
        share, cpu = [float(cell["share_s"]) for cell in mine], [float(cell["share_cpu_s"]) for cell in mine]
        row = [program, *stages, _ms(cell["restore_s"] for cell in mine), _ms(share), _ms(cpu)]
        lines.append(_row(row))
    return "\n".join(lines) + "\n"


def with_tables(page: str, cells: Sequence[Cell]) -> str:
    """The page with its tables made anew between their marks. ValueError when a mark is missing."""
    for name, table in (("results", results_table(cells)), ("stages", stages_table(cells))):
        begin, end = _BEGIN.format(name), _END.format(name)
        before, after = page.index(begin) + len(begin), page.index(end)
        page = page[:before] + table + page[after:]
    return page


def merged(old: Sequence[Cell], new: Sequence[Cell]) -> list[Cell]:
    """`old` with the cells of `new` in place of those of the same program, engine, family and address."""
    keyed = {_key(cell): cell for cell in (*old, *new)}
    return list(keyed.values())


def _key(cell: Cell) -> tuple[str, ...]:
    return tuple(str(cell[name]) for name in ("program", "engine", "family", "address"))


def _ordered(cells: Iterable[Cell], name: str) -> list[str]:
    found = dict.fromkeys(str(cell[name]) for cell in cells)
    return sorted(found) if name == "engine" else list(found)


def _result(cell: Cell | None) -> str:
    if cell is None:
        return "not run"
    return (
        f"{cell['restore_s']:.2f} s" if cell["result"] == "ok" else "fails: " + cell["result"].splitlines()[0].replace("|", "\\|")
    )


def _ms(seconds: Iterable[float]) -> str:
    return f"{median(seconds) * 1000:.0f}"


def _row(words: Sequence[str]) -> str:
    return "| " + " | ".join(words) + " |"


def _run(modes: str, words: Sequence[str]) -> list[Cell]:
    """The cells of the matrix, or of the part that pytest's own arguments choose."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "cells.json")
        argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/integration/test_programs.py", *words]
        subprocess.run(
            argv, check=False, cwd=REPOSITORY, env={**os.environ, "SMR_PROGRAMS_TABLE": str(table), "SMR_PROGRAMS_MODES": modes}
        )
        return list(json.loads(table.read_text())) if table.exists() else []


def main() -> int:
    """0 when every cell that was run is `ok`."""
    parser = argparse.ArgumentParser(prog="python -m bench.programs", description=__doc__)
    parser.add_argument("--tables", action="store_true", help="only write the page's tables from docs/programs.json")
    parser.add_argument("--modes", default=" ".join(_ADDRESSES), help='which columns to run, such as "same new"; default: all')
    options, words = parser.parse_known_args()
    cells = [] if options.tables else _run(options.modes, words)
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cells": []}
    bad: list[Cell] = []
    if not options.tables:
        bad = [cell for cell in cells if cell["result"] != "ok"]
        engines = Path(os.environ.get("SMR_ENGINES", REPOSITORY / ".work/engines"))
        programs = {**_PROGRAMS, "criu": [str(engines / "criu-new/bin/criu"), "--version"]}
        programs |= {f"{name}-new": [str(engines / f"{name}-new/bin/{name}"), "--version"] for name in ("containerd", "runc")}
        document = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": describe(programs),
            "cells": merged(document["cells"], cells),
        }
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    PAGE.write_text(with_tables(PAGE.read_text(), document["cells"]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
