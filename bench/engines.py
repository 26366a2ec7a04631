"""`python -m bench.engines [FILE [AGAIN...]]`: docs/engines.json from what --engines-json wrote, and docs/engines.md.

AGAIN is what later runs wrote of the tests that had failed, and only of those. Without FILE only the table is written again.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
JSON, PAGE = DOCS / "engines.json", DOCS / "engines.md"
_BEGIN, _END = "<!-- begin: engines -->\n", "<!-- end: engines -->\n"
_COLUMNS = ("Engine", "Version", "Runtime", "CRIU", "Cgroups", "Tests passed", "failed", "skipped")


def table(run: Mapping[str, Any]) -> str:
    """The machine in a sentence, then a row for each combination that tests ran on."""
    machine = run["machine"]
    place = f"{machine['system']}, Linux {machine['kernel']}, {machine['architecture']}, Python {machine['python']}"
    said = f"Run on {machine['date']}: {place}."
    keys = ("engine", "version", "runtime", "criu", "cgroups", "passed", "failed", "skipped")
    rows = [_COLUMNS, ("---",) * len(_COLUMNS), *([str(row[key]) for key in keys] for row in run["rows"])]
    return f"{said}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def with_table(page: str, run: Mapping[str, Any]) -> str:
    """The page with its table of `run`."""
    pattern = re.escape(_BEGIN) + ".*?" + re.escape(_END)
    return re.sub(pattern, lambda _: f"{_BEGIN}{table(run)}{_END}", page, count=1, flags=re.DOTALL)


def with_again(run: Mapping[str, Any], again: Mapping[str, Any]) -> dict[str, Any]:
    """A run in which tests that failed count as in a later run of them."""
    outcomes = ("passed", "failed", "skipped")
    later = {tuple(row[key] for key in row if key not in outcomes): row for row in again["rows"]}
    rows = []
    for row in run["rows"]:
        other = later.get(tuple(row[key] for key in row if key not in outcomes))
        if other is None:
            rows.append(dict(row))
            continue
        failed = row["failed"] - sum(other[outcome] for outcome in outcomes) + other["failed"]
        if failed < other["failed"]:
            raise ValueError(f"more tests were run again than had failed: {row}")
        rows.append(
            row | {"passed": row["passed"] + other["passed"], "failed": failed, "skipped": row["skipped"] + other["skipped"]}
        )
    return {**run, "rows": rows}


def main(argv: Sequence[str]) -> int:
    """Take a run over, write the table."""
    if argv:
        import datetime

        run = json.loads(Path(argv[0]).read_text())
        for name in argv[1:]:
            run = with_again(run, json.loads(Path(name).read_text()))
        run["machine"]["date"] = datetime.date.today().isoformat()
        JSON.write_text(json.dumps(run, indent=1) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), json.loads(JSON.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
