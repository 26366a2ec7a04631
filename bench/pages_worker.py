"""One restore at a time, in a process of its own: bench.pages speaks with it in lines of JSON.

    {"do": "restore", "criu": PATH, "folder": .., "work": .., "table": .., "segments": [..]} -> {"s": .., "criu_s": .., "pid": ..}
    {"do": "end"}                                                                           -> {}

Without `table` that is stock CRIU on the folder, with it CRIU on the stripped folder and the fill after it. The clock runs from
the start of CRIU until the tree is there with all its pages, stopped. CRIU works in a pid namespace that was made before, so that
the process gets its pid whatever else runs here. The restored tree is gone after `end`, and when standard input ends, as it does
when bench.pages is killed: the namespace's first process is a `cat` that waits for that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from smr.images.fill import fill
from smr.images.pagetable import parse_table
from smr.proto.errors import SmrError

_UNSHARE = ("unshare", "--pid", "--mount-proc", "--fork", "sh", "-c")
# Line by line: ready, CRIU's exit status. `cat` is the namespace's init from then on.
_SCRIPT = 'echo ready; read go || exit; "$@" </dev/null >/dev/null 2>&1; echo $?; exec cat >/dev/null'


class Namespace:
    """A pid namespace in which `argv` waits to be started."""

    def __init__(self, argv: list[str]) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([*_UNSHARE, _SCRIPT, "sh", *argv], stdin=pipe, stdout=pipe, text=True)
        if self._line() != "ready":
            raise RuntimeError("no pid namespace can be made here (unshare --pid --mount-proc)")

    def run(self) -> int:
        """Start it; returns its exit status."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return int(self._line() or 1)

    def restored(self) -> int:
        """Pid, outside, of the tree that it left: the only other child of the namespace's first process."""
        (init,) = _children(self._process.pid)
        (root,) = _children(init)
        return root

    def end(self) -> None:
        """End all processes in it."""
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):
            self._process.stdin.close()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def restore(order: Mapping[str, Any]) -> tuple[Namespace, dict[str, float]]:
    """Do one, as ordered."""
    work = Path(order["work"])
    work.mkdir(parents=True, exist_ok=True)
    argv = [order["criu"], "restore", "-D", order["folder"], "-W", str(work), "-o", "restore.log"]
    namespace = Namespace([*argv, "--restore-detached", "--leave-stopped"])
    try:
        begin = time.perf_counter()
        if status := namespace.run():
            raise RuntimeError(f"criu restore ended with {status}: {_end_of(work / 'restore.log')}")
        criu_s = time.perf_counter() - begin
        root = namespace.restored()
        if order.get("table"):
            table = parse_table(Path(order["table"]).read_bytes())
            pids = {pid: root for pid, _ in table.by_process()}
            fill(table, [Path(path) for path in order["segments"]], pids)
        return namespace, {"s": time.perf_counter() - begin, "criu_s": criu_s, "pid": root}
    except BaseException:
        namespace.end()
        raise


def _end_of(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else ["no log"]
    return " | ".join([line for line in lines if "Error" in line][-3:] or lines[-1:])


def main() -> None:
    """Answer each line with a line."""
    held: Namespace | None = None
    try:
        for line in sys.stdin:
            order, answer = json.loads(line), {}
            try:
                if held:
                    held.end()
                    held = None
                if order["do"] == "restore":
                    held, answer = restore(order)
            except (RuntimeError, OSError, ValueError, SmrError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)
    finally:
        if held:
            held.end()


if __name__ == "__main__":
    os.setsid()  # Ctrl-C is for bench.pages, which ends our input
    main()
