"""Pods through containerd's CRI: `python -m bench.cri [--json] [--runs N] [--row N] [--at-once N] [--old]`, as root.

    plain       a pod without annotations, from RunPodSandbox to a started container, under the stock runtime and under `smr`
    restored    CreateContainer and StartContainer of a pod that is restored, against `ctr run` of the same image with the same
                spec on a root that is mounted already: what a kubelet's way adds to a restore
    many        N pods restored one after the other, then N together, and what is left of them afterwards (a list, empty when
                nothing is), with the open files of containerd and the disk that is taken before and after

`added_ms` is the median of the differences of pairs that follow each other, `added_best_ms` the difference of the shortest times:
what is left of it on a machine that has other work too. The engines of `dev/provision` in a corner of the
machine of their own (tests.integration.sandbox); `--old` takes the distribution's containerd and runc.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.machine import describe
from bench.overhead import find_criu
from tests.integration import testimage
from tests.integration.command import eventually, run
from tests.integration.cri import Cri, Pod
from tests.integration.node import Node
from tests.integration.sandbox import Sandbox, sandbox

REPOSITORY = Path(__file__).parents[1]
ENGINES = Path(os.environ.get("SMR_ENGINES", REPOSITORY / ".work/engines"))
LIMIT_PLAIN_MS, LIMIT_RESTORED_MS = 10.0, 50.0
IMAGE = "bench:1"
_LEFT_S = 15.0


@contextlib.contextmanager
def engine(box: Sandbox, *, old: bool, criu: str) -> Iterator[Cri]:
    """A containerd with its CRI, and an SMR of its own."""
    folder = None if old else ENGINES / "containerd-new/bin"
    runtime = Path(shutil.which("runc") or "runc") if old else ENGINES / "runc-new/bin/runc"
    node = Node(box.base / "node-bench", runtime=runtime, criu=Path(criu), search=os.environ["PATH"])
    cri = Cri(box.base / "cri-bench", node, box, folder=folder, version="1.6" if old else "2.x")
    with cri.serving():
        cri.load(ENGINES)
        yield cri
        cri.remove_all()


def plain(cri: Cri, runs: int) -> dict[str, object]:
    """Pods that do not ask for us."""

    def start(handler: str) -> float:
        began = time.perf_counter()
        pod = cri.run_pod("plain", handler=handler)
        cri.run_container(pod, "server")
        took = (time.perf_counter() - began) * 1000
        cri.remove_pod(pod)
        return took

    return compare(lambda: start("runc"), lambda: start("smr"), runs, ("stock_ms", "smr_ms"))


def restored(cri: Cri, runs: int) -> dict[str, object]:
    """A container of a pod against one of ctr in the namespaces of another pod."""
    beside = cri.run_pod("beside")
    spec, root = as_ctr(cri, beside), cri.path / "ctr-root"
    root.mkdir()

    def by_ctr() -> float:
        cri("images", "mount", "--rw", testimage.NAME, root)
        began = time.perf_counter()
        words = ["--runtime", "io.containerd.smr.v2", "--log-uri", f"file://{cri.path}/ctr.log", "--config", spec]
        cri("run", "-d", *words, "bench-ctr")
        took = (time.perf_counter() - began) * 1000
        cri.remove("bench-ctr")
        cri("images", "unmount", "--rm", root)
        return took

    def by_cri() -> float:
        pod = cri.run_pod("again", {"smr.restore": IMAGE, "smr.fallback": "fail"})
        began = time.perf_counter()
        cri.run_container(pod, "server", "workers")
        took = (time.perf_counter() - began) * 1000
        assert cri.probe(pod)["count"] == 0
        cri.remove_pod(pod)
        return took

    result = compare(by_ctr, by_cri, runs, ("ctr_ms", "cri_ms"))
    cri.remove_pod(beside)
    return result


def as_ctr(cri: Cri, pod: Pod) -> Path:
    """A spec for `ctr run --config`: that of a pod's container, with namespaces and mounts of `pod`, no pod's any more.

    Its root is mounted beforehand, so ctr has that much less to do.
    """
    name = cri.create_container(pod, "server", "workers")
    cri.start_container(pod, "server")
    tasks = cri.state / "io.containerd.runtime.v2.task" / cri.namespace
    spec = json.loads((tasks / name / "config.json").read_text())
    cri.stop_container(pod, "server", 0)  # its port is to be the other's
    cri.remove_container(pod, "server")
    spec["annotations"] = {"smr.restore": IMAGE, "smr.fallback": "fail"}
    spec["root"]["path"] = str(cri.path / "ctr-root")
    spec["linux"]["cgroupsPath"] = f"/{cri.box.token}/bench-ctr"
    file = cri.path / "ctr-spec.json"
    file.write_text(json.dumps(spec))
    return file


def compare(one: Callable[[], float], other: Callable[[], float], runs: int, names: tuple[str, str]) -> dict[str, object]:
    """Both in turn, after one of each that does not count."""
    one(), other()
    pairs = [(one(), other()) for _ in range(runs)]
    return {
        names[0]: median([left for left, _ in pairs]),
        names[1]: median([right for _, right in pairs]),
        "added_ms": median([right - left for left, right in pairs]),
        "added_best_ms": round(min(right for _, right in pairs) - min(left for left, _ in pairs), 2),
        "runs": runs,
    }


def median(values: Sequence[float]) -> float:
    """In the unit given, to hundredths."""
    return round(statistics.median(values), 2)


def many(cri: Cri, row: int, at_once: int) -> dict[str, object]:
    """Pods one after the other and together; every one has to serve the checkpoint's state."""
    before, files, disk = cri.box.snapshot(), open_files(cri), disk_mib(cri)
    took = []
    for number in range(row):
        began = time.perf_counter()
        pod = one_more(cri, f"row-{number}")
        took.append((time.perf_counter() - began) * 1000)
        cri.remove_pod(pod)
    began = time.perf_counter()
    with ThreadPoolExecutor(max(at_once, 1)) as pool:
        pods = list(pool.map(lambda number: one_more(cri, f"once-{number}"), range(at_once)))
    together_s = time.perf_counter() - began
    for pod in pods:
        cri.remove_pod(pod)
    left: list[str] = []

    def clean() -> bool:
        left[:] = cri.box.snapshot().left_since(before)
        return not left

    with contextlib.suppress(AssertionError):
        eventually(clean, timeout_s=_LEFT_S)
    return {
        "row": row,
        "pod_ms": median(took) if took else None,
        "at_once": at_once,
        "at_once_s": round(together_s, 2),
        "left": list(left),
        "containerd_files": [files, open_files(cri)],
        "disk_mib": [disk, disk_mib(cri)],
    }


