"""What SMR adds to containers: `python -m bench.overhead [--json] [--runs N] [--runtime PATH] [--criu PATH]`, as root.

Without an annotation: create, start and delete of a container through the bare runtime and through smr-runtime, in turn, in
this order within one run. `added_ms` is the median of the differences of the pairs, for neighbours see the same machine.

    {"stock_ms": .., "smr_ms": .., "added_ms": .., "resident_processes": 0, "annotated_added_ms": ..,
     "runs": .., "annotated": {..}, "machine": {..}}

`annotated_added_ms` is the interception of an annotated start: create and start as the engine sees them, less the stage in which
the real runtime and CRIU restore (`create`). It is null, with the reason under `annotated`, where nothing can be checkpointed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.machine import describe

REPOSITORY = Path(__file__).parents[1]
TOKEN = f"smr-bench-{os.getpid()}"
LIMIT_MS = 10.0
ANNOTATED_LIMIT_MS = 150.0


@dataclass(frozen=True)
class Bench:
    """A scratch directory with a bundle, an SMR of its own, and the runtime below it. Times are in milliseconds."""

    folder: Path
    runtime: str
    criu: str

    @property
    def env(self) -> dict[str, str]:
        """Environment of every program: SMR's settings, and the Python that has the package first on PATH."""
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SMR_CONFIG": str(self.folder / "smr.toml"),
            "SMR_RUN": str(self.folder / "run"),
            "SMR_RUNTIME": self.runtime,
            "SMR_STORE": str(self.folder / "store"),
            "SMR_LOG": str(self.folder / "smr.log"),
            "SMR_CRIU": self.criu,
        }

    def call(self, *words: str) -> float:
        """Run a program to its end; its output goes where nobody waits for it. Returns how long it took."""
        start = time.perf_counter()
        quiet = subprocess.DEVNULL
        done = subprocess.run(words, env=self.env, stdin=quiet, stdout=quiet, stderr=subprocess.PIPE, check=False)
        took = (time.perf_counter() - start) * 1000
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.decode(errors='replace').strip()}")
        return took

    def create(self, program: str, name: str, bundle: Path) -> float:
        """`create`, with a pipe for the container's output that a process of its own reads, as an engine's monitor does."""
        argv = [program, "create", "--bundle", str(bundle), name]
        read, write = os.pipe()
        with (bundle / "output").open("ab") as output:
            logger = subprocess.Popen(["cat"], stdin=read, stdout=output)
        os.close(read)
        start = time.perf_counter()
        done = subprocess.run(argv, env=self.env, stdin=subprocess.DEVNULL, stdout=write, stderr=write, check=False)
        took = (time.perf_counter() - start) * 1000
        os.close(write)
        if done.returncode != 0:
            logger.wait()
            raise RuntimeError(f"{' '.join(argv)}: {(bundle / 'output').read_text()}")
        return took

    def life(self, program: str, bundle: Path) -> float:
        """create, start and delete of one container."""
        name = TOKEN
        took = self.create(program, name, bundle)
        took += self.call(program, "start", name)
        return took + self.call(program, "delete", "--force", name)


@contextlib.contextmanager
def scratch(runtime: str, criu: str) -> Iterator[Bench]:
    """A Bench whose directory and cgroups go with it."""
    with tempfile.TemporaryDirectory(prefix="smr-bench-", dir="/var/tmp") as folder:
        (Path(folder) / "smr.toml").write_text("[smr]\n")
        try:
            yield Bench(Path(folder), runtime, criu)
        finally:
            for parent in (*Path("/sys/fs/cgroup").glob(f"*/{TOKEN}"), Path("/sys/fs/cgroup", TOKEN)):
                with contextlib.suppress(OSError):
                    parent.rmdir()


