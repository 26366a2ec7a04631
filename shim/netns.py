"""The network namespace that a container is restored into, made ready before CRIU restores a socket.

    host    the spec names none: nothing to do
    given   the spec has its path (podman, CRI, a pod, CNI): it is used as it is, with `lo` up
    own     the spec wants a new one: made here, so that `lo` is up and hooks can connect it before sockets are bound; the runtime
            finds it as a path in the spec
    late    a new one inside a new user namespace, which only CRIU can make; its engine connects it after create

A namespace of ours is held by a descriptor, and by a process where hooks need a pid. The path that the runtime is given is a
symbolic link in the container's record, because runc looks there again at each checkpoint:

    state.path/netns    during create to /proc/SMR/fd/N, from then on to /proc/PID/ns/net of the container

Nothing is mounted, so nothing is left when the container goes. `config.json` of the bundle is edited only while the runtime
restores. The spec's `net.*` sysctls are set here too: a runtime sets them on
create alone, CRIU restores none, and some count for listen(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from smr.images import criu_netns
from smr.images.image import Image
from smr.proto.annotations import Annotations
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec, as_list, as_object
from smr.shim import network, oci_hooks
from smr.shim.files import write_atomic
from smr.shim.oci_hooks import Hook
from smr.shim.state import ContainerState

_CLONE_NEWNS, _CLONE_NEWNET = 0x20000, 0x40000000
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18
_SYSCTL = "net."
# Where nerdctl's hook is told to put the container's pid.
_PID_FILE = "nerdctl/pid-file"
_T = TypeVar("_T")


class Kind(StrEnum):
    """Where the namespace comes from."""

    HOST = "host"
    GIVEN = "given"
    OWN = "own"
    LATE = "late"


def kind_of(spec: Spec) -> Kind:
    """What a spec asks for."""
    if "network" not in spec.namespaces:
        return Kind.HOST
    if spec.namespaces["network"]:
        return Kind.GIVEN
    return Kind.LATE if "user" in spec.namespaces and not spec.namespaces["user"] else Kind.OWN


@dataclass(slots=True, kw_only=True)
class Network:
    """The namespace of one restore. `path` is good while the restore goes on; None where there is no namespace yet (late)."""

    kind: Kind
    path: Path | None
    spec: Spec
    state: ContainerState
    holder: subprocess.Popen[bytes] | None = None
    hooks_run: list[Hook] = field(default_factory=list)

    @property
    def link(self) -> Path:
        """What the runtime is given as the path of a namespace of ours."""
        return self.state.path / "netns"

    @property
    def there(self) -> Spec:
        """The new container's spec with a path for its network namespace, where there is one already."""
        if self.path is None or self.kind is not Kind.OWN:
            return self.spec
        return replace(self.spec, namespaces={**self.spec.namespaces, "network": str(self.path)})

    @contextlib.contextmanager
    def in_spec(self) -> Iterator[None]:
        """The bundle's spec as the runtime's restore needs it: our namespace, and without hooks that have run."""
        path = Path(self.state.record.bundle) / "config.json"
        before = path.read_bytes()
        edited = self._edited(json.loads(before))
        if edited is None:
            yield
            return
        if not self.state.record.undo_spec:
            shutil.copyfile(path, self.state.spec_backup)
            self.state.record.undo_spec = True
            self.state.save()
        mode = path.stat().st_mode & 0o777
        write_atomic(path, json.dumps(edited).encode(), mode=mode, durable=False)
        yield  # when the restore fails, undo puts back the engine's
        write_atomic(path, before, mode=mode, durable=False)

    @property
    def connected_later(self) -> bool:
        """Whether the engine connects the namespace after create: nothing is in it but `lo`, and nobody was asked for more."""
        return self.kind is Kind.LATE or (self.kind is Kind.OWN and self.holder is None)

    def fit_images(self, image: Image, annotations: Annotations) -> None:
        """CRIU's directory says where the namespace comes from, and its sockets are bound to what is there."""
        config, folder = image.config, self.state.criu_dir
        if self.kind is not Kind.HOST:
            fit = criu_netns.make_inside if self.kind is Kind.LATE else criu_netns.take_from_outside
            fit(folder, config.tasks[0].pid if config.tasks else 1)
        if config.bound_addresses or config.bound_devices or config.peers:
            from smr.shim.addresses import fit_sockets

            self.state.record.warnings += fit_sockets(
                folder, config, self.path, annotations.addresses, connected_later=self.connected_later
            )

    def hand_over(self, pid: int) -> None:
        """The namespace is the restored process's from here on."""
        if self.kind is Kind.OWN:
            _replace_link(self.link, f"/proc/{pid}/ns/net")
            self.path = Path(f"/proc/{pid}/ns/net")
        if self.holder is not None:
            _correct_pid_file(self.spec, self.holder.pid, pid)

    def _edited(self, document: dict[str, object]) -> dict[str, object] | None:
        """The spec's document for the runtime; None where it needs no edit."""
        if self.kind is Kind.LATE and _runs_hooks(self.state):
            return _with_hook(document, _loopback_hook())
        if self.kind is not Kind.OWN and not self.hooks_run:
            return None
        edited = _without_hooks(document, self.hooks_run)
        return _with_path(edited, self.link) if self.kind is Kind.OWN else edited


