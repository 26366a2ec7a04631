"""The cases of bench.gpu: what runs in the container, and how each way of starting it is timed."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_calls import Calls
from bench.pages_files import drop, warm
from tests.gpu.client import Answer, Watch, ask, ask_until, loopback_up
from tests.gpu.container import GpuRunc, python
from tests.integration.command import eventually

Row = dict[str, Any]
HERE = Path(__file__).parent
IMAGE = "bench-gpu:1"
# SMR's own choice for a dump, so that both dump the same and neither needs iptables.
_CRIU_OPTIONS = "ghost-limit 1G\nlink-remap\nnetwork-lock skip\ntcp-close\nskip-in-flight\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One program. `first` is the request that ends a start, `whole` the one whose answer must be equal; `key` is what must be.

    `stock_env` is for the stock side's process alone. `weights` is mounted at /weights.
    """

    name: str
    command: tuple[str, ...]
    first: str
    whole: str
    key: str
    env: tuple[str, ...] = ()
    stock_env: tuple[str, ...] | None = None
    weights: Path | None = None
    vram_gib: float | None = None
    warm_up: tuple[str, ...] = ()


def vram_case(gib: float, device: str) -> Case:
    """The tests' server with so much VRAM."""
    return Case(
        name=f"vram-{gib:g}",
        command=("/app/workload.py", "server", "--vram-gib", f"{gib:g}", "--device", device),
        first="count",
        whole="check",
        key="digest",
        vram_gib=gib,
    )


def llama_case(compiled: bool, weights: Path, device: str) -> Case:
    """LLaMA-3.1-8B's shape behind HTTP."""
    flags = ("--compile",) if compiled else ()
    return Case(
        name=f"llama-8b-{'compiled' if compiled else 'eager'}",
        command=("/app/llama_server.py", "/weights", "--device", device, *flags),
        first="generate/1",
        whole="generate/32",
        key="tokens",
        # Stock CRIU cannot dump compile workers that hold the GPU's files, so its process compiles without them.
        stock_env=("TORCHINDUCTOR_COMPILE_THREADS=1",) if compiled else None,
        weights=weights,
        warm_up=("generate/32", "generate/32", "generate/1"),
    )


def write_weights(folder: Path, size: str) -> None:
    """The model's files, once."""
    if not (folder / "size").exists() or (folder / "size").read_text() != size:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([python(), HERE / "llama_server.py", folder, "--write", "--size", size], check=True)


