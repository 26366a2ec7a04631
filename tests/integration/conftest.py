"""Fixtures of the integration tests. Each probes by doing what the tests will do, and skips with what it saw.

`podman`, `containerd` (1.6 and 2.x), `runc` (old and new) and `crun` are real ones in a sandbox (sandbox.py), each with an SMR of
its own (node.py). `engine` is any of the first three. After every test all containers are removed, and then nothing may be left:
the autouse fixture `leaks` fails the test otherwise.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from smr.shim.criu import quote_log
from smr.shim.register.containerd_dump import version as containerd_version
from tests.integration import testimage
from tests.integration.command import eventually, run
from tests.integration.containerd import Containerd
from tests.integration.cri import NEEDED, PLUGINS, Cri
from tests.integration.node import REPOSITORY, Node
from tests.integration.podman import Podman
from tests.integration.runc import Runc
from tests.integration.sandbox import Sandbox, sandbox

Engine = Podman | Containerd
_HERE = Path(__file__).parent
_started: list[Podman | Containerd | Runc] = []
_boxes: list[Sandbox] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker("engine")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(180))


def boxes() -> list[Sandbox]:
    """The sandbox, once there is one."""
    return list(_boxes)


@pytest.fixture(scope="session")
def engines() -> Path:
    """Where `dev/provision` has unpacked the newer programs and the packages of the test image."""
    return Path(os.environ.get("SMR_ENGINES", REPOSITORY / ".work/engines"))


@pytest.fixture(scope="session")
def image_archive(engines: Path) -> Path:
    """OCI archive of the test image."""
    try:
        return testimage.archive(engines)
    except LookupError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def box() -> Iterator[Sandbox]:
    """The sandbox; the test process stays in it."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    try:
        manager = sandbox()
        here = manager.__enter__()
    except (OSError, AssertionError) as error:
        pytest.skip(f"no mount namespace of our own: {error}")
    _boxes.append(here)
    try:
        yield here
    finally:
        _boxes.remove(here)
        manager.__exit__(None, None, None)


@pytest.fixture(scope="session")
def criu(engines: Path) -> Path:
    """A CRIU that works on this kernel: SMR_TEST_CRIU, or one that dev/provision has unpacked."""
    if "SMR_TEST_CRIU" in os.environ:
        return _working_criu(Path(os.environ["SMR_TEST_CRIU"]))
    return _working_criu(engines / ("criu/bin/criu" if _old_socket_options() else "criu-new/bin/criu"))


def _old_socket_options() -> bool:
    """Since Linux 6.16 SO_PASSCRED is an error on sockets that are not unix ones, and CRIU before 4.2 dumps none of them."""
    with socket.socket() as inet:
        try:
            inet.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
        except OSError:
            return False
    return True


@pytest.fixture(scope="session")
def newer_criu(engines: Path) -> Path:
    """A second, newer CRIU."""
    return _working_criu(engines / "criu-new/bin/criu")


def _working_criu(path: Path) -> Path:
    try:
        done = run([path, "check"], check=False, timeout_s=30)
    except OSError as error:
        pytest.skip(f"no CRIU: {path}: {error.strerror}; run dev/provision")
    if done.returncode != 0:
        pytest.skip(f"CRIU does not work here: {path} check: {done.stderr.strip()}")
    return path


@pytest.fixture(scope="session")
def nodes(box: Sandbox, criu: Path) -> Callable[[str, Path], Node]:
    """Make an SMR of its own in front of a runtime."""

    def make(name: str, runtime: Path) -> Node:
        return Node(box.base / f"node-{name}", runtime=runtime, criu=criu, search=os.environ["PATH"])

    return make


@pytest.fixture(scope="session")
def runtimes(engines: Path) -> dict[str, Path]:
    """Paths of the real runtimes that are here: runc old and new, crun."""
    found = {name: Path(path) for name in ("runc", "crun") if (path := shutil.which(name, path=_plain_path()))}
    for name in ("runc", "crun"):
        if (engines / f"{name}-new/bin/{name}").exists():
            found[f"{name}-new"] = engines / f"{name}-new/bin/{name}"
    return found


def _plain_path() -> str:
    return "/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Machine:
    """What every engine fixture needs."""

    box: Sandbox
    node: Callable[[str, Path], Node]
    runtimes: dict[str, Path]
    engines: Path

    def runtime(self, name: str) -> Path:
        """Path of a real runtime; skips when it is not there."""
        if name not in self.runtimes:
            pytest.skip(f"no {name}: run dev/provision")
        return self.runtimes[name]


@pytest.fixture(scope="session")
def machine(
    box: Sandbox, nodes: Callable[[str, Path], Node], runtimes: dict[str, Path], engines: Path, image_archive: Path
) -> Machine:
    """A sandbox with CRIU, runtimes and the test image."""
    assert image_archive.exists()
    return Machine(box, nodes, runtimes, engines)