def one_more(cri: Cri, name: str) -> Pod:
    """A restored pod that has answered."""
    pod = cri.run_pod(name, {"smr.restore": IMAGE, "smr.fallback": "fail"})
    cri.run_container(pod, "server", "workers")
    assert cri.probe(pod, "count")["count"] == 1
    return pod


def open_files(cri: Cri) -> int:
    """Open files of the daemon."""
    return len(list(Path(f"/proc/{cri.daemon_pid}/fd").iterdir()))


def disk_mib(cri: Cri) -> int:
    """What engine and SMR keep on disk; containerd's log, which grows by its nature, left out."""
    done = run(["du", "-smc", "--exclude=*.log", cri.path, cri.node.path])
    return int(done.stdout.splitlines()[-1].split()[0])


def make_image(cri: Cri) -> None:
    """A checkpoint of a pod's container that has answered nothing yet but one look."""
    pod = cri.run_pod("source")
    cri.run_container(pod, "server", "workers")
    cri.answers(pod)
    cri.checkpoint_pod(pod, "server", IMAGE)
    cri.remove_pod(pod)


def main() -> int:
    """Print the result; exit status 1 when a limit is broken or something is left."""
    parser = argparse.ArgumentParser(prog="python -m bench.cri", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--runs", type=int, default=11, help="pairs of pods (default 11)")
    parser.add_argument("--row", type=int, default=50, help="pods restored one after the other (default 50)")
    parser.add_argument("--at-once", type=int, default=10, help="pods restored together (default 10)")
    parser.add_argument("--old", action="store_true", help="the distribution's containerd and runc")
    parser.add_argument("--criu", default="", help="CRIU to use")
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("bench.cri: needs root, for it runs containers")
    criu = find_criu(options.criu)
    with sandbox() as box, engine(box, old=options.old, criu=criu) as cri:
        make_image(cri)
        result: dict[str, dict[str, object]] = {
            "many": many(cri, options.row, options.at_once),
            "plain": plain(cri, options.runs),
            "restored": restored(cri, options.runs),
            "machine": describe(
                {
                    "containerd": [cri.program, "--version"],
                    "runc": [str(cri.node.runtime), "--version"],
                    "criu": [criu, "--version"],
                }
            ),
        }
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:10} {value}")
    added = [float(str(result[name]["added_ms"])) for name in ("plain", "restored")]
    broken = added[0] > LIMIT_PLAIN_MS or added[1] > LIMIT_RESTORED_MS
    return 1 if broken or result["many"]["left"] else 0


if __name__ == "__main__":
    sys.exit(main())
