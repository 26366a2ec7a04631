"""Where messages go: the runtime's --log file as runc writes it, and SMR's own log through structlog.

stdout is never written (it belongs to the shim and hook protocols). structlog takes 58 ms to import, so `canonical_line` is
called after the container was handed over or while CRIU works.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from smr.proto.errors import SmrError
from smr.shim import rootless


def runtime_message(log: Path | None, log_format: str, level: str, message: str) -> None:
    """One entry in the runtime's own log, in the form runc uses, so that engines print it."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    if log_format == "json":
        line = json.dumps({"level": level, "msg": message, "time": now})
    else:
        line = f'time="{now}" level={level} msg={json.dumps(message)}'
    if log is None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201  # runc's own place when no --log is given
        return
    try:
        with log.open("a") as file:
            file.write(line + "\n")
    except OSError:
        print(line, file=sys.stderr, flush=True)  # noqa: T201


def runtime_failure(log: Path | None, log_format: str, error: SmrError) -> None:
    """The error that ends a runtime call: in the log, and on stderr as runc does it."""
    message = f"smr: {error}"
    runtime_message(log, log_format, "error", message)
    if log is not None:
        print(message, file=sys.stderr, flush=True)  # noqa: T201


def canonical_line(log: Path, event: str, **values: object) -> None:
    """Append one event to SMR's log as JSON. A log that cannot be written must not fail a container.

    The lines of several processes do not mix: each is one write to a file opened for appending.
    """
    import structlog

    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            logger = structlog.wrap_logger(
                structlog.WriteLogger(file),
                processors=[structlog.processors.TimeStamper(fmt="iso", utc=True), structlog.processors.JSONRenderer()],
            )
            logger.info(event, **values)
    except OSError as error:
        if not rootless.obstacle():  # else it is not ours to write, and the reason of a failure is to be the last that is read
            print(f"smr: cannot write {log}: {error.strerror}", file=sys.stderr)  # noqa: T201