@contextlib.contextmanager
def ready(spec: Spec, state: ContainerState) -> Iterator[Network]:
    """The namespace for a restore: made where the spec wants one, `lo` up, connected by the spec's hooks, its sysctls set.

    Raises NETWORK_FAILED, HOOK_FAILED. What hooks did stays, and is in the record (`undo_hooks`).
    """
    kind = kind_of(spec)
    given = spec.namespaces.get("network", "")
    path = {Kind.HOST: Path("/proc/self/ns/net"), Kind.GIVEN: Path(given)}.get(kind)
    with contextlib.ExitStack() as stack:
        if kind is Kind.OWN:
            fd = _new_namespace()
            stack.callback(os.close, fd)
            path = Path(f"/proc/{os.getpid()}/fd/{fd}")
        found = Network(kind=kind, path=path, spec=spec, state=state)
        if kind is Kind.OWN:
            _replace_link(found.link, str(path))
        elif kind is Kind.GIVEN:
            network.loopback_up(Path(given))
        if path is not None and kind is not Kind.HOST:
            _run_hooks(found, stack)
            _set_sysctls(spec, path)
        yield found


def _run_hooks(found: Network, stack: contextlib.ExitStack) -> None:
    """The hooks that may connect the namespace; also those of a given one, where the runtime would run none."""
    if found.kind is Kind.GIVEN and _runs_hooks(found.state):
        return
    wanted = [hook for hook in oci_hooks.hooks(found.spec.document, *oci_hooks.BEFORE) if not hook.of_container]
    if not wanted or found.path is None:
        return
    found.holder = stack.enter_context(_holder(found.path))
    again = oci_hooks.run_before(found.state, wanted, found.spec.document, found.holder.pid)
    found.hooks_run = [hook for hook in wanted if hook not in again]


def _runs_hooks(state: ContainerState) -> bool:
    """Whether the runtime runs hooks on restore: crun does not."""
    return "crun" not in Path(state.record.runtime).name


def _new_namespace() -> int:
    """A descriptor of a new network namespace with `lo` up."""

    def make(libc: ctypes.CDLL) -> int:
        _checked(libc.unshare(_CLONE_NEWNET))
        network.set_loopback_up()
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    return _in_thread(make)


