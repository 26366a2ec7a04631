"""The demo's order of events, for each engine: cold, checkpoint, restored by annotation; the same questions before and after.

Time to first token runs from the engine command's start to the first token received. Both kinds of start read from the page
cache: the model file is read once before, the checkpoint was just written. A restored container has `smr.fallback=fail`, so
that a restore which does not work cannot pass for one by starting cold. Everything lies in one folder under /var/tmp, which
is gone at the end, with the containers, mounts and daemons, on failure and Ctrl-C too.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from smr.proto.annotations import FALLBACK, RESTORE
from smr.proto.errors import Code, SmrError
from smr.shim.config import Config
from smr.shim.demo import server
from smr.shim.demo.client import Answer, Client
from smr.shim.demo.engine import ENGINES, Containerd, Engine, Node, Podman, Start, missing
from smr.shim.demo.model import Interpreter, find_interpreter, prepare
from smr.shim.demo.overlay import machine_root, volumes
from smr.shim.demo.scratch import scratch
from smr.shim.run import run, tail
from smr.shim.state import Stage

COLD_TIMEOUT_S = 600.0
RESTORED_TIMEOUT_S = 120.0
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run: the model's size, how often, on which engines, with which interpreter in the container."""

    params: str
    runs: int
    engines: tuple[str, ...]
    python: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What runs in the container."""

    interpreter: Interpreter
    model: Path

    def command(self, port: int) -> tuple[str, ...]:
        """The command line in the container. It answers on loopback alone, for the network is the machine's."""
        words = (self.interpreter.path, "-I", "-u", server.__file__, self.model, "--host", "127.0.0.1", "--port", port)
        return tuple(str(word) for word in words)

    def volumes(self) -> tuple[Path, ...]:
        """What the container must see besides the machine's root file system."""
        return volumes([*self.interpreter.folders, Path(server.__file__).parent, self.model])


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """One restored start. `offset_s` is when the first stage began, seconds after the engine's command did."""

    ttft_s: float
    offset_s: float
    stages: tuple[Stage, ...]
    tokens_equal: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one engine gave; `skipped` or `error` says why it gave nothing."""

    engine: str
    cold_s: tuple[float, ...] = ()
    restored: tuple[Restored, ...] = ()
    image_bytes: int = 0
    pause_s: float = 0.0
    skipped: str = ""
    error: SmrError | None = None

    @property
    def cold_ttft_s(self) -> float:
        """Median time to first token of the cold starts."""
        return statistics.median(self.cold_s)

    @property
    def restored_ttft_s(self) -> float:
        """Median time to first token of the restored starts."""
        return statistics.median(start.ttft_s for start in self.restored)

    @property
    def tokens_equal(self) -> bool:
        """Whether every restored container gave the reference tokens."""
        return all(start.tokens_equal for start in self.restored)

    @property
    def stages_ms(self) -> dict[str, float]:
        """Median length of each stage, in order of their starts."""
        lengths: dict[str, list[float]] = {}
        for start in self.restored:
            for stage in sorted(start.stages, key=lambda stage: stage.start_s):
                lengths.setdefault(stage.name, []).append((stage.end_s - stage.start_s) * 1000)
        return {name: round(statistics.median(values), 3) for name, values in lengths.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All outcomes, and what they were measured on."""

    plan: Plan
    model: str
    outcomes: tuple[Outcome, ...] = field(default_factory=tuple)


def measure(plan: Plan, config: Config, progress: Progress) -> Report:
    """Run the demo. Raises what makes it impossible on every engine; what fails on one stands in its outcome."""
    if os.geteuid() != 0:
        raise SmrError("the demo needs root: it mounts, and drives CRIU", hint="sudo dev/demo", code=Code.PERMISSION)
    with scratch() as base:
        node = Node.of(base, config)
        progress(f"model of size {plan.params}")
        workload = Workload(interpreter=(found := find_interpreter(plan.python)), model=prepare(found, plan.params))
        outcomes = [_outcome(kind, node, plan, workload, progress) for kind in ENGINES if kind.name in plan.engines]
    return Report(plan=plan, model=workload.model.name, outcomes=tuple(outcomes))


def _outcome(kind: type[Podman] | type[Containerd], node: Node, plan: Plan, workload: Workload, progress: Progress) -> Outcome:
    if reason := missing(kind):
        return Outcome(engine=kind.name, skipped=reason)
    engine = kind(node)
    try:
        with engine.open():
            bench = Bench(engine, node, plan, workload, progress)
            if reason := bench.probe():
                return Outcome(engine=kind.name, skipped=reason)
            return bench.measure()
    except SmrError as error:
        return Outcome(engine=kind.name, error=error)