@dataclass(slots=True, kw_only=True)
class Bench:
    """runc with GPUs, the CUDA calls of the stock side (None without a GPU), and how often each is measured."""

    runc: GpuRunc
    calls: Calls | None
    devices: tuple[str, ...]
    runs: int
    stock_runs: int
    note: Callable[[str], None]
    expected: Row = field(default_factory=dict)

    def measure(self, case: Case) -> Row:
        """All of one case; its containers and images are gone afterwards."""
        row: Row = {"name": case.name, "vram_gib": case.vram_gib, "runs": self.runs}
        try:
            row |= self._cold(case)
            row |= self._checkpoint(case)
            row |= self._smr(case)
            self.runc.drop(IMAGE)
            if self.stock_runs:
                row |= self._stock(case)
        finally:
            self.runc.remove_all()
            self.runc.drop(IMAGE)
        equal = [row.pop(key) for key in ("goes_on_equal", "smr_equal", "stock_equal") if key in row]
        return {**row, "equal": all(equal)}

    def _cold(self, case: Case) -> Row:
        """From create to the first answer, without SMR; the source of the checkpoint is the last of them."""
        row: Row = {}
        if case.weights:
            drop(list(case.weights.iterdir()))
            row["cold_disk_s"] = self._start(case, "source", bare=True)
            self._remove("source")
        row["cold_s"] = self._start(case, "source", bare=True)
        self._warm_up(case, "source")
        self.expected = self._ask(case, "source", case.whole)
        self.note(f"{case.name}: cold {row['cold_s']} s {row.get('cold_disk_s', '')}")
        return row

    def _checkpoint(self, case: Case) -> Row:
        pid = self.runc.pid("source")
        path = case.first
        with Watch.over(pid, path) as watch:
            said = json.loads(self.runc.checkpoint("source", IMAGE).stdout)
        if watch.errors:
            raise RuntimeError(f"the container does not answer after the checkpoint: {watch.errors[0]}")
        goes_on = self._ask(case, "source", case.whole)[case.key] == self.expected[case.key]
        self.note(f"{case.name}: pause {watch.longest_gap_s:.2f} s, checkpoint {sum(said['stages_s'].values()):.1f} s")
        return {
            "pause_s": round(watch.longest_gap_s, 3),
            "pause_printed_s": round(said["pause_s"], 3),
            "checkpoint_stages_s": said["stages_s"],
            "image_bytes": said["size_bytes"],
            "goes_on_equal": goes_on,
        }

    def _smr(self, case: Case) -> Row:
        """By annotation through smr-runtime, from create to the first answer."""
        took, stages, equal = [], [], True
        annotations = {"smr.restore": IMAGE, "smr.fallback": "fail"}
        self._warm_image()
        for number in range(self.runs):
            took.append(self._start(case, "again", annotations=annotations))
            equal &= self._ask(case, "again", case.whole)[case.key] == self.expected[case.key]
            stages.append(self.runc.inspect("again")["stages_s"])
            self._remove("again")
            self.note(f"{case.name}: smr {number + 1}: {took[-1]} s {stages[-1]}")
        middle = sorted(range(len(took)), key=took.__getitem__)[len(took) // 2]
        return {"smr_s": statistics.median(took), "smr_runs_s": took, "stages_s": stages[middle], "smr_equal": equal}

    def _stock(self, case: Case) -> Row:
        """The same CRIU through the same runc, no SMR: dump, restore, and the driver's calls beside it."""
        if case.stock_env is not None:
            self._remove("source")
            self._start(case, "source", bare=True, env=case.stock_env)
            self._warm_up(case, "source")
            self.expected = self._ask(case, "source", case.whole)
        folder = self.runc.path.parent / "stock"
        try:
            dumped = self._stock_dump(folder)
            took, parts, equal = [], [], True
            for number in range(self.stock_runs):
                warm([path for path in folder.iterdir() if path.is_file()])
                seconds, steps = self._stock_restore(case, folder)
                took.append(seconds)
                parts.append(steps)
                equal &= self._ask(case, "source", case.whole)[case.key] == self.expected[case.key]
                self.note(f"{case.name}: stock {number + 1}: {seconds} s {steps}")
            middle = sorted(range(len(took)), key=took.__getitem__)[len(took) // 2]
            more = {"stock_runs_s": took, "stock_stages_s": parts[middle], "stock_dump_s": dumped, "stock_equal": equal}
            return {"stock_s": statistics.median(took), **more}
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _criu_environment(self) -> dict[str, str]:
        config = self.runc.path.parent / "stock-criu.conf"
        config.write_text(_CRIU_OPTIONS)
        node = self.runc.node
        return {**self.runc.env, "PATH": f"{node.criu_folder}:{self.runc.env['PATH']}", "CRIU_CONFIG_FILE": str(config)}

    def _stock_dump(self, folder: Path) -> Row:
        runc = self.runc
        folder.mkdir()
        steps: Row = self.calls("checkpoint", [runc.pid("source")]) if self.calls else {}
        begin = time.perf_counter()
        argv = [*runc.bare, "checkpoint", "--image-path", folder, "--work-path", folder, "--file-locks", "source"]
        _check(argv, self._criu_environment(), folder / "dump.log")
        steps["criu_s"] = time.perf_counter() - begin
        runc("delete", "--force", "source", bare=True, check=False)
        return {key: round(value, 3) for key, value in steps.items()}

    def _stock_restore(self, case: Case, folder: Path) -> tuple[float, Row]:
        runc = self.runc
        self._gone("source")
        bundle, pid_file = runc.path / "source", runc.path.parent / "stock.pid"
        words = ["restore", "--detach", "--bundle", bundle, "--image-path", folder, "--work-path", folder.parent / "stock-work"]
        begin = time.perf_counter()
        with runc.output(bundle) as output:
            argv = [*runc.bare, *words, "--pid-file", pid_file, "source"]
            _check(argv, self._criu_environment(), folder.parent / "stock-work/restore.log", output)
        steps: Row = {"criu_s": time.perf_counter() - begin}
        pid = int(pid_file.read_text())
        loopback_up(pid)
        if self.calls:
            steps |= self.calls("restore", [pid])
        answer = self._until(case, "source", pid)
        took = time.perf_counter() - begin
        self._equal_first(case, answer)
        return round(took, 3), {key: round(value, 3) for key, value in steps.items()}

    def _gone(self, name: str) -> None:
        """Nothing of an earlier container of that name runs, and the GPU has its memory back."""
        self.runc("delete", "--force", name, bare=True, check=False)
        pid_file = self.runc.path.parent / "stock.pid"
        if pid_file.exists():
            pid = pid_file.read_text()
            eventually(lambda: not Path("/proc", pid).exists(), timeout_s=60, what=f"process {pid} is gone")

    def _start(
        self,
        case: Case,
        name: str,
        *,
        bare: bool = False,
        annotations: dict[str, str] | None = None,
        env: Sequence[str] = (),
    ) -> float:
        """Seconds from create to the first answer. The bundle is made before."""
        runc = self.runc
        folder = self._bundle(case, name, annotations or {}, env)
        pid_file = folder / "pid"
        begin = time.perf_counter()
        runc.create(name, folder, "--pid-file", str(pid_file), bare=bare)
        runc("start", name, bare=bare)
        answer = self._until(case, name, int(pid_file.read_text()))
        took = time.perf_counter() - begin
        if annotations:
            self._equal_first(case, answer)
        return round(took, 3)

    def _bundle(self, case: Case, name: str, annotations: dict[str, str], env: Sequence[str]) -> Path:
        def edit(spec: dict[str, Any]) -> None:
            if case.weights:
                options = ["ro", "rbind", "rprivate"]
                spec["mounts"].append(
                    {"destination": "/weights", "source": str(case.weights), "type": "bind", "options": options}
                )

        devices = self.devices
        command = (python(), *case.command)
        folder = self.runc.bundle(name, *command, devices=devices, env=(*case.env, *env), annotations=annotations, edit=edit)
        if not annotations:
            # A restore brings it as a part of the writable layer.
            shutil.copy(HERE / "llama_server.py", folder / "rootfs/app/llama_server.py")
        return folder

    def _until(self, case: Case, name: str, pid: int) -> Answer:
        def alive() -> None:
            if not Path("/proc", str(pid)).exists():
                raise RuntimeError(f"{case.name}: the container ended: {self.runc.logs(name)[-2000:]}")

        return ask_until(lambda: pid, case.first, timeout_s=400, alive=alive)

    def _ask(self, case: Case, name: str, path: str) -> Answer:
        return ask(self.runc.pid(name), path, timeout_s=400)

    def _equal_first(self, case: Case, answer: Answer) -> None:
        """The request that ended the clock was answered by the checkpointed process, with the right result."""
        if answer["boot"] != self.expected["boot"]:
            raise RuntimeError(f"{case.name}: another process answered: it was started, not restored")
        if "value" in answer and answer["value"] != [values[0] for values in self.expected["values"]]:
            raise RuntimeError(f"{case.name}: another number after the restore: {answer['value']}")
        if "tokens" in answer and answer["tokens"] != self.expected["tokens"][: len(answer["tokens"])]:
            raise RuntimeError(f"{case.name}: other tokens after the restore: {answer['tokens']}")

    def _warm_up(self, case: Case, name: str) -> None:
        for path in case.warm_up:
            self._ask(case, name, path)

    def _warm_image(self) -> None:
        warm([path for path in (self.runc.node.store / "blobs/sha256").iterdir() if path.is_file()])

    def _remove(self, name: str) -> None:
        """With its memory: the next start must not wait for this one's end."""
        pid = self.runc.pid(name)
        self.runc.remove(name)
        eventually(lambda: not Path(f"/proc/{pid}").exists(), timeout_s=60, what=f"{name} is gone")


def _check(argv: Sequence[object], env: dict[str, str], log: Path, output: int | None = None) -> None:
    """Run a runtime; a failure quotes CRIU's log."""
    log.parent.mkdir(exist_ok=True)
    where = output if output is not None else subprocess.PIPE
    words = [str(word) for word in argv]
    done = subprocess.run(words, env=env, stdin=subprocess.DEVNULL, stdout=where, stderr=where, check=False)
    if done.returncode != 0:
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        errors = [line for line in lines if "Error" in line or "Warn" in line][-6:]
        said = "" if output is not None else done.stderr.decode(errors="replace")[-500:]
        raise RuntimeError(f"{' '.join(words[:3])}... ended with {done.returncode}: {said} {errors}")
