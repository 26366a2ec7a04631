"""`smr check`: what a restore needs of this node, and what an image needs of it; every finding with the way to mend it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum

from smr.proto.checkpoint import CheckpointConfig
from smr.proto.errors import SmrError
from smr.shim import criu, preflight, procs, rootless
from smr.shim.config import Config
from smr.shim.engines import podman
from smr.shim.run import run

_PATH = "{{.Host.OCIRuntime.Path}}"


class Level(StrEnum):
    """An ERROR stops restores; a WARNING stops some."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    code: str
    level: Level
    what: str
    found: str = ""
    needed: str = ""
    fix: str = ""

    def as_json(self) -> dict[str, str]:
        """All members."""
        return {key: str(value) for key, value in asdict(self).items()}


def check_node(config: Config) -> list[Finding]:
    """This node: rights, CRIU, runtime, engines, store, GPUs."""
    looks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _rights,
        lambda: _criu(config),
        lambda: _runtime(config),
        _engines,
        lambda: _store(config),
        _gpus,
    )
    return [finding for look in looks for finding in _whatever_happens(look)]


def _whatever_happens(look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A program that hangs or cannot be run is a finding, and no reason to look no further."""
    try:
        yield from look()
    except SmrError as error:
        yield Finding(code=error.code.value, level=Level.ERROR, what="node", found=error.message, fix=error.hint)


def check_image(config: Config, reference: str) -> list[Finding]:
    """An image against this node; IMAGE_NOT_FOUND is raised, the rest is found."""
    from smr.images.store import Store

    image = Store(config.store).resolve(reference)
    return [*_image_intact(image.check), *_image_host(image.config, config)]


def _rights() -> Iterator[Finding]:
    if reason := rootless.obstacle():
        yield Finding(
            code="root", level=Level.ERROR, what="rights", found=reason, needed="the node's root", fix="run as root (sudo)"
        )
    if not procs.has_capability(procs.CAP_SYS_RESOURCE):
        yield Finding(
            code="cap_sys_resource",
            level=Level.WARNING,
            what="CAP_SYS_RESOURCE",
            found="missing",
            needed="present",
            fix="processes of users other than root can be checkpointed only in a user namespace; "
            "podman needs --ulimit nofile=20000:20000 --ulimit nproc=20000:20000",
        )


def _criu(config: Config) -> Iterator[Finding]:
    try:
        tool = criu.find(config)
    except SmrError as error:
        yield Finding(
            code=error.code.value, level=Level.ERROR, what="CRIU", found=error.message, needed="CRIU 4.1 or newer", fix=error.hint
        )
        return
    yield Finding(code="criu", level=Level.INFO, what="CRIU", found=f"{tool.version_text} at {tool.path}", needed="4.1 or newer")
    try:
        criu.check_sockets(tool)
    except SmrError as error:
        yield Finding(
            code="criu_sockets",
            level=Level.ERROR,
            what="CRIU and this kernel",
            found=error.message,
            needed="CRIU 4.2 or newer",
            fix=error.hint,
        )
    result = run([tool.path, "check"], timeout_s=60, check=False)
    if result.returncode != 0:
        yield Finding(
            code="criu_check",
            level=Level.ERROR,
            what="criu check",
            found=(result.stderr or result.stdout).strip()[-300:],
            needed="Looks good",
            fix="use a newer CRIU (install.sh provides one), or a kernel with CONFIG_CHECKPOINT_RESTORE",
        )


def _runtime(config: Config) -> Iterator[Finding]:
    from smr.shim.real_runtime import real_runtime

    try:
        path = real_runtime(config)
    except SmrError as error:
        yield Finding(
            code=error.code.value, level=Level.ERROR, what="OCI runtime", found="none", needed="runc or crun", fix=error.hint
        )
        return
    version = run([path, "--version"], timeout_s=20, check=False).stdout.splitlines()
    yield Finding(code="runtime", level=Level.INFO, what="OCI runtime", found=f"{path}: {version[0] if version else '?'}")


def _engines() -> Iterator[Finding]:
    """Which engines are there, and whether they know us."""
    if shutil.which(podman.command()[0]) is None:
        yield Finding(code="podman", level=Level.INFO, what="podman", found="not installed")
    else:
        yield from _podman()
    if shutil.which("containerd") is None:
        yield Finding(code="containerd", level=Level.INFO, what="containerd", found="not installed")
    elif shutil.which("containerd-shim-smr-v1") is None:
        yield Finding(
            code="shim",
            level=Level.WARNING,
            what="containerd shim",
            found="containerd-shim-smr-v1 is not on PATH",
            needed="on containerd's PATH",
            fix="run install.sh --engines containerd",
        )


def _podman() -> Iterator[Finding]:
    result = run(
        [*podman.command(), "--runtime", "smr", "info", "--format", "{{.Host.OCIRuntime.Path}}"], timeout_s=60, check=False
    )
    if result.returncode != 0:
        yield Finding(
            code="podman_runtime",
            level=Level.WARNING,
            what="podman runtime smr",
            found=result.stderr.strip()[-200:],
            needed="registered in containers.conf",
            fix="run install.sh --engines podman, or give podman --runtime /path/to/smr-runtime",
        )
    else:
        yield Finding(code="podman_runtime", level=Level.INFO, what="podman runtime smr", found=result.stdout.strip())


def _store(config: Config) -> Iterator[Finding]:
    folder = next(parent for parent in (config.store, *config.store.parents) if parent.exists())
    if not os.access(folder, os.W_OK):
        yield Finding(
            code="store", level=Level.ERROR, what="image store", found=f"{folder} cannot be written", needed="writable",
            fix="set store in /etc/smr/smr.toml",
        )  # fmt: skip
        return
    free = shutil.disk_usage(folder).free
    level = Level.WARNING if free < 1 << 30 else Level.INFO
    yield Finding(code="store", level=level, what="image store", found=f"{config.store}, {free >> 20} MiB free")


def _gpus() -> Iterator[Finding]:
    from smr.shim.check_gpu import node_findings

    yield from node_findings()


def _image_gpus(facts: CheckpointConfig) -> Iterator[Finding]:
    if facts.gpu is not None and facts.gpu.tasks:
        from smr.shim.check_gpu import image_findings

        yield from image_findings(facts.gpu)


def _image_intact(check: object) -> Iterator[Finding]:
    try:
        check()  # type: ignore[operator]  # Image.check
    except SmrError as error:
        yield Finding(
            code=error.code.value, level=Level.ERROR, what="image", found=error.message, needed="all blobs whole", fix=error.hint
        )
    else:
        yield Finding(code="image", level=Level.INFO, what="image", found="all blobs are there, sizes right")


def _image_host(facts: object, config: Config) -> Iterator[Finding]:
    assert isinstance(facts, CheckpointConfig)
    try:
        preflight.check_host(facts)
    except SmrError as error:
        yield Finding(code=error.code.value, level=Level.ERROR, what="CPU", found=error.message, fix=error.hint)
    else:
        yield Finding(code="cpu", level=Level.INFO, what="CPU", found=preflight.cpu_model(), needed=facts.host.cpu_model)
    yield from _versions(facts.host.criu, config)
    if facts.host.kernel.split(".")[:2] != platform.release().split(".")[:2]:
        yield Finding(
            code="kernel", level=Level.INFO, what="kernel", found=platform.release(), needed=f"made on {facts.host.kernel}"
        )
    yield from _image_gpus(facts)
    for destination in facts.external_mounts:
        yield Finding(code="mount", level=Level.INFO, what="mount needed", needed=destination)


def _versions(made_with: str, config: Config) -> Iterator[Finding]:
    try:
        tool = criu.find(config)
    except SmrError:
        return
    needed = tuple(int(part) for part in made_with.split(".") if part.isdigit())
    if needed[:2] > tool.version[:2]:
        yield Finding(
            code="criu_older",
            level=Level.WARNING,
            what="CRIU",
            found=tool.version_text,
            needed=f"{made_with}, with which the image was made",
            fix="install the same or a newer CRIU",
        )
