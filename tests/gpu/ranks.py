"""A tensor-parallel server: a parent without CUDA and N ranks, one GPU each, that reduce over NCCL. Rank 0 answers on port 8000.

    /count     one forward pass over all ranks: {"count", "boot", "value"}
    /check     {"digests": one of each rank's weights, "value", "boot"}
    /quiesce   all ranks tear the process group down; passes are an error (500) until
    /resume    they build it again; {"groups": how many there have been}

Rank 0 tells the others what to do over unix sockets, and the group is found through a file: the only TCP connections are NCCL's.
`--device cpu` does the same with gloo, for trying it out without GPUs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from workload import serve

_HIDDEN, _INNER = 1024, 4096


class Rank:
    """One rank: its part of the weights, and the process group when there is one."""

    def __init__(self, rank: int, ranks: int, device: torch.device) -> None:
        self.rank, self.ranks, self.device, self.groups = rank, ranks, device, 0
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.manual_seed(1)
        part = slice(rank * _INNER // ranks, (rank + 1) * _INNER // ranks)
        self.up = torch.randn(_HIDDEN, _INNER)[:, part].contiguous().to(device) * 0.02
        self.down = torch.randn(_INNER, _HIDDEN)[part].contiguous().to(device) * 0.02
        self.x = torch.randn(16, _HIDDEN).to(device)

    def join(self) -> None:
        """Build the group; all ranks must."""
        self.groups += 1
        found = f"/tmp/ranks-{self.groups}"
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        more = {"device_id": self.device} if self.device.type == "cuda" else {}
        dist.init_process_group(backend, init_method=f"file://{found}", rank=self.rank, world_size=self.ranks, **more)
        self.forward()

    def leave(self) -> None:
        """Tear it down: afterwards nothing of NCCL is left in this process."""
        dist.destroy_process_group()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forward(self) -> float:
        """One layer; the same number on each rank, each time."""
        y = torch.nn.functional.gelu(self.x @ self.up) @ self.down
        dist.all_reduce(y)
        return float(y.double().pow(2).sum())

    def digest(self) -> str:
        """Of this rank's weights."""
        return hashlib.sha256(self.up.cpu().numpy().tobytes() + self.down.cpu().numpy().tobytes()).hexdigest()

    def obey(self, order: str) -> object:
        """An order that all ranks get at the same time."""
        if order in {"quiesce", "resume"}:
            if (order == "quiesce") == dist.is_initialized():
                self.leave() if order == "quiesce" else self.join()
            return self.groups
        if order == "digest":
            return self.digest()
        if not dist.is_initialized():
            raise RuntimeError("the ranks are quiesced")
        return self.forward()


def follow(rank: Rank, link: socket.socket) -> None:
    """A rank that is told."""
    with link.makefile("rw") as lines:
        for line in lines:
            try:
                answer: object = rank.obey(line.strip())
            except RuntimeError as error:
                answer = {"error": str(error)}
            lines.write(json.dumps(answer) + "\n")
            lines.flush()


def lead(rank: Rank, links: list[socket.socket]) -> None:
    """Rank 0: HTTP in, orders out."""
    others = [link.makefile("rw") for link in links]
    boot, count = secrets.token_hex(8), 0

    def all_of(order: str) -> list[object]:
        for other in others:
            other.write(order + "\n")
            other.flush()
        try:
            own = rank.obey(order)
        except RuntimeError as error:
            own = {"error": str(error)}
        # All are heard, also when one could not: the next order's answers come on the same lines.
        answers = [own, *(json.loads(other.readline()) for other in others)]
        failed = [answer for answer in answers if isinstance(answer, dict) and "error" in answer]
        if failed:
            raise RuntimeError(failed[0]["error"])
        return answers

    def counted() -> dict[str, object]:
        nonlocal count
        value = all_of("forward")
        count += 1
        return {"count": count, "boot": boot, "value": value}

    serve(
        {
            "count": counted,
            "check": lambda: {"digests": all_of("digest"), "value": all_of("forward"), "boot": boot},
            "quiesce": lambda: {"groups": all_of("quiesce")},
            "resume": lambda: {"groups": all_of("resume")},
        },
        8000,
    )


def launch(options: argparse.Namespace) -> None:
    """The parent: starts the ranks and waits for them."""
    pairs = [socket.socketpair() for _ in range(options.ranks - 1)]
    processes = []
    for number in range(options.ranks):
        ends = [a for a, _ in pairs] if number == 0 else [pairs[number - 1][1]]
        fds = [end.fileno() for end in ends]
        argv = [sys.executable, __file__, "--ranks", options.ranks, "--device", options.device, "--rank", number]
        argv += ["--links", ",".join(map(str, fds))]
        processes.append(subprocess.Popen([str(word) for word in argv], pass_fds=fds))
    for pair in pairs:
        for end in pair:
            end.close()
    for process in processes:
        process.wait()


def main() -> None:
    """Parent or rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rank", type=int, default=-1)
    parser.add_argument("--links", default="")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    if options.rank < 0:
        launch(options)
        return
    links = [socket.socket(fileno=int(fd)) for fd in options.links.split(",")]
    device = torch.device("cuda", options.rank) if options.device == "cuda" else torch.device("cpu")
    rank = Rank(options.rank, options.ranks, device)
    Path("/tmp").mkdir(exist_ok=True)
    rank.join()
    if options.rank == 0:
        print("serving", os.getpid(), flush=True)
        lead(rank, links)
    else:
        follow(rank, links[0])


if __name__ == "__main__":
    main()