@pytest.fixture(scope="session")
def podman(machine: Machine) -> Podman:
    """podman with SMR as its runtime, in front of the distribution's runc."""
    if shutil.which("podman") is None:
        pytest.skip("podman is not installed: run dev/provision")
    node = machine.node("podman", machine.runtime("runc"))
    instance = Podman(machine.box.base / "podman", node, machine.box)
    instance.load(machine.engines)
    probe = instance("run", "--rm", "--runtime=runc", testimage.NAME, "true", check=False)
    if probe.returncode != 0:
        probe = instance("run", "--rm", "--runtime=runc", "--network=none", testimage.NAME, "true", check=False)
        if probe.returncode != 0:
            pytest.skip(f"podman cannot run a container here: {probe.stderr.strip()}")
        instance.network = ("--network=none",)
    _started.append(instance)
    return instance


@pytest.fixture(scope="session")
def bridge(podman: Podman) -> Podman:
    """podman where its bridge network works."""
    if podman.network:
        pytest.skip("podman's bridge network does not work here")
    return podman


@contextlib.contextmanager
def _containerd(machine: Machine, version: str, runtime: str, folder: Path | None) -> Iterator[Containerd]:
    program = folder / "containerd" if folder else shutil.which("containerd", path=_plain_path())
    if program is None or not Path(program).exists():
        pytest.skip(f"no containerd {version}: run dev/provision")
    node = machine.node(f"containerd-{version}", machine.runtime(runtime))
    instance = Containerd(machine.box.base / f"containerd-{version}", node, machine.box, folder=folder, version=version)
    with instance.serving():
        instance.load(machine.engines)
        _started.append(instance)
        yield instance
        instance.remove_all()
        _started.remove(instance)


@pytest.fixture(scope="session")
def containerd_1(machine: Machine) -> Iterator[Containerd]:
    """The distribution's containerd (1.6 in Debian 12) and runc."""
    with _containerd(machine, "1.6", "runc", None) as instance:
        yield instance


@pytest.fixture(scope="session")
def containerd_2(machine: Machine) -> Iterator[Containerd]:
    """A newer containerd with a newer runc."""
    with _containerd(machine, "2.x", "runc-new", machine.engines / "containerd-new/bin") as instance:
        yield instance


@pytest.fixture(scope="session", params=["containerd_1", "containerd_2"])
def containerd(request: pytest.FixtureRequest) -> Containerd:
    """Each containerd."""
    return request.getfixturevalue(request.param)


@contextlib.contextmanager
def _cri(machine: Machine, runtime: str, folder: Path | None) -> Iterator[Cri]:
    program = folder / "containerd" if folder else shutil.which("containerd", path=_plain_path())
    if program is None or not Path(program).exists():
        pytest.skip(f"no containerd in {folder or 'PATH'}: run dev/provision")
    version = "{}.{}".format(*containerd_version(Path(program)))
    if missing := [name for name in NEEDED if not (PLUGINS / name).exists()]:
        pytest.skip(f"no CNI plugins {missing} in {PLUGINS}: run dev/provision")
    node = machine.node(f"cri-{version}", machine.runtime(runtime))
    instance = Cri(machine.box.base / f"cri-{version}", node, machine.box, folder=folder, version=version)
    with instance.serving():
        instance.load(machine.engines)
        _started.append(instance)
        yield instance
        instance.remove_all()
        _started.remove(instance)


@pytest.fixture(scope="session")
def cri_1(machine: Machine) -> Iterator[Cri]:
    """Kubernetes' side of the distribution's containerd (1.6 in Debian 12)."""
    with _cri(machine, "runc", None) as instance:
        yield instance


@pytest.fixture(scope="session")
def cri_2(machine: Machine) -> Iterator[Cri]:
    """Kubernetes' side of a newer containerd with a newer runc."""
    with _cri(machine, "runc-new", machine.engines / "containerd-new/bin") as instance:
        yield instance


@pytest.fixture(scope="session", params=["cri_1", "cri_2"])
def cri(request: pytest.FixtureRequest) -> Cri:
    """Each containerd's CRI."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session", params=["podman", "containerd_1", "containerd_2"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each engine."""
    return request.getfixturevalue(request.param)


@dataclass(frozen=True)
class Warm:
    """A checkpoint of a workload with `features`, made when /count had been asked `count` times."""

    image: str
    features: tuple[str, ...]
    count: int
    boot: str


FEATURES = ("file", "memory", "shm", "threads", "unix", "workers", "zombie")


def make_warm(
    engine: Engine | Runc, image: str, *features: str, name: str = "source", start: bool = True, remove: bool = True
) -> Warm:
    """Start a workload, use every feature twice, checkpoint it and remove it."""
    if start:
        engine.start(name, *features)
    engine.ready(name)
    for feature in features:
        if feature in FEATURES:
            engine.ask(name, feature)
            engine.ask(name, feature)
    for _ in range(3):
        answer = engine.ask(name, "count")
    engine.checkpoint(name, image)
    if remove:
        engine.remove(name)
    return Warm(image, features, int(str(answer["count"])), str(answer["boot"]))


