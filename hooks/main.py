"""smr-hook STAGE: what SMR does in the OCI hooks of podman and CRI-O, for containers whose annotations name `smr.restore`.

    precreate                  spec on stdin, spec on stdout: the prefetch starts; the spec passes unchanged
    prestart, createRuntime    state on stdin: `lo` of a network namespace that CRIU made is set up
    poststop                   state on stdin: what SMR keeps of the container is dropped

A hook must never make a container fail for a reason of ours: it reports on stderr and exits 0, but for a wrong call.
stdout belongs to the protocol.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

from smr.proto.oci import as_object
from smr.shim import config as settings
from smr.shim.config import Config

_Document = dict[str, object]


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    stages: dict[str, Callable[[_Document, Config], None]] = {
        "precreate": precreate,
        "prestart": create_runtime,
        "createRuntime": create_runtime,
        "poststop": poststop,
    }
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or arguments[0] not in stages:
        print(f"usage: smr-hook {'|'.join(stages)} <JSON", file=sys.stderr)  # noqa: T201
        return 2
    text = sys.stdin.buffer.read()
    if arguments[0] == "precreate":
        sys.stdout.buffer.write(text)
        sys.stdout.flush()
    try:
        stages[arguments[0]](as_object(json.loads(text), "standard input"), settings.load())
    except Exception as error:  # noqa: BLE001  # the outermost edge: no reason of ours may fail a container
        print(f"smr-hook {arguments[0]}: {error}", file=sys.stderr)  # noqa: T201
    return 0


def precreate(spec: _Document, config: Config) -> None:
    """The first sight of the annotation under podman: read the image's pages ahead while the container is set up."""
    from smr.proto.annotations import parse
    from smr.proto.oci import parse_spec
    from smr.shim.containerd_shim import start_prefetch_of

    annotations = parse(parse_spec(spec).annotations)
    if annotations is not None:
        start_prefetch_of(config, annotations.restore)


def create_runtime(state: _Document, config: Config) -> None:
    """Set `lo` up before hooks of others look at the namespace; the runtime does the same where no hook is configured."""
    from smr.shim.network import loopback_up

    pid = state.get("pid")
    own = Path("/proc/self/ns/net").stat().st_ino
    namespace = Path(f"/proc/{pid}/ns/net")
    if isinstance(pid, int) and pid > 0 and namespace.stat().st_ino != own:
        loopback_up(namespace)


def poststop(state: _Document, config: Config) -> None:
    """Drop the record of a container that was deleted past smr-runtime.

    Where `delete`, or the undo of a create, runs the real runtime's delete and so this hook, it holds the record's lock and
    needs the record still: then there is nothing to do here, and waiting would be for ever.
    """
    from smr.proto.errors import SmrError
    from smr.shim.state import Status, all_states

    for known in all_states(config.run):
        if known.record.id == state.get("id") and known.record.bundle == state.get("bundle"):
            with contextlib.suppress(SmrError), known.locked(wait=False):
                if known.record.status not in {Status.RESTORING, Status.FAILED}:
                    known.remove()


if __name__ == "__main__":
    sys.exit(main())
