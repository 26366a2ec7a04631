"""Dumps and restores for bench.pages: the process, its image, and the workers that restore it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.overhead import REPOSITORY
from bench.pages_process import PAGE_BYTES, Content
from smr.images.split import Split, split

_ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))}
Row = dict[str, Any]


class Worker:
    """A process that restores, and the most anonymous memory that it had."""

    def __init__(self) -> None:
        argv = [sys.executable, "-m", "bench.pages_worker"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(argv, cwd=REPOSITORY, env=_ENVIRONMENT, stdin=pipe, stdout=pipe, text=True)
        self.send({"do": "end"})
        self.receive()

    def send(self, order: Mapping[str, object]) -> None:
        """Give an order."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def receive(self) -> Row:
        """Its answer."""
        assert self._process.stdout is not None
        answer: Row = json.loads(self._process.stdout.readline() or '{"error": "the worker ended"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def call(self, order: Mapping[str, object]) -> Row:
        """Order and answer, with `extra_bytes` of memory."""
        before, peak, done = self._anonymous_bytes(), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, self._anonymous_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            self.send(order)
            answer = self.receive()
        finally:
            done.set()
            watcher.join()
        return {**answer, "extra_bytes": max(peak - before, 0)}

    def close(self) -> None:
        """End it and what it restored."""
        self._process.communicate()

    def _anonymous_bytes(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


@dataclass(slots=True, kw_only=True)
class Image:
    """A dump, whole or split."""

    folder: Path
    size_gib: float
    kind: str
    pid: int
    address: int
    dump_s: float
    table: Path | None = None
    segments: list[Path] = field(default_factory=list)
    memory_bytes: int = 0

    @property
    def files(self) -> list[Path]:
        """All that a restore reads."""
        return [
            *(path for path in self.images.iterdir() if path.is_file()),
            *([self.table] if self.table else []),
            *self.segments,
        ]

    @property
    def images(self) -> Path:
        """CRIU's directory."""
        return self.folder / "criu"

    @property
    def stored_bytes(self) -> int:
        """Size of the segments."""
        return sum(path.stat().st_size for path in self.segments)

    def set_split(self, result: Split) -> None:
        """It has been split; the segments lie where it says."""
        self.table = self.folder / "table"
        self.table.write_bytes(result.table.to_bytes())
        self.segments = [segment.path for segment in result.segments]
        self.memory_bytes = result.table.memory_bytes

    def order(self, criu: str, strategy: str, number: int = 0, *, ask: bool = True) -> Row:
        """Tells a worker to restore it."""
        return {
            "do": strategy,
            "criu": criu,
            "folder": str(self.images),
            "work": str(self.folder / f"work{number}"),
            "table": str(self.table or ""),
            "segments": [str(path) for path in self.segments],
            "slots": str(self.folder / "slots"),
            "answer": str(self.folder / "answer") if ask else "",
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where it is measured and with what."""

    criu: str
    folder: Path
    runs: int

    @contextmanager
    def process(self, size_gib: float, kind: str) -> Iterator[Image]:
        """A process with its memory filled; it is there until a dump ends it."""
        folder = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=self.folder))
        size_bytes = int(size_gib * 2**30) >> 21 << 21
        argv = [sys.executable, "-m", "bench.pages_process", str(folder), str(size_bytes), kind]
        null = subprocess.DEVNULL
        process = subprocess.Popen(
            argv, cwd=REPOSITORY, env=_ENVIRONMENT, start_new_session=True, stdin=null, stdout=null, stderr=null
        )
        try:
            while not (folder / "ready").exists() or not (folder / "ready").read_text():
                if process.poll() is not None:
                    raise RuntimeError(f"the process of {size_gib} GiB ended with {process.returncode}: is there memory for it?")
                time.sleep(0.01)
            address = int((folder / "ready").read_text(), 16)
            yield Image(folder=folder, size_gib=size_gib, kind=kind, pid=process.pid, address=address, dump_s=0)
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(folder)

    def dump(self, image: Image, *options: str, pass_fds: Sequence[int] = ()) -> None:
        """Have CRIU dump it."""
        shutil.rmtree(image.images, ignore_errors=True)
        image.images.mkdir()
        image.table, image.segments = None, []
        argv = [
            self.criu,
            "dump",
            "-t",
            str(image.pid),
            "-D",
            str(image.images),
            "-W",
            str(image.folder),
            "-o",
            "dump.log",
            *options,
        ]
        begin = time.perf_counter()
        done = subprocess.run(argv, capture_output=True, text=True, check=False, pass_fds=pass_fds)
        image.dump_s = time.perf_counter() - begin
        if done.returncode:
            log = (image.folder / "dump.log").read_text(errors="replace").splitlines()
            raise RuntimeError(f"criu dump ended with {done.returncode}: {[line for line in log if 'Error' in line][-3:]}")

    def split(self, image: Image, *, compress: bool = False) -> float:
        """Split it; returns the seconds that it took."""
        out = image.folder / "segments"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        begin = time.perf_counter()
        result = split(image.images, out, compress=compress)
        took = time.perf_counter() - begin
        image.set_split(result)
        return took

    def restores(self, image: Image, strategy: str, prepare: Callable[[Sequence[Path]], object]) -> list[Row]:
        """`runs` restores, each after `prepare`; what it returns stands in `prepared`."""
        answers = []
        with workers(1) as (worker,):
            for _ in range(self.runs):
                prepared = prepare(image.files)
                answers.append({**worker.call(image.order(self.criu, strategy)), "prepared": prepared})
                if len(answers) == self.runs:
                    check(image, answers[-1]["pid"])
                worker.call({"do": "end"})
        return answers


@contextmanager
def workers(count: int) -> Iterator[list[Worker]]:
    """Some of them, ended with the block."""
    with ExitStack() as stack:
        group: list[Worker] = []
        for _ in range(count):
            group.append(Worker())
            stack.callback(group[-1].close)
        yield group


def check(image: Image, pid: int) -> None:
    """The pages of a restored process are what they were. Raises RuntimeError."""
    content = Content(image.kind)
    pages = (int(image.size_gib * 2**30) >> 21 << 21) // PAGE_BYTES
    step = max(1, pages // 200_000)
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for page in range(0, pages, step):
            if os.pread(memory.fileno(), PAGE_BYTES, image.address + page * PAGE_BYTES) != content.page(page):
                raise RuntimeError(f"page {page} of the restored process is not what it was")
