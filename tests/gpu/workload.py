"""What runs inside the containers of the GPU tests and of bench.gpu: servers whose whole state is in memory and in VRAM.

    workload.py server [--vram-gib X] [--gpus N] [--port P]    one process on N GPUs
    workload.py pair [--vram-gib X]        a parent without CUDA, and two servers that it forked, on ports 8000 and 8001
    workload.py loader [--vram-gib X]      a server whose DataLoader workers were forked after CUDA was initialised
    workload.py compiled [--vram-gib X]    a server with a torch.compile'd model, and the compile workers alive

Every server answers over HTTP, one request after the other:

    /count     {"count", "boot", "value"}: counts up, after a replay of a CUDA graph; `boot` is drawn once a process
    /check     {"digest", "values", "bytes", "boot"}: a digest of every byte of every tensor, made on the GPU, and numbers that
               depend on streams, graphs, pinned memory and the random state
    /churn     frees and allocates among the fragments, changes others; {"allocated"}
    /next      loader: the next batch of an iterator that stays open; {"sum", "workers"}
    /children  {"pids"}: children, by their pid in the container

`--device cpu` runs all that can run without CUDA, for trying it out. Nothing of it is deterministic but what is seeded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import torch

_MASK = (1 << 64) - 1
_CHUNK = 1 << 23  # int64 words: 64 MiB
Routes = dict[str, Callable[[], dict[str, object]]]


class Checksum:
    """A digest that depends on the value and on the place of every byte of a tensor; made where the tensor is."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator(device="cpu").manual_seed(7)
        weights = torch.randint(-(1 << 62), 1 << 62, (_CHUNK,), generator=generator, dtype=torch.int64) | 1
        self._weights = weights.to(device)

    def of(self, tensor: torch.Tensor) -> int:
        """64 bits; arithmetic wraps, so the order of a sum does not matter."""
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        words = flat[: flat.numel() // 8 * 8].view(torch.int64)
        total = int.from_bytes(flat[words.numel() * 8 :].cpu().numpy().tobytes(), "little")
        for begin in range(0, words.numel(), _CHUNK):
            part = words[begin : begin + _CHUNK]
            total = (total * 0x9E3779B97F4A7C15 + int((part * self._weights[: part.numel()]).sum())) & _MASK
        return total


class Gpu:
    """What one GPU holds: large tensors, fragments of a caching allocator, streams, a CUDA graph and pinned memory."""

    def __init__(self, device: torch.device, size_bytes: int) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        torch.manual_seed(1)
        self.checksum = Checksum(device)
        self.big = [torch.randn(size_bytes // 4 // 8, device=device) for _ in range(8)]
        blocks = [torch.randn(1 + 977 * number, device=device) for number in range(1, 400)]
        self.fragments = dict(enumerate(blocks))
        for number in range(0, 399, 2):
            del self.fragments[number]
        self.x = torch.randn(1024, 1024, device=device)
        self.pinned = torch.randn(4 << 20)
        if self.cuda:
            self.pinned = self.pinned.pin_memory()
        self.streams = [torch.cuda.Stream(device) for _ in range(4)] if self.cuda else []
        self.steps = 0
        self._capture()

    def _capture(self) -> None:
        self.out = torch.zeros_like(self.x)
        if not self.cuda:
            return
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.device(self.device), torch.cuda.stream(side):
            for _ in range(3):
                torch.tanh(self.x @ self.x * 0.01)
        torch.cuda.current_stream(self.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # Its own stream: torch's default one for captures is of the first GPU that made one.
        with torch.cuda.device(self.device), torch.cuda.graph(self.graph, stream=side):
            self.out = torch.tanh(self.x @ self.x * 0.01)
        torch.cuda.synchronize(self.device)

    def step(self) -> float:
        """Replay the graph; the same number each time."""
        if self.cuda:
            self.graph.replay()
        else:
            self.out = torch.tanh(self.x @ self.x * 0.01)
        self.steps += 1
        return float(self.out.double().sum())

    def churn(self) -> int:
        """Free and allocate between the fragments, and change a large tensor: the allocator's own state is used, too."""
        self.big[0][: 1 << 10] += 1
        for number in range(1, 399, 4):
            self.fragments.pop(number, None)
        for number in range(0, 399, 4):
            self.fragments[number] = torch.full((300 + 31 * number,), float(number), device=self.device)
        return len(self.fragments)

    def parallel(self) -> list[float]:
        """Work on several streams at once, with copies from and to pinned memory."""
        if not self.cuda:
            return [float((self.pinned * number).double().sum()) for number in range(1, 5)]
        sums = []
        for number, stream in enumerate(self.streams, 1):
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                copy = self.pinned.to(self.device, non_blocking=True)
                sums.append((copy * number).double().sum())
        torch.cuda.synchronize(self.device)
        back = torch.empty(1 << 20).pin_memory()
        back.copy_(self.big[0][: 1 << 20], non_blocking=True)
        torch.cuda.synchronize(self.device)
        return [*(float(each) for each in sums), float(back.double().sum())]

    def tensors(self) -> list[torch.Tensor]:
        """All that a digest covers."""
        return [*self.big, *(self.fragments[number] for number in sorted(self.fragments)), self.x]


class Server:
    """The routes of one process."""

    def __init__(self, devices: list[torch.device], vram_gib: float) -> None:
        size_bytes = int(vram_gib * 2**30 / len(devices))
        self.gpus = [Gpu(device, size_bytes) for device in devices]
        self.count, self.boot = 0, secrets.token_hex(8)
        self.routes: Routes = {"count": self._count, "check": self._check, "churn": self._churn, "children": children}

    def _count(self) -> dict[str, object]:
        self.count += 1
        return {"count": self.count, "boot": self.boot, "value": [gpu.step() for gpu in self.gpus]}

    def _check(self) -> dict[str, object]:
        digest, size = hashlib.sha256(), 0
        for gpu in self.gpus:
            for tensor in gpu.tensors():
                digest.update(gpu.checksum.of(tensor).to_bytes(8, "little"))
                size += tensor.numel() * tensor.element_size()
            digest.update(gpu.pinned.numpy().tobytes())
        values = [[gpu.step(), *gpu.parallel()] for gpu in self.gpus]
        return {"digest": digest.hexdigest(), "values": values, "bytes": size, "boot": self.boot}

    def _churn(self) -> dict[str, object]:
        return {"allocated": [gpu.churn() for gpu in self.gpus]}


def children() -> dict[str, object]:
    """Processes below this one, at any depth."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    below = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in below and pid not in below}:
        below |= more
    return {"pids": sorted(below - {os.getpid()})}


def serve(routes: Routes, port: int) -> None:
    """Answer for ever, one request after the other, from the main thread."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            route = routes.get(self.path.strip("/"))
            try:
                status, answer = (200, route()) if route else (404, {"error": f"no {self.path}"})
            except RuntimeError as error:  # of CUDA: the test shall see it, and the server go on
                status, answer = 500, {"error": str(error)}
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815  # the name is http.server's

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Backlog(HTTPServer):
        request_queue_size = 128

    Backlog(("0.0.0.0", port), Handler).serve_forever()


def pair(options: argparse.Namespace) -> None:
    """Two servers, each a child with a CUDA of its own; this process only waits."""
    argv = [sys.executable, __file__, "server", "--vram-gib", str(options.vram_gib), "--device", options.device]
    servers = [subprocess.Popen([*argv, "--port", str(port)]) for port in (8000, 8001)]
    for server in servers:
        server.wait()


def loader(server: Server) -> None:
    """Batches that workers forked after CUDA's initialisation make, from an iterator that is in the middle."""
    data = torch.utils.data.TensorDataset(torch.arange(200_000, dtype=torch.float32).reshape(-1, 8))
    batches = torch.utils.data.DataLoader(data, batch_size=16, num_workers=2, persistent_workers=True, prefetch_factor=2)
    iterator = iter(batches)

    def following() -> dict[str, object]:
        (batch,) = next(iterator)
        return {"sum": float(batch.to(server.gpus[0].device).double().sum()), "workers": len(children()["pids"])}  # type: ignore[arg-type]

    following()
    server.routes["next"] = following


def compiled(server: Server) -> None:
    """A small network through torch.compile. Its compile workers stay alive, as they do in every server that compiles."""
    device = server.gpus[0].device
    torch.manual_seed(3)
    layers = [
        torch.nn.Linear(256, 256),
        torch.nn.GELU(),
        torch.nn.LayerNorm(256),
        torch.nn.Linear(256, 256),
        torch.nn.Softmax(-1),
    ]
    model = torch.nn.Sequential(*layers).to(device)
    fast = torch.compile(model)
    x = torch.randn(64, 256, device=device)

    def run(rows: int) -> dict[str, object]:
        with torch.no_grad():
            return {"value": float(fast(x[:rows]).double().pow(2).sum()), "workers": len(children()["pids"])}  # type: ignore[arg-type]

    run(64)
    server.routes["compiled"] = lambda: run(64)
    # A shape that has not been seen: the compiler and its workers have to work after a restore, too.
    server.routes["recompile"] = lambda: run(48)


def main() -> None:
    """Be one of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("server", "pair", "loader", "compiled"))
    parser.add_argument("--vram-gib", type=float, default=0.5)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))  # the first process of a container has no default handlers
    if options.what == "pair":
        return pair(options)
    if options.device == "cpu":
        torch.set_num_threads(2)
        devices = [torch.device("cpu")]
    else:
        devices = [torch.device("cuda", number) for number in range(options.gpus)]
    server = Server(devices, options.vram_gib)
    if options.what in {"loader", "compiled"}:
        {"loader": loader, "compiled": compiled}[options.what](server)
    for route in ("check", "count"):
        server.routes[route]()
    print("serving", flush=True)
    return serve(server.routes, options.port)


if __name__ == "__main__":
    main()
