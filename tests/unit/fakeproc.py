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


CUDA_FDS = {0: "/dev/null", 10: "/dev/nvidiactl", 11: "/dev/nvidia-uvm", 12: "/dev/nvidia0", 13: "/dev/nvidia0"}
CUDA_MAPS = """200000000-200200000 ---p 00000000 00:00 0
200200000-200400000 rw-s 00000000 00:06 489                              /dev/nvidiactl
205e00000-206000000 rw-s 205e00000 00:06 490                             /dev/nvidia-uvm
7f0000000000-7f0000200000 rw-s 00000000 00:06 491                        /dev/nvidia0
7f1000000000-7f1000100000 r-xp 00000000 08:01 77                         /usr/lib/x86_64-linux-gnu/libcuda.so.580.159.04
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
"""
