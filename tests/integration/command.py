"""Run a program, keep its output, fail with all of it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")
Done = subprocess.CompletedProcess[str]


def run(
    argv: Sequence[object],
    *,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    input: str | None = None,
    timeout_s: float = 90,
) -> Done:
    """Run to the end with text output; AssertionError with stdout and stderr when it fails and `check`."""
    words = [str(word) for word in argv]
    done = subprocess.run(
        words, check=False, env=env, capture_output=True, text=True, errors="replace", input=input or "", timeout=timeout_s
    )
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(words)}\nexit status {done.returncode}\nstdout: {done.stdout}\nstderr: {done.stderr}")
    return done


def eventually(probe: Callable[[], T], *, timeout_s: float = 20, what: str = "") -> T:
    """Call `probe` until it returns something true and raises nothing; AssertionError with the last answer in the end."""
    deadline = time.monotonic() + timeout_s
    last: object = None
    while True:
        try:
            answer = probe()
            if answer:
                return answer
            last = answer
        except (AssertionError, OSError, LookupError, ValueError) as error:
            last = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what or probe}; last: {last}")
        time.sleep(0.05)