@pytest.fixture(scope="session")
def warm(engine: Engine) -> Warm:
    """One image for all tests of an engine that only restore. Its source container is gone."""
    return make_warm(engine, "warm:1", *FEATURES)


@pytest.fixture(scope="session")
def podman_warm(podman: Podman) -> Warm:
    """As `warm`, for tests of podman alone."""
    return make_warm(podman, "podman-warm:1", "workers", "shm")


@pytest.fixture(scope="session")
def lower(box: Sandbox, image_archive: Path, engines: Path) -> Path:
    """The test image's files."""
    folder = box.base / "lower"
    folder.mkdir()
    return testimage.rootfs(engines, folder)


@pytest.fixture(scope="session")
def unified(box: Sandbox) -> Iterator[tuple[str, ...]]:
    """How to run a command where cgroups are v2 alone: as it is, or in a mount namespace where only that hierarchy is mounted.

    Where the controllers belong to v1, that hierarchy has none: no limits, but everything else is as on v2.
    """
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        yield ()
        return
    if not Path("/sys/fs/cgroup/unified").is_dir():
        pytest.skip("no cgroup v2 hierarchy is mounted here")
    script = "mount --rbind /sys/fs/cgroup/unified /sys/fs/cgroup && echo done && exec sleep infinity"
    argv = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        try:
            if holder.stdout.readline() != b"done\n":
                pytest.skip("the cgroup v2 hierarchy cannot be mounted alone here")
            yield ("nsenter", f"--mount=/proc/{holder.pid}/ns/mnt")
        finally:
            holder.kill()


@pytest.fixture(scope="session", params=["runc", "runc-new", "runc-new-unified", "crun-new-unified"])
def runc(request: pytest.FixtureRequest, machine: Machine, lower: Path) -> Runc:
    """A runtime driven by hand: runc old and new on this machine's cgroups, runc and crun on cgroup v2."""
    name = request.param.removesuffix("-unified")
    prefix = request.getfixturevalue("unified") if name != request.param else ()
    node = machine.node(request.param, machine.runtime(name))
    instance = Runc(machine.box.base / f"bundles-{request.param}", node, machine.box, lower, prefix)
    folder = instance.bundle("probe", "true")
    probe = instance.create("probe", folder, bare=True, check=False)
    instance("delete", "--force", "probe", bare=True, check=False)
    instance.remove("probe")
    if probe.returncode != 0:
        pytest.skip(f"{request.param} cannot create a container here: {probe.stderr.strip()}")
    _started.append(instance)
    return instance


@pytest.fixture(scope="session")
def restoring_runc(runc: Runc) -> Runc:
    """A runtime that by itself can checkpoint and restore here."""
    name, images = "probe", str(runc.path.with_name(f"{runc.path.name}-probe"))
    runc.env = {**runc.env, "PATH": f"{runc.node.criu_folder}:{runc.env['PATH']}"}
    try:
        runc.start(name, bare=True)
        runc.ready(name)
        saved = runc("checkpoint", "--image-path", images, "--work-path", images, name, bare=True, check=False)
        assert saved.returncode == 0, f"{saved.stderr}\n{quote_log(Path(images) / 'dump.log')}"
        runc("delete", "--force", name, bare=True, check=False)
        words = ["restore", "--detach", "--bundle", runc.path / name, "--image-path", images, "--work-path", images, name]
        with runc.output(runc.path / name) as output:
            argv = [str(word) for word in (*runc.bare, *words)]
            done = subprocess.run(
                argv, check=False, env=runc.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=60
            )
        if done.returncode != 0:
            pytest.skip(f"{runc.bare[-1]} by itself cannot restore here: {quote_log(Path(images) / 'restore.log')}")
    finally:
        runc.env = runc.node.env
        runc("delete", "--force", name, bare=True, check=False)
        runc.remove(name)
        shutil.rmtree(images, ignore_errors=True)
    return runc


@pytest.fixture(autouse=True)
def leaks() -> Iterator[None]:
    """Nothing of a test is left after it: mounts, cgroups, processes, network namespaces, records, half-made images, files."""
    before = [box.snapshot() for box in _boxes]
    yield
    if not before:
        return
    for engine in _started:
        engine.remove_all()
    left = ["not looked"]

    def clean() -> bool:
        restarted = tuple(f"process {engine.daemon_pid} " for engine in _started if isinstance(engine, Cri))
        left[:] = [line for line in _boxes[0].snapshot().left_since(before[0]) if not line.startswith(restarted)]
        return not left

    try:
        eventually(clean, timeout_s=10)
    except AssertionError:
        pytest.fail("left over:\n" + "\n".join(left))
