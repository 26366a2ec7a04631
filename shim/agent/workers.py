"""Runs `smr.shim.agent.work`, and hears what it says.

When the caller goes away (its call is cancelled) the work is ended and takes back what it did. When the agent ends it goes on:
an agent that is restarted loses no checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Awaitable, Callable, Mapping

from smr.proto.errors import Code, SmrError

# Pins of many images, prefetches of a rollout: more at a time would not be quicker. The others wait.
_AT_A_TIME = 8
_LINE_BYTES = 1 << 20
Told = Callable[[str], Awaitable[object]]


async def _nothing(stage: str) -> None:
    pass


class Workers:
    """All work of one agent. Set `ending` when the agent ends, before calls are cancelled."""

    def __init__(self) -> None:
        self.ending = False
        self._places = asyncio.Semaphore(_AT_A_TIME)

    async def run(self, verb: str, request: Mapping[str, object], told: Told = _nothing) -> dict[str, object]:
        """Do `verb` and return its result; `told` is called with each stage. Raises the SmrError that the work ended with."""
        argv = [sys.executable, "-I", "-m", "smr.shim.agent.work", verb, json.dumps(dict(request))]
        null = asyncio.subprocess.DEVNULL
        async with self._places:
            process = await asyncio.create_subprocess_exec(
                *argv, stdin=null, stdout=asyncio.subprocess.PIPE, stderr=null, limit=_LINE_BYTES, start_new_session=True
            )
            try:
                return await _hear(process, verb, told)
            finally:
                if process.returncode is None and not self.ending:
                    with contextlib.suppress(ProcessLookupError):
                        process.terminate()
                    await process.wait()


async def _hear(process: asyncio.subprocess.Process, verb: str, told: Told) -> dict[str, object]:
    assert process.stdout is not None
    async for line in process.stdout:
        said = json.loads(line)
        if "stage" in said:
            await told(str(said["stage"]))
            continue
        await process.wait()
        if "error" in said:
            raise error_of(said["error"])
        return dict(said["result"])
    status = await process.wait()
    raise SmrError(f"the process of this {verb} ended with status {status}, and without a word", code=Code.INTERNAL)


def error_of(document: Mapping[str, object]) -> SmrError:
    """The error that another process has printed as JSON."""
    try:
        code = Code(str(document.get("code")))
    except ValueError:
        code = Code.INTERNAL
    return SmrError(str(document.get("message", "")), hint=str(document.get("hint", "")), code=code)
