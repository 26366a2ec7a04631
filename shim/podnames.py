"""Keys that name a container which a pod does not have: nobody but time tells, for a runtime sees one container after the other.

    RUN/pods/UID.NAMES      JSON, flocked by who changes it: containers seen of the pod, whether somebody waits, the sandbox

The first container that does not complete the names starts a process that waits for the rest, and tells what has not come: in the
log and the journal of events, as a restore that failed. It ends with the pod. Pods without such keys pay nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec
from smr.proto.pod import CONTAINER, NAMED_PREFIX, Pod, pod_of
from smr.shim import config as settings
from smr.shim.config import Config
from smr.shim.events import emit_failure
from smr.shim.pods import sandbox_bundle

_POLL_S = 0.5
_SUFFIX = "NAMES"  # in capitals, so no container's


def note(spec: Spec, bundle: Path, config: Config) -> None:
    """A container of a pod is created. What goes wrong here is nobody's failure."""
    pod = pod_of(spec.annotations)
    wanted = _named(spec.annotations)
    if pod is None or not wanted:
        return
    path = config.run / "pods" / f"{pod.uid.replace('/', '-')}.{_SUFFIX}"
    with contextlib.suppress(OSError, ValueError), _changing(path) as known:
        seen = {*_list(known.get("seen")), pod.container}
        begin = not wanted.keys() <= seen and not known.get("waits")
        known.update(seen=sorted(seen), sandbox=str(sandbox_bundle(bundle, pod)), waits=bool(known.get("waits")) or begin)
        if begin:
            _start(path, pod, spec.annotations)


def main(argv: list[str]) -> int:
    """The waiting process: PATH of the file, ANNOTATIONS of one of the pod's containers."""
    config, path, annotations = settings.load(), Path(argv[0]), json.loads(argv[1])
    wanted, pod = _named(annotations), pod_of(annotations)
    deadline = time.monotonic() + config.pod_names_wait_s
    while pod is not None:
        known = _read(path)
        missing = {name: key for name, key in wanted.items() if name not in _list(known.get("seen"))}
        if not missing or not Path(str(known.get("sandbox", ""))).exists():
            break
        if time.monotonic() > deadline:
            for name, key in missing.items():
                error = _unknown(name, key, pod, _list(known.get("seen")), config)
                emit_failure(config, "restore_failed", pod.sandbox, annotations, error, annotations.get(key, ""))
            break
        time.sleep(_POLL_S)
    return 0


def _unknown(name: str, key: str, pod: Pod, seen: list[str], config: Config) -> SmrError:
    return SmrError(
        f"annotation {key}: pod {pod.name} had no container {name} within {config.pod_names_wait_s:g} s, but {', '.join(seen)}",
        hint="use the name that the container has in the pod's spec",
        code=Code.ANNOTATION_INVALID,
        annotation=key,
    )


def _named(annotations: Mapping[str, str]) -> dict[str, str]:
    """Names of containers that keys give, with the key."""
    found = {key.removeprefix(NAMED_PREFIX): key for key in annotations if key.startswith(NAMED_PREFIX)}
    return found | ({annotations[CONTAINER]: CONTAINER} if annotations.get(CONTAINER) else {})


def _start(path: Path, pod: Pod, annotations: Mapping[str, str]) -> None:
    argv = [sys.executable, "-I", "-m", "smr.shim.podnames", str(path), json.dumps(dict(annotations))]
    null = subprocess.DEVNULL
    with contextlib.suppress(OSError):
        subprocess.Popen(argv, stdin=null, stdout=null, stderr=null, start_new_session=True, cwd="/")


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[dict[str, object]]:
    """The file's document, to be changed in place; alone."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        known = _parse(os.pread(fd, 1 << 20, 0))
        yield known
        data = json.dumps(known).encode()
        os.ftruncate(fd, 0)
        os.pwrite(fd, data, 0)
    finally:
        os.close(fd)


def _read(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH)
            return _parse(file.read())
    except OSError:
        return {}


def _parse(data: bytes) -> dict[str, object]:
    with contextlib.suppress(ValueError):
        if isinstance(found := json.loads(data), dict):
            return found
    return {}


def _list(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
