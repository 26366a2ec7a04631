"""One restore at a time, in a process of its own: bench.pages speaks with it in lines of JSON.

    {"do": "fill", "criu": PATH, "folder": .., "work": .., "table": .., "segments": [..], "slots": .., "answer": PATH}
        -> {"s": .., "criu_s": .., "answer_s": .., "pid": ..}
    {"do": "end"} -> {}

`stock` is stock CRIU on a whole dump. `fill` is CRIU on the stripped folder and the fill after it, within the node's limit for
fills at a time (kept in "slots"); `lazy` is the server of pages and then CRIU with it. The clock runs from there until the tree
is there, stopped (`s`), and until it has been continued and has answered (`answer_s`, not asked for without "answer"). CRIU
works in a pid namespace that was made before, so that the process gets its pid whatever else runs here. The restored tree is
gone after `end`, and when standard input ends, as it does when bench.pages is killed: the namespace's first process is a `cat`
that waits for that.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from smr.images.budget import fill_slot
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
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    argv = [order["criu"], "restore", "-D", order["folder"], "-W", str(work), "-o", "restore.log"]
    lazy = ["--lazy-pages"] if order["do"] == "lazy" else []
    namespace = Namespace([*argv, "--restore-detached", "--leave-stopped", *lazy])
    try:
        begin = time.perf_counter()
        if lazy:
            _serve(order, work)
        criu = time.perf_counter()
        if status := namespace.run():
            raise RuntimeError(f"criu restore ended with {status}: {_end_of(work / 'restore.log')}")
        criu_s = time.perf_counter() - criu
        root = namespace.restored()
        _wait_stopped(root)
        if order["do"] == "fill":
            table = parse_table(Path(order["table"]).read_bytes())
            pids = {pid: root for pid, _ in table.by_process()}
            with fill_slot(Path(order["slots"]), table.memory_bytes) as slot:
                fill(table, [Path(path) for path in order["segments"]], pids, threads=slot.threads)
        times = {"s": time.perf_counter() - begin, "criu_s": criu_s}
        if order.get("answer"):
            _ask(root, Path(order["answer"]))
            times["answer_s"] = time.perf_counter() - begin
        if lazy:
            times["filled_s"] = _served(work)
        return namespace, {**times, "pid": root}
    except BaseException:
        namespace.end()
        raise


def _wait_stopped(pid: int) -> None:
    """CRIU lets go of a process with SIGSTOP pending; on a busy machine it stops a moment later."""
    give_up = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "Tt":
        if time.monotonic() > give_up:
            raise RuntimeError("criu has not left the process stopped")
        time.sleep(0.0005)


def _serve(order: Mapping[str, Any], work: Path) -> None:
    """Start the server of pages; it listens when this returns."""
    (work / "segments").write_text("\n".join(order["segments"]))
    files = {
        "table": order["table"],
        "segments": work / "segments",
        "socket": work / "lazy-pages.socket",
        "status": work / "status",
    }
    options = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    done = subprocess.run([sys.executable, "-m", "smr.images.lazy", *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the server of pages ended with {done.returncode}: {done.stderr.strip()}")


def _served(work: Path) -> float:
    """Wait until all pages are there; the server says how long it took."""
    while (status := json.loads((work / "status").read_text()))["state"] == "serving":
        time.sleep(0.01)
    if status["state"] != "done":
        raise RuntimeError(f"the server of pages failed: {status['reason']}")
    return float(status["seconds"])


def _ask(pid: int, answer: Path) -> None:
    """Continue the process and wait until it has answered, and rightly."""
    answer.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR1)
    os.kill(pid, signal.SIGCONT)
    give_up = time.monotonic() + 60
    while not answer.exists():
        if time.monotonic() > give_up:
            raise RuntimeError("the restored process does not answer")
        time.sleep(0.0005)
    if "right" not in answer.read_text():
        raise RuntimeError("the restored process finds wrong pages")


def _end_of(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else ["no log"]
    return " | ".join([line for line in lines if "Error" in line][-3:] or lines[-1:])


def main() -> None:
    """Answer each line with a line."""
    held: Namespace | None = None
    try:
        for line in sys.stdin:
            order: Mapping[str, Any] = json.loads(line)
            answer: Mapping[str, object] = {}
            try:
                if held:
                    held.end()
                    held = None
                if order["do"] != "end":
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