@contextlib.contextmanager
def _holder(namespace: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the namespace, with a copy of our mounts, apart from then on both ways. It ends with us, by kill -9 too."""

    def make(libc: ctypes.CDLL) -> subprocess.Popen[bytes]:
        fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _checked(libc.setns(fd, _CLONE_NEWNET))
        finally:
            os.close(fd)
        _checked(libc.unshare(_CLONE_NEWNS))
        _checked(libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None))
        null = subprocess.DEVNULL
        # It waits for the end of its input, which comes when the last descriptor of our side is closed.
        return subprocess.Popen(["/bin/sh", "-c", "read -r _"], stdin=subprocess.PIPE, stdout=null, stderr=null, cwd="/")

    process = _in_thread(make)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _in_thread(action: Callable[[ctypes.CDLL], _T]) -> _T:
    """Run what changes a thread's namespaces in a thread that ends with it."""
    result: list[_T] = []
    failure: list[OSError] = []

    def work() -> None:
        try:
            result.append(action(ctypes.CDLL(None, use_errno=True)))
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="smr-netns")
    thread.start()
    thread.join()
    if failure:
        raise SmrError(f"cannot make a network namespace: {failure[0].strerror}", code=Code.NETWORK_FAILED) from failure[0]
    return result[0]


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _set_sysctls(spec: Spec, namespace: Path) -> None:
    """Before listen(2), which `net.core.somaxconn` limits. What cannot be set is told by `smr.shim.identity`, which tries too."""
    linux = as_object(spec.document.get("linux"), "linux")
    wanted = {key: str(value) for key, value in as_object(linux.get("sysctl"), "linux.sysctl").items() if key.startswith(_SYSCTL)}
    if not wanted:
        return

    def write() -> None:
        for key, value in wanted.items():
            # A key's dots are slashes, and the other way about, as for sysctl(8): names of interfaces may have dots.
            name = key.translate(str.maketrans("./", "/.")) if "/" not in key.partition(".")[0] else key
            if ".." not in name.split("/"):
                with contextlib.suppress(OSError):
                    (Path("/proc/sys") / name).write_text(value)

    network.in_namespace(namespace, write)


def _replace_link(link: Path, target: str) -> None:
    temporary = link.with_name(f"{link.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.rename(link)


def _with_path(document: Mapping[str, object], path: Path) -> dict[str, object]:
    linux = as_object(document.get("linux"), "linux")
    entries = [as_object(entry, "linux.namespaces[]") for entry in as_list(linux.get("namespaces"), "linux.namespaces")]
    edited = [{**entry, "path": str(path)} if entry.get("type") == "network" else entry for entry in entries]
    return {**document, "linux": {**linux, "namespaces": edited}}


def _without_hooks(document: Mapping[str, object], gone: list[Hook]) -> dict[str, object]:
    table = dict(as_object(document.get("hooks"), "hooks"))
    for stage in oci_hooks.BEFORE:
        done = [hook.raw for hook in gone if hook.stage == stage]
        if done:
            table[stage] = [entry for entry in as_list(table.get(stage), stage) if entry not in done]
    return {**document, "hooks": table} if table else dict(document)


def _with_hook(document: Mapping[str, object], hook: Mapping[str, object]) -> dict[str, object]:
    table = as_object(document.get("hooks"), "hooks")
    stage = "createRuntime"
    return {**document, "hooks": {**table, stage: [hook, *as_list(table.get(stage), stage)]}}


def _loopback_hook() -> dict[str, object]:
    """`lo` up in a namespace that only CRIU can make, when it has made it."""
    argv = [sys.executable, "-I", "-m", "smr.hooks.main", "createRuntime"]
    environment = [f"{key}={value}" for key, value in os.environ.items() if key == "PATH" or key.startswith("SMR_")]
    return {"path": sys.executable, "args": argv, "env": environment}


def _correct_pid_file(spec: Spec, holder: int, pid: int) -> None:
    """nerdctl's hook has written the pid that it was told, the holder's, where its user looks for the container's."""
    name = spec.annotations.get(_PID_FILE, "")
    if not name:
        return
    file = Path(name)
    with contextlib.suppress(OSError):
        if file.read_text().strip() == str(holder):
            write_atomic(file, str(pid).encode(), mode=0o644, durable=False)