def bundle(bench: Bench, name: str, annotations: dict[str, str]) -> Path:
    """A bundle whose only file is a static busybox, asleep."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise SystemExit("bench.overhead: no busybox on PATH: apt-get install busybox-static")
    folder = bench.folder / name
    (folder / "rootfs/bin").mkdir(parents=True)
    for mount_point in ("proc", "sys", "dev"):
        (folder / "rootfs" / mount_point).mkdir()
    shutil.copy(busybox, folder / "rootfs/bin/busybox")
    bench.call(bench.runtime, "spec", "--bundle", str(folder))
    spec = json.loads((folder / "config.json").read_text())
    spec["process"].update(args=["/bin/busybox", "sleep", "1000000"], terminal=False)
    spec["process"].pop("rlimits", None)
    spec["linux"]["cgroupsPath"] = f"/{TOKEN}/{name}"
    spec["root"]["readonly"] = False
    spec["annotations"] = annotations
    (folder / "config.json").write_text(json.dumps(spec))
    return folder


def resident(bench: Bench) -> int:
    """Processes of SMR that run now for this bench."""
    mark, found = f"SMR_RUN={bench.env['SMR_RUN']}".encode(), 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                found += mark in (entry / "environ").read_bytes() and b"smr" in (entry / "cmdline").read_bytes()
    return found


def without_annotation(bench: Bench, runs: int) -> dict[str, object]:
    """Pairs of lives, bare and through smr-runtime."""
    smr, folder = str(REPOSITORY / "shim/bin/smr-runtime"), bundle(bench, "plain", {})
    for program in (bench.runtime, smr):
        bench.life(program, folder)
    pairs = [(bench.life(bench.runtime, folder), bench.life(smr, folder)) for _ in range(runs)]
    name = TOKEN
    bench.create(smr, name, folder)
    bench.call(smr, "start", name)
    left = resident(bench)
    bench.call(smr, "delete", "--force", name)
    return {
        "stock_ms": _median([stock for stock, _ in pairs]),
        "smr_ms": _median([ours for _, ours in pairs]),
        "added_ms": _median([ours - stock for stock, ours in pairs]),
        "resident_processes": left,
    }


def with_annotation(bench: Bench, runs: int) -> dict[str, object]:
    """Restores of a sleeping busybox; the time that is not the runtime's and CRIU's."""
    smr, source = str(REPOSITORY / "shim/bin/smr-runtime"), TOKEN
    folder = bundle(bench, "source", {})
    bench.create(smr, source, folder)
    bench.call(smr, "start", source)
    try:
        time.sleep(0.2)
        bench.call(str(Path(sys.executable).with_name("smr")), "checkpoint", source, "-n", "bench:1", "--engine", "runc")
    finally:
        bench.call(smr, "delete", "--force", source)
    folder = bundle(bench, "again", {"smr.restore": "bench:1", "smr.fallback": "fail", "smr.rootfs": "force"})
    walls, ours, stages = [], [], {}
    for _ in range(runs + 1):
        wall = bench.create(smr, source, folder) + bench.call(smr, "start", source)
        stages = _stages(bench, source)
        bench.call(smr, "delete", "--force", source)
        walls.append(wall)
        ours.append(wall - stages["create"] * 1000)
    return {"wall_ms": _median(walls[1:]), "added_ms": _median(ours[1:]), "stages_s": stages}


def _stages(bench: Bench, name: str) -> dict[str, float]:
    """Stages of a restore, from SMR's record; the one of start may follow a moment later."""
    (file,) = (bench.folder / "run/containers").glob(f"*/{name}/state.json")
    record = json.loads(file.read_text())
    return {stage["name"]: round(stage["end_s"] - stage["start_s"], 6) for stage in record["stages"]}


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 2)


def measure(bench: Bench, runs: int) -> dict[str, object]:
    """All of it, as one JSON object."""
    result = without_annotation(bench, runs)
    try:
        annotated = with_annotation(bench, max(runs // 3, 3))
    except (RuntimeError, KeyError) as error:
        annotated = {"skipped": str(error)}
    programs = {"runtime": [bench.runtime, "--version"], "criu": [bench.criu, "--version"]}
    return {
        **result,
        "annotated_added_ms": annotated.get("added_ms"),
        "runs": runs,
        "annotated": annotated,
        "machine": describe(programs),
    }


def find_criu(named: str) -> str:
    """The CRIU to use: the one named, SMR's, one of dev/provision, or the first on PATH."""
    engines = Path(os.environ.get("SMR_ENGINES", REPOSITORY / ".work/engines"))
    choices = [named, os.environ.get("SMR_CRIU", ""), "/opt/smr/criu/sbin/criu", str(engines / "criu-new/bin/criu")]
    return next((choice for choice in choices if choice and Path(choice).exists()), shutil.which("criu") or "criu")


def main() -> int:
    """Print the result; exit status 1 when a limit is broken."""
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--runs", type=int, default=30, help="pairs of containers (default 30)")
    parser.add_argument("--runtime", default=shutil.which("runc") or "runc", help="the real runtime (default runc on PATH)")
    parser.add_argument("--criu", default="", help="CRIU for the annotated part")
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("bench.overhead: needs root, for it runs containers")
    with scratch(options.runtime, find_criu(options.criu)) as bench:
        result = measure(bench, options.runs)
    if options.json:
        print(json.dumps(result))
    else:
        print(f"create + start + delete  bare {result['stock_ms']} ms  smr {result['smr_ms']} ms  added {result['added_ms']} ms")
        print(f"processes left resident  {result['resident_processes']}")
        print(f"annotated start          {result['annotated_added_ms']} ms besides the runtime's restore: {result['annotated']}")
        print(f"machine                  {result['machine']}")
    added, annotated = float(str(result["added_ms"])), result["annotated_added_ms"]
    broken = added > LIMIT_MS or (isinstance(annotated, float) and annotated > ANNOTATED_LIMIT_MS)
    return 1 if broken or result["resident_processes"] else 0


if __name__ == "__main__":
    sys.exit(main())
