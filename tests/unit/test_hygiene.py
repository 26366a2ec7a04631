"""The program of docs/hygiene.md runs, and does what the page says."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from tests.integration.node import REPOSITORY


def test_the_page_s_program(tmp_path: Path) -> None:
    """It sees each restore once, and two copies of a generator differ after it."""
    text = (REPOSITORY / "docs/hygiene.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)  # it is ours
    file = tmp_path / "restored.json"
    restored = names["Restored"](str(file))  # type: ignore[operator]
    assert not restored.again()
    for stamp in ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"):
        file.write_text(json.dumps({"restored": stamp}))
        assert restored.again()
        assert not restored.again()
    state = random.getstate()
    try:
        drawn = []
        for _ in range(2):
            random.setstate(state)
            names["reseed"]()  # type: ignore[operator]
            drawn.append(random.getrandbits(128))
        assert drawn[0] != drawn[1]
    finally:
        random.setstate(state)
