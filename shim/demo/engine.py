"""podman and containerd as the demo uses them: the stock programs, with storage, state and configuration in the demo's folder.

The user's own engines are not touched: their containers, images, networks and configuration are not even seen. SMR's store
and state lie in the demo's folder too. Containers share the machine's network, which needs least.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from smr.proto.errors import Code, SmrError
from smr.shim import procs
from smr.shim.config import Config
from smr.shim.run import environment, run, tail

_START_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """The demo's folder on disk, and the SMR that is shown: `bin` holds smr, smr-runtime and the shims."""

    base: Path
    bin: Path
    criu: str
    runtime: str

    @classmethod
    def of(cls, base: Path, config: Config) -> Node:
        """This SMR with its configured CRIU and runtime. Raises CRIU_MISSING, CRIU_TOO_OLD or RUNTIME_MISSING."""
        from smr.shim import criu
        from smr.shim.real_runtime import real_runtime

        programs = Path(sys.executable).parent
        for name in ("smr", "smr-runtime", "containerd-shim-smr-v2"):
            if not (programs / name).exists():
                raise SmrError(
                    f"{name} is not beside {sys.executable}", hint="run dev/demo, or install.sh", code=Code.RUNTIME_MISSING
                )
        return cls(base=base, bin=programs, criu=str(criu.find(config).path), runtime=real_runtime(config))

    @property
    def env(self) -> dict[str, str]:
        """What turns SMR's programs to the demo's store and state, and lets engines find them."""
        return {
            "PATH": f"{self.bin}:{os.environ.get('PATH', os.defpath)}",
            "SMR_STORE": str(self.base / "store"),
            "SMR_RUN": str(self.base / "run"),
            "SMR_LOG": str(self.base / "smr.log"),
            "SMR_CRIU": self.criu,
            "SMR_RUNTIME": self.runtime,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One container to start: `root` is its root directory, `volumes` are seen in it read-only under their own paths."""

    name: str
    root: Path
    command: tuple[str, ...]
    pid_file: Path
    volumes: tuple[Path, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)
    runtime: str = "smr"


class Engine(Protocol):
    """One engine. `open` makes it ready and ends it; `packages` are Debian's that bring it."""

    name: ClassVar[str]
    programs: ClassVar[tuple[str, ...]]
    packages: ClassVar[str]

    @property
    def env(self) -> dict[str, str]:
        """Environment in which the engine, its client and `smr` find each other."""

    def open(self) -> contextlib.AbstractContextManager[None]:
        """Make the engine ready; nothing of it is left afterwards."""

    def run_argv(self, start: Start) -> list[str]:
        """The command that starts a container in the background."""

    def remove(self, name: str) -> None:
        """End and forget a container; no error when there is none."""

    def logs(self, name: str) -> str:
        """What the container has written."""


def missing(kind: type[Engine]) -> str:
    """Why an engine is not there and what would be installed; empty when it is."""
    lacking = [name for name in kind.programs if shutil.which(name) is None]
    if not lacking:
        return ""
    return f"{' and '.join(lacking)} not found; would install: apt-get install {kind.packages}"


class Podman:
    """podman; configured by containers.conf and storage.conf of its own, so that `smr` finds its containers as well."""

    name: ClassVar[str] = "podman"
    programs: ClassVar[tuple[str, ...]] = ("podman", "conmon")
    packages: ClassVar[str] = "podman conmon"

    def __init__(self, node: Node) -> None:
        self._node = node
        self._base = node.base / "podman"

    @property
    def env(self) -> dict[str, str]:
        """See `Engine.env`."""
        files = {name: str(self._base / f"{name}.conf") for name in ("containers", "storage")}
        return {**self._node.env, "CONTAINERS_CONF": files["containers"], "CONTAINERS_STORAGE_CONF": files["storage"]}

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """See `Engine.open`."""
        (self._base / "tmp").mkdir(parents=True)
        (self._base / "containers.conf").write_text(podman_conf(self._base, self._node))
        runtime = self._base / "smr-runtime"
        runtime.write_text(runtime_script(self._node))
        runtime.chmod(0o755)
        (self._base / "storage.conf").write_text(
            f'[storage]\ndriver = "vfs"\ngraphroot = "{self._base}/storage"\nrunroot = "{self._base}/runroot"\n'
        )
        yield

    def run_argv(self, start: Start) -> list[str]:
        """See `Engine.run_argv`."""
        words = ["podman", "run", "--detach", f"--name={start.name}", f"--runtime={start.runtime}", "--network=host"]
        words += [f"--pidfile={start.pid_file}"]
        words += [f"--annotation={key}={value}" for key, value in start.annotations.items()]
        words += [f"--volume={path}:{path}:ro" for path in start.volumes]
        return [*words, "--rootfs", str(start.root), *start.command]

    def remove(self, name: str) -> None:
        """See `Engine.remove`."""
        run(["podman", "rm", "--force", "--ignore", "--time=0", name], env=self.env, check=False)

    def logs(self, name: str) -> str:
        """See `Engine.logs`."""
        done = run(["podman", "logs", name], env=self.env, check=False)
        return done.stdout + done.stderr


def podman_conf(base: Path, node: Node) -> str:
    """containers.conf of a podman that keeps everything in `base`, with smr-runtime as BASE/smr-runtime."""
    systemd = Path("/run/systemd/system").is_dir()
    ulimits = "" if procs.has_capability(procs.CAP_SYS_RESOURCE) else f"default_ulimits = [{_own_limits()}]\n"
    return (
        f'[containers]\nlog_driver = "k8s-file"\n{ulimits}'
        f'[engine]\ncgroup_manager = "{"systemd" if systemd else "cgroupfs"}"\nevents_logger = "file"\nlock_type = "file"\n'
        f'static_dir = "{base}/libpod"\ntmp_dir = "{base}/tmp"\nvolume_path = "{base}/volumes"\n'
        f'runtime = "smr"\nruntime_supports_json = ["smr", "stock"]\n'
        f'[engine.runtimes]\nsmr = ["{base}/smr-runtime"]\nstock = ["{node.runtime}"]\n'
        f'[network]\nnetwork_config_dir = "{base}/networks"\n'
    )


def runtime_script(node: Node) -> str:
    """smr-runtime with the demo's settings: podman and conmon give a runtime almost nothing of their environment."""
    from shlex import quote

    lines = [f"export {key}={quote(value)}" for key, value in node.env.items()]
    return "\n".join(["#!/bin/sh", *lines, f'exec {quote(str(node.bin / "smr-runtime"))} "$@"', ""])


def _own_limits() -> str:
    """Limits no higher than ours, as containers.conf has them."""
    values = []
    for name, number in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC)):
        hard = resource.getrlimit(number)[1]
        value = 20000 if hard == resource.RLIM_INFINITY else min(hard, 20000)
        values.append(f'"{name}={value}:{value}"')
    return ", ".join(values)


