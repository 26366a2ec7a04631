"""One prefetch, pin or checkpoint for the agent, in a process of its own: `python -I -m smr.shim.agent.work VERB REQUEST`.

REQUEST is JSON, the members of the call's message. Standard output has a line of JSON for each stage as it begins, {"stage": ..},
and then {"result": ..} or {"error": ..}. Nobody needs to read it: when the agent has gone the work is done all the same, as a
command's would be. SIGTERM takes it back, as Ctrl-C does a command. It leaves the agent's cgroup, so that a service that is
stopped, or a pod that is deleted, does not kill a checkpoint in the middle; and so that images are not charged to the agent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from types import FrameType

from smr.images.charge import leave_cgroup
from smr.images.image import Image
from smr.images.store import Store
from smr.proto.errors import Code, SmrError, exit_status
from smr.shim import config as settings
from smr.shim.config import Config

_Request = Mapping[str, object]


def main(argv: list[str]) -> int:
    """Do one thing. Exit status as the `smr` command's."""
    verbs: dict[str, Callable[[_Request, Config], dict[str, object]]] = {
        "prefetch": prefetch,
        "pin": pin,
        "checkpoint": checkpoint,
    }
    _end_as_interrupted()
    leave_cgroup(whole=True)
    try:
        _say({"result": verbs[argv[0]](json.loads(argv[1]), settings.load())})
    except SmrError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return _fail(SmrError("interrupted; what was done is taken back", code=Code.INTERNAL))
    except Exception as error:  # noqa: BLE001  # the outermost edge: the client must see a sentence
        return _fail(SmrError(f"internal error in {argv[0]}: {error!r}"))
    return 0


def prefetch(request: _Request, config: Config) -> dict[str, object]:
    """As `smr prefetch`."""
    from smr.images.prefetch import prefetch as read_ahead

    image = _image(request, config)
    return {"digest": image.digest, **asdict(read_ahead(image, share=config.cache_share))}


def pin(request: _Request, config: Config) -> dict[str, object]:
    """As `smr pin`."""
    from smr.images.pin import pin as keep

    image = _image(request, config)
    return asdict(keep(config.run, Store(config.store), image, share=config.cache_share))


def checkpoint(request: _Request, config: Config) -> dict[str, object]:
    """As `smr checkpoint`."""
    from smr.proto.annotations import Tcp
    from smr.shim import checkpoint as work
    from smr.shim.engines import locate
    from smr.shim.hold import hooks_of
    from smr.shim.real_runtime import real_runtime

    def text(name: str) -> str:
        return str(request.get(name) or "")

    container, timeout_s = text("container"), request.get("hook_timeout_s")
    target = locate.find(container, engine=text("engine") or "auto", runtime=real_runtime(config), root=text("root"))
    hooks = hooks_of(target, text("quiesce"), text("resume"), float(timeout_s) if isinstance(timeout_s, int | float) else 0.0)
    result = work.checkpoint(
        target,
        text("image"),
        config,
        tcp=Tcp(text("tcp") or "close"),
        stop=bool(request.get("stop")),
        compress=bool(request.get("compress")),
        hooks=hooks,
        progress=lambda stage: _say({"stage": stage}),
    )
    return {
        "image": result.image.reference,
        "digest": result.image.digest,
        "size_bytes": result.image.size_bytes,
        "engine": target.engine.value,
        "container": target.id,
        "pause_s": result.pause_s,
        "stages_s": result.stages_s,
        "warnings": list(result.warnings),
    }


def _image(request: _Request, config: Config) -> Image:
    return Store(config.store).resolve(str(request["image"]))


def _end_as_interrupted() -> None:
    """The first signal ends the work as Ctrl-C would; the next does not end what takes it back."""
    ended: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        ended.append(number)
        if len(ended) == 1:
            raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, end)


def _fail(error: SmrError) -> int:
    _say({"error": error.as_json()})
    return exit_status(error.code)


def _say(value: Mapping[str, object]) -> None:
    """In one piece. That nobody reads any more is no reason to stop."""
    with suppress(BrokenPipeError):
        os.write(1, json.dumps(value, default=str).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
