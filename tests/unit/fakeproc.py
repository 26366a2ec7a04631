"""A /proc of files, for what is read from one: processes with descriptors, mappings, threads, sockets and an environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

DEVICES = "Character devices:\n  1 mem\n195 nvidia\n195 nvidiactl\n235 nvidia-uvm\n\nBlock devices:\n259 blkext\n"


class FakeProc:
    """Build one with `add`; `path` is the folder to read as /proc."""

    def __init__(self, path: Path, devices: str = DEVICES) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        (path / "devices").write_text(devices)

    def add(
        self,
        pid: int,
        *,
        children: Sequence[int] = (),
        fds: Mapping[int, str] | None = None,
        maps: str = "",
        threads: Sequence[str] = ("python",),
        environ: Mapping[str, str] | None = None,
        unix: str = "",
        tracer: int = 0,
        command: str = "python server.py",
    ) -> None:
        """One process; its threads get the pids PID, PID+1..., its children belong to the last of them."""
        folder = self.path / str(pid)
        (folder / "fd").mkdir(parents=True)
        for number, target in (fds or {}).items():
            (folder / "fd" / str(number)).symlink_to(target)
        (folder / "maps").write_text(maps)
        (folder / "cmdline").write_text(command.replace(" ", "\0") + "\0")
        (folder / "status").write_text(f"Name:\t{command.split(maxsplit=1)[0]}\nNSpid:\t{pid}\t{pid - 3}\n")
        (folder / "comm").write_text(command.split(maxsplit=1)[0] + "\n")
        (folder / "environ").write_text("".join(f"{key}={value}\0" for key, value in (environ or {}).items()))
        (folder / "net").mkdir()
        (folder / "net/unix").write_text("Num RefCount Protocol Flags Type St Inode Path\n" + unix)
        (folder / "root").mkdir()
        for place, name in enumerate(threads):
            task = folder / "task" / str(pid + place)
            task.mkdir(parents=True)
            (task / "comm").write_text(name + "\n")
            (task / "status").write_text(f"Name:\t{name}\nTracerPid:\t{tracer if place == len(threads) - 1 else 0}\n")
            last = place == len(threads) - 1
            (task / "children").write_text("".join(f"{child} " for child in children) if last else "")


# What a process with CUDA on one of two GPUs shows (driver 580, PyTorch), in fewer lines.
CUDA_FDS = {
    0: "/dev/null",
    10: "/dev/nvidiactl",
    11: "/dev/nvidia-uvm",
    12: "/dev/nvidia0",
    13: "/dev/nvidia0",
    14: "/dev/nvidia-caps/nvidia-cap1",
    15: "/dev/nvidia1",
    16: "anon_inode:[eventfd]",
}
CUDA_MAPS = """200000000-200600000 ---p 00000000 00:00 0
200600000-200800000 rw-s 00000000 00:06 491                              /dev/nvidia0
200800000-204000000 rw-s 00000000 00:06 489                              /dev/nvidiactl
204a00000-204c00000 rw-s 204a00000 00:06 490                             /dev/nvidia-uvm
7f400d800000-7f400da00000 rw-s 00000000 00:01 1025                       /dev/zero (deleted)
7f434d2b1000-7f434d2c1000 -w-s 00000000 00:06 492                        /dev/nvidia1
7f434d2d1000-7f434d2e1000 -w-s 00000000 00:06 491                        /dev/nvidia0
7f4400000000-7f4400100000 r-xp 00000000 08:01 77                         /usr/lib/x86_64-linux-gnu/libcuda.so.580.159.04
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
"""
