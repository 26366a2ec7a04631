"""How much forked processes have in common, in a guess: what decides who dumps their pages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from smr.shim import lazydump, procs
from tests.integration.command import eventually

MIB = 1 << 20
# A process with 64 MiB, two that it forked, and one that it started anew.
PROGRAM = f"""
import mmap, os, subprocess, sys, time
held = mmap.mmap(-1, 64 * {MIB}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, len(held), 4096):
    held[at] = 1
for _ in range(2):
    if os.fork() == 0:
        time.sleep(600)
subprocess.Popen([sys.executable, "-c", "import time; b = bytearray(b'x' * (64 << 20)); time.sleep(600)"])
time.sleep(600)
"""


def test_only_forked_processes_have_memory_in_common() -> None:
    """Each fork counts with what it holds of its parent's; a program that was started anew has memory of its own."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM], start_new_session=True) as process:
        try:

            def ready() -> list[procs.Process]:
                tree = procs.tree(process.pid)
                commands = {Path(f"/proc/{one.pid}/cmdline").read_bytes() for one in tree}
                assert len(tree) == 4
                assert len(commands) == 2
                assert all(lazydump._anonymous_bytes([one]) > 64 * MIB for one in tree)
                return tree

            tree = eventually(ready, what="all have their memory")
            common = lazydump._common_bytes(tree)
            alone = lazydump._common_bytes(tree[:1])
        finally:
            lazydump.procs.kill_all(lambda: [one.pid for one in procs.tree(process.pid)])
    assert 2 * 64 * MIB < common < 2 * 100 * MIB
    assert alone == 0
