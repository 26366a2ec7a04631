"""Dumps for bench.pages that leave the pages to SMR: the process is held still, CRIU dumps it lazily, its pages are read from it.

The process is stopped by SIGSTOP, where a container would be frozen; the clock runs until it is continued, so it is the pause.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.pages_restore import Bench, Image, Row
from smr.images.cutting import thread_count
from smr.images.livesplit import LiveSplit
from smr.images.staging import dirty_room
from smr.shim.dump import lazy_options
from smr.shim.lazydump import raise_file_limit, server_socket


def live(bench: Bench, image: Image) -> Row:
    """One of them; the image is then split. `s`: the pause; `all_s`: with the hashes of the segments, for which nobody waits."""
    out = image.folder / "segments"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    raise_file_limit()
    begin = time.perf_counter()
    os.kill(image.pid, signal.SIGSTOP)
    try:
        _wait_stopped(image.pid)
        staged = image.memory_bytes > dirty_room(Path("/proc/vmstat").read_text())
        with LiveSplit(out, {image.pid: image.pid}, staged=staged) as pages, server_socket() as server:
            pages.begin()
            options = [f"--{name} {value}".split() for name, value in lazy_options(server).items()]
            bench.dump(image, "--leave-stopped", *(word for words in options for word in words), pass_fds=(server,))
            taken = pages.finish(image.images)
    finally:
        os.kill(image.pid, signal.SIGCONT)
    paused = time.perf_counter() - begin
    if taken is None:
        raise RuntimeError("this criu dumps all pages whatever it is told")
    image.set_split(taken.land())
    with ThreadPoolExecutor(thread_count(None)) as pool:
        list(pool.map(_digest, [segment.path for segment in taken.split.segments if segment.path not in taken.staged.files]))
    return {"s": paused, "criu_s": image.dump_s, "all_s": time.perf_counter() - begin}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wait_stopped(pid: int) -> None:
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.0005)