class Bench:
    """One engine's part of the demo."""

    def __init__(self, engine: Engine, node: Node, plan: Plan, workload: Workload, progress: Progress) -> None:
        self._engine, self._node, self._plan, self._workload = engine, node, plan, workload
        self._progress: Progress = lambda step: progress(f"{engine.name}: {step}")
        self._port = free_port()
        self._client = Client(self._port)

    def probe(self) -> str:
        """Why this engine cannot run any container on this machine, with the stock runtime; empty when it can."""
        self._progress("probe")
        start = self._start("probe", self._node.base / "probe", command=("/bin/true",), stock=True)
        with machine_root(start.root.parent), self._removed(start.name):
            done = self._run(start, check=False)
        return f"{self._engine.name} cannot run a container here: {tail(done.stderr)}" if done.returncode else ""

    def measure(self) -> Outcome:
        """Cold starts, a checkpoint of the last one, restored starts."""
        cold: list[float] = []
        for number in range(self._plan.runs):
            last = number == self._plan.runs - 1
            with self._container(f"cold-{number}") as start:
                self._progress(f"cold start {number + 1} of {self._plan.runs}")
                cold.append(self._ttft(start, COLD_TIMEOUT_S)[0])
                if last:
                    self._progress("checkpoint")
                    reference = self._reference()
                    saved = self._checkpoint(start)
        restored = [self._restored(number, reference) for number in range(self._plan.runs)]
        return Outcome(
            engine=self._engine.name,
            cold_s=tuple(cold),
            restored=tuple(restored),
            image_bytes=int(str(saved["size_bytes"])),
            pause_s=float(str(saved["pause_s"])),
        )

    def _restored(self, number: int, reference: tuple[Answer, Answer]) -> Restored:
        annotations = {RESTORE: self._image, FALLBACK: "fail"}
        with self._container(f"restored-{number}", annotations) as start:
            self._progress(f"restored start {number + 1} of {self._plan.runs}")
            ttft, begun, container = self._ttft(start, RESTORED_TIMEOUT_S)
            answers = self._client.reference()
            check_state(reference, answers)
            facts = self._smr("inspect", container, "--json")
        return Restored(
            ttft_s=ttft,
            offset_s=datetime.fromisoformat(str(facts["started"])).timestamp() - begun,
            stages=parse_stages(facts),
            tokens_equal=[answer.tokens for answer in answers] == [answer.tokens for answer in reference],
        )

    def _reference(self) -> tuple[Answer, Answer]:
        """Ask twice: the second answer finds its prompt in the cache, as the restored server's must."""
        self._client.reference()
        return self._client.reference()

    @property
    def _image(self) -> str:
        return f"demo-{self._engine.name}:latest"

    def _checkpoint(self, start: Start) -> dict[str, object]:
        words = ("checkpoint", start.name, "-n", self._image, "--engine", self._engine.name, "--stop", "--json")
        return self._smr(*words)

    def _smr(self, *words: str) -> dict[str, object]:
        done = run([self._node.bin / "smr", *words], env=self._engine.env, timeout_s=600, check=False)
        if done.returncode != 0:
            raise SmrError(f"smr {words[0]} failed: {tail(done.stderr)}", code=Code.CHECKPOINT_FAILED)
        document = json.loads(done.stdout)
        assert isinstance(document, dict)
        return document

    @contextlib.contextmanager
    def _container(self, role: str, annotations: Mapping[str, str] | None = None) -> Iterator[Start]:
        """A root and a name for one container; both are gone at the end."""
        start = self._start(f"smr-demo-{role}", self._node.base / role, annotations=annotations or {})
        with machine_root(start.root.parent), self._removed(start.name):
            yield start

    def _start(
        self,
        name: str,
        folder: Path,
        *,
        command: tuple[str, ...] = (),
        annotations: Mapping[str, str] | None = None,
        stock: bool = False,
    ) -> Start:
        return Start(
            name=name,
            root=folder / "merged",
            command=command or self._workload.command(self._port),
            pid_file=self._node.base / f"{self._engine.name}-{name}.pid",
            volumes=self._workload.volumes(),
            annotations=annotations or {},
            runtime="stock" if stock else "smr",
        )

    @contextlib.contextmanager
    def _removed(self, name: str) -> Iterator[None]:
        try:
            yield
        finally:
            self._engine.remove(name)

    def _run(self, start: Start, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        argv = self._engine.run_argv(start)
        return run(argv, env=self._engine.env, timeout_s=RESTORED_TIMEOUT_S, code=Code.ENGINE_FAILED, check=check)

    def _ttft(self, start: Start, timeout_s: float) -> tuple[float, float, str]:
        """(time to first token, wall clock at the command's start, container id or name)."""
        wall, begin = time.time(), time.monotonic()
        done = self._run(start)
        self._client.first_token(lambda: self._alive(start), timeout_s=timeout_s)
        return time.monotonic() - begin, wall, done.stdout.strip() or start.name

    def _alive(self, start: Start) -> None:
        try:
            os.kill(int(start.pid_file.read_text()), 0)
        except (OSError, ValueError):
            raise SmrError(
                f"the container {start.name} has ended: {tail(self._engine.logs(start.name))}", code=Code.ENGINE_FAILED
            ) from None


def check_state(before: Sequence[Answer], after: Sequence[Answer]) -> None:
    """Raise RESTORE_FAILED unless the counter went on (one request between was the first token) and the cache was there."""
    expected = [answer.requests + len(before) + 1 for answer in before]
    found = [answer.requests for answer in after]
    if found != expected:
        raise SmrError(
            f"the restored server's counter of requests did not go on: found {found}, needed {expected}",
            code=Code.RESTORE_FAILED,
        )
    if [answer.cached_tokens for answer in after] != [answer.cached_tokens for answer in before]:
        raise SmrError("the restored server has lost its prefix cache", code=Code.RESTORE_FAILED)


def parse_stages(facts: dict[str, object]) -> tuple[Stage, ...]:
    """The stages in the output of `smr inspect --json`."""
    stages = facts["stages"]
    assert isinstance(stages, list)
    return tuple(Stage(name=str(s["name"]), start_s=float(s["start_s"]), end_s=float(s["end_s"])) for s in stages)


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        assert isinstance(port, int)
        return port


def machine() -> str:
    """The machine in a line: processor, cores, memory."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown CPU")
    memory = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory / (1 << 20):.0f} GiB, Linux {os.uname().release}"


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines()
