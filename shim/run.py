"""The one way to run another program: argument list, timeout, scrubbed environment, the end of stderr in the error.

Nothing is inherited by accident: stdin is empty unless `input_text` is given, descriptors are named. Programs that are killed
by the timeout are reaped. For engines and runtimes that must keep the caller's stdio, `smr.shim.runtime` calls subprocess
itself and says why.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from smr.proto.errors import Code, SmrError

# What a child may need from our environment; NOTIFY_SOCKET, LD_PRELOAD and the like never travel.
_KEEP = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "XDG_RUNTIME_DIR", "CONTAINERD_ADDRESS", "CONTAINERD_NAMESPACE")
_KEEP_PREFIXES = ("SMR_", "CONTAINERS_")
_TAIL_BYTES = 2000


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Our environment reduced to what programs need, plus `extra`."""
    kept = {key: value for key, value in os.environ.items() if key in _KEEP or key.startswith(_KEEP_PREFIXES)}
    kept.setdefault("PATH", os.defpath)
    return kept | dict(extra or {})


def run(
    argv: Sequence[str | Path],
    *,
    timeout_s: float = 60.0,
    env: Mapping[str, str] | None = None,
    input_text: str | None = None,
    cwd: Path | None = None,
    code: Code = Code.INTERNAL,
    missing_code: Code | None = None,
    check: bool = True,
    pass_fds: Sequence[int] = (),
) -> subprocess.CompletedProcess[str]:
    """Run `argv` to its end and return its result with stdout and stderr as text.

    Raises SmrError `missing_code` (else `code`) when the program is not there, TIMEOUT, or `code` for an exit status
    other than 0 when `check`, with the end of stderr.
    """
    words = [str(word) for word in argv]
    try:
        result = subprocess.run(
            words,
            input=input_text or "",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            env=environment(env),
            cwd=cwd,
            pass_fds=pass_fds,
        )
    except OSError as error:
        raise SmrError(f"cannot run {words[0]}: {error.strerror}", code=missing_code or code, program=words[0]) from error
    except subprocess.TimeoutExpired as error:
        raise SmrError(f"'{' '.join(words)}' did not end within {timeout_s:g} s", code=Code.TIMEOUT) from error
    if check and result.returncode != 0:
        raise SmrError(
            f"'{' '.join(words)}' failed with exit status {result.returncode}: {tail(result.stderr or result.stdout)}",
            code=code,
            status=result.returncode,
        )
    return result


def tail(text: str) -> str:
    """The end of a program's output, at most 2000 characters, stripped."""
    return text.strip()[-_TAIL_BYTES:]