class Containerd:
    """containerd with `ctr`: a daemon of the demo's own, whether the machine runs another or not."""

    name: ClassVar[str] = "containerd"
    programs: ClassVar[tuple[str, ...]] = ("containerd", "ctr", "containerd-shim-runc-v2")
    packages: ClassVar[str] = "containerd runc"

    def __init__(self, node: Node) -> None:
        self._node = node
        self._base = node.base / "containerd"
        self._socket = self._base / "state/containerd.sock"

    @property
    def env(self) -> dict[str, str]:
        """See `Engine.env`."""
        namespace = f"smr-demo-{os.getpid()}"
        return {**self._node.env, "CONTAINERD_ADDRESS": str(self._socket), "CONTAINERD_NAMESPACE": namespace}

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """See `Engine.open`. The daemon has a session of its own: Ctrl-C must leave it able to end its containers."""
        self._base.mkdir(parents=True)
        config, log = self._base / "config.toml", self._base / "containerd.log"
        config.write_text(containerd_conf(self._base))
        with log.open("wb") as output:
            daemon = subprocess.Popen(
                ["containerd", "--config", str(config), "--log-level", "warn"],
                env=environment(self.env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            self._wait(daemon, log)
            yield
        finally:
            _end(daemon)

    def _wait(self, daemon: subprocess.Popen[bytes], log: Path) -> None:
        deadline = time.monotonic() + _START_S
        while self._ctr("version", check=False, timeout_s=10).returncode != 0:
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise SmrError(f"containerd does not start: {tail(log.read_text(errors='replace'))}", code=Code.ENGINE_FAILED)
            time.sleep(0.1)

    def run_argv(self, start: Start) -> list[str]:
        """See `Engine.run_argv`."""
        words = ["ctr", "run", "--detach", "--net-host", "--rootfs", f"--pid-file={start.pid_file}"]
        words += [f"--runtime=io.containerd.{'smr' if start.runtime == 'smr' else 'runc'}.v2"]
        words += [f"--log-uri=file://{self._log(start.name)}"]
        words += [f"--annotation={key}={value}" for key, value in start.annotations.items()]
        words += [f"--mount=type=bind,src={path},dst={path},options=rbind:ro" for path in start.volumes]
        return [*words, str(start.root), start.name, *start.command]

    def remove(self, name: str) -> None:
        """See `Engine.remove`."""
        self._ctr("task", "rm", "--force", name, check=False)
        self._ctr("container", "rm", name, check=False)

    def logs(self, name: str) -> str:
        """See `Engine.logs`."""
        try:
            return self._log(name).read_text(errors="replace")
        except OSError:
            return ""

    def _log(self, name: str) -> Path:
        return self._base / f"{name}.log"

    def _ctr(self, *words: str, check: bool = True, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        return run(["ctr", *words], env=self.env, check=check, timeout_s=timeout_s, code=Code.ENGINE_FAILED)


def containerd_conf(base: Path) -> str:
    """config.toml of a containerd that keeps everything in `base` and serves `ctr` alone; for versions 1.6 to 2.x."""
    disabled = ", ".join(
        f'"io.containerd.{plugin}"' for plugin in ("grpc.v1.cri", "cri.v1.images", "cri.v1.runtime", "nri.v1.nri")
    )
    return (
        f'version = 2\nroot = "{base}/root"\nstate = "{base}/state"\ndisabled_plugins = [{disabled}]\n'
        f'[grpc]\naddress = "{base}/state/containerd.sock"\n'
        f'[plugins."io.containerd.internal.v1.opt"]\npath = "{base}/opt"\n'
    )


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.send_signal(signal.SIGTERM)
    try:
        daemon.wait(15)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


ENGINES: tuple[type[Podman] | type[Containerd], ...] = (Podman, Containerd)
