"""How fast a container with a GPU comes back: `python -m bench.gpu --vram-gib N [--json] [--cases A,B] [--runs N] ...`, as root.

    vram-N             a PyTorch server with N GiB of VRAM in large tensors, fragments, streams, a CUDA graph and pinned memory
    llama-8b-eager     LLaMA-3.1-8B's exact architecture in bf16, seeded random weights, on transformers behind HTTP
    llama-8b-compiled  the same through torch.compile

All run in a runc container: private pid, mount, network, ipc and uts namespaces, an overlay root over the machine's own, devices
and driver from a CDI document. Each time is from the runtime's `create` (stock: `restore`) until a client in the container's
network namespace has a checked answer: the checkpointed process's, with the right number or token. Medians of `--runs`, page
cache warm.

    cold_s    create and start of a new container through the bare runc; weights, if any, in the page cache (cold_disk_s: not)
    stock_s   `runc restore` of a dump by the same CRIU with no plugin, then the driver's restore and unlock by a process that has
              CUDA initialised already (bench.gpu_calls)
    smr_s     create and start through smr-runtime with the annotation smr.restore
    pause_s   the longest gap between two answers that a client saw who asks every few milliseconds across `smr checkpoint`
    equal     after every restore, and in the container that went on, all answers were those from before: a digest over all VRAM
              made on the GPU, or 32 greedy tokens

    {"machine": {..}, "driver": .., "cases": [{"name": .., "cold_s": .., "stock_s": .., "smr_s": .., "stages_s": {..},
      "pause_s": .., "equal": true, ..}]}

What differs between stock and SMR besides SMR: the compiled model of the stock side compiles without worker processes, because
stock CRIU cannot dump them; SMR dumps the server as it is. `stages_s` are SMR's own, of the median run.

Needs root, runc, CRIU, torch (and transformers) in this Python or that of SMR_TEST_PYTHON, and disk in /var/tmp for one image:
VRAM and memory, and 16 GB of weights for LLaMA (`--weights DIR` keeps them for the next run). The three cases vram-8, vram-24 and
llama-8b-eager take some 8 minutes on an H200. `--device cpu` tries the whole way without a GPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.gpu_calls import calls
from bench.gpu_cases import Bench, Case, llama_case, vram_case, write_weights
from bench.machine import describe
from bench.overhead import find_criu
from tests.gpu import cdi
from tests.gpu.container import GpuRunc, python
from tests.integration.node import Node
from tests.integration.sandbox import Sandbox, sandbox

_LLAMA = ("llama-8b-eager", "llama-8b-compiled")
_VERSIONS = """
import json
found = {}
for name in ("torch", "transformers", "safetensors"):
    try:
        found[name] = __import__(name).__version__
    except ImportError:
        found[name] = "not there"
print(json.dumps(found))
"""


def gpu_facts() -> dict[str, Any]:
    """Driver, CUDA version, and model and memory of each GPU."""
    import pynvml  # type: ignore[import-untyped]

    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        gpus = [
            {
                "name": str(pynvml.nvmlDeviceGetName(handle)),
                "memory_gib": round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1),
            }
            for handle in handles
        ]
        cuda = int(pynvml.nvmlSystemGetCudaDriverVersion())
        return {"driver": str(pynvml.nvmlSystemGetDriverVersion()), "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}", "gpus": gpus}
    finally:
        pynvml.nvmlShutdown()


def versions() -> dict[str, str]:
    """Of the Python that runs in the containers."""
    done = subprocess.run([python(), "-c", _VERSIONS], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def cases(options: argparse.Namespace, weights: Path) -> Iterator[Case]:
    """Those that were asked for."""
    for name in options.cases:
        if name in _LLAMA:
            write_weights(weights, options.size)
            yield llama_case(name == _LLAMA[1], weights, options.device)
        else:
            yield vram_case(float(name.removeprefix("vram-")), options.device)


def run(options: argparse.Namespace, box: Sandbox) -> dict[str, Any]:
    """All cases."""
    criu = find_criu(options.criu)
    node = Node(box.base / "node-gpu", runtime=Path(options.runtime), criu=Path(criu), search=os.environ["PATH"])
    with ExitStack() as stack:
        gpu = options.device == "cuda"
        document = cdi.specification(cdi.probe()) if gpu else {}
        runc = GpuRunc(box.base / "bundles-gpu", node, box, document)
        stack.callback(runc.remove_all)
        made = stack.enter_context(calls()) if gpu else None
        bench = Bench(
            runc=runc,
            calls=made,
            devices=("0",) if gpu else (),
            runs=options.runs,
            stock_runs=options.runs if options.stock_runs is None else options.stock_runs,
            note=lambda text: print(text, file=sys.stderr, flush=True),
        )
        weights = options.weights or box.base / "weights"
        facts = gpu_facts() if gpu else {"driver": None}
        machine = describe({"criu": [criu, "--version"], "runc": [options.runtime, "--version"]})
        result: dict[str, Any] = {"machine": {**machine, **facts, **versions()}, "driver": facts["driver"], "runs": options.runs}
        rows: list[dict[str, Any]] = []
        for case in cases(options, weights):
            try:
                rows.append(bench.measure(case))
            except (RuntimeError, AssertionError, TimeoutError, OSError) as error:
                # The other cases' figures are worth having; the exit status says that one is missing.
                rows.append({"name": case.name, "error": str(error)[-3000:], "equal": False})
                bench.note(f"{case.name}: failed: {error}")
        return {**result, "cases": rows}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vram-gib", type=float, default=8, help="VRAM of the case vram-N (default 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--cases", default="", help="vram-N, llama-8b-eager, llama-8b-compiled (default vram-N of --vram-gib)")
    parser.add_argument("--runs", type=int, default=3, help="restores of each kind (default 3)")
    parser.add_argument("--stock-runs", type=int, help="restores by stock CRIU (default as --runs; 0 for none)")
    parser.add_argument("--weights", type=Path, help="where LLaMA's weights are, or are written (default: removed at the end)")
    parser.add_argument("--size", choices=("8b", "tiny"), default="8b", help="of the LLaMA cases; tiny is for trying it out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--criu", default="", help="CRIU (default $SMR_CRIU, SMR's, dev/provision's, PATH's)")
    parser.add_argument("--runtime", default=shutil.which("runc") or "runc", help="runc (default: PATH's)")
    options = parser.parse_args()
    options.cases = [name for name in options.cases.split(",") if name] or [f"vram-{options.vram_gib:g}"]
    for name in options.cases:
        if name not in _LLAMA and not re.fullmatch(r"vram-\d+(\.\d+)?", name):
            parser.error(f"no such case: {name}; there are vram-N, {', '.join(_LLAMA)}")
    if os.geteuid() != 0:
        parser.error("needs root, for containers and CRIU")
    if options.weights:
        options.weights = options.weights.resolve()
    return options


def _line(row: dict[str, Any]) -> str:
    return "  ".join(f"{key} {value}" for key, value in row.items() if not isinstance(value, list | dict))


def main() -> int:
    """Print the result; 1 when a case failed or was not equal."""
    options = _options()
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    with sandbox() as box:
        result = run(options, box)
    if options.json:
        print(json.dumps(result))
    else:
        for row in result["cases"]:
            print(_line(row))
    return 0 if all(row["equal"] for row in result["cases"]) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, LookupError) as error:
        sys.exit(f"bench.gpu: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
