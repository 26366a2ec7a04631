"""A node whose NVIDIA driver is fake, and containers of a real runtime that use its GPUs.

Of the driver's there are: libcuda.so.1 (tests/fakes/libcuda.c), libnvidia-ml.so.1 (nvml.c), the files in /proc by which it is
known, and device nodes in the containers' specs, harmless ones. All else is real: the runtime, CRIU, smr-runtime and `smr`.
The driver's state of a process lies in a tmpfs of its container, so a checkpoint takes it along.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.nvml import DRIVER, H200_BYTES, uuid
from tests.integration.command import Done, eventually, run
from tests.integration.conftest import Machine
from tests.integration.node import Node
from tests.integration.runc import Runc

FAKES = Path(__file__).parents[1] / "fakes"
FAIL, COLD = {"smr.fallback": "fail"}, {"smr.fallback": "cold"}
RUNNING, LOCKED, CHECKPOINTED = 0, 1, 2
# GPUs by minor number: /dev/null, /dev/zero and /dev/urandom have these too, and any container may use those.
FIRST, SECOND, THIRD = 3, 5, 9
UUIDS = {FIRST: uuid(3), SECOND: uuid(5), THIRD: uuid(9)}
VRAM_BYTES = 1 << 30
_SLOTS = ("ready", "ticks", "uses", "bad", "minors", "open", "checkpoints", "restores", "unlocks", "ticks_at_restore", "boot")
_FLAGS = ("-O1", "-Wall", "-Wextra", "-Werror")
# Waits before it becomes the runtime while there is a file hold.VERB, and fails when there is fail.VERB; help is only help.
_RUNTIME = """#!/bin/sh
for verb; do
    case $verb in pause | resume | checkpoint | restore) break ;; esac
done
case "$*" in *--help) exec {runtime} "$@" ;; esac
if [ -e {folder}/fail.$verb ]; then
    echo "told to fail" >&2
    exit 1
fi
if [ -e {folder}/hold.$verb ]; then
    : >{folder}/held.$verb
    while [ -e {folder}/hold.$verb ]; do sleep 0.02; done
fi
exec {runtime} "$@"
"""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a process of gpu_program.c has done so far."""

    ready: int
    ticks: int
    uses: int
    bad: int
    minors: int
    open: int
    checkpoints: int
    restores: int
    unlocks: int
    ticks_at_restore: int
    boot: int

    @classmethod
    def read(cls, file: Path) -> Counts:
        """From a counts file."""
        return cls(**dict(zip(_SLOTS, struct.unpack_from(f"<{len(_SLOTS)}Q", file.read_bytes()), strict=True)))


@dataclass
class Gpu:
    """A line of NVML's."""

    minor: int
    name: str = "NVIDIA H200"
    capability: str = "9.0"
    free: int = H200_BYTES - (2 << 30)
    mode: int = 0
    fault: int = 0

    def line(self) -> str:
        words = (UUIDS[self.minor], self.name, self.minor, self.capability, H200_BYTES, self.free, self.mode, self.fault)
        return "|".join(str(word) for word in words)


class GpuNode:
    """The node. `fake` is the drivers' folder; `runc` has smr-runtime in front."""

    def __init__(self, machine: Machine, lower: Path) -> None:
        base = machine.box.base / "gpu"
        self.fake, self.program, self.box = base / "fake", base / "gpu_program", machine.box
        self.fake.mkdir(parents=True)
        libraries = base / "libraries"
        libraries.mkdir()
        run(["cc", *_FLAGS, "-shared", "-fPIC", "-o", libraries / "libfakecuda.so", FAKES / "libcuda.c"])
        run(["cc", *_FLAGS, "-shared", "-fPIC", "-o", libraries / "libnvidia-ml.so.1", FAKES / "nvml.c"])
        run(["cc", *_FLAGS, "-static", "-pthread", "-o", self.program, FAKES / "gpu_program.c"])
        runtime = base / "runc"
        real = machine.runtimes.get("runc-new") or machine.runtime("runc")
        runtime.write_text(_RUNTIME.format(folder=self.fake, runtime=real))
        runtime.chmod(0o755)
        self.node: Node = machine.node("gpu", runtime)
        self.runc = Runc(machine.box.base / "bundles-gpu", self.node, machine.box, lower)
        self.runc.env = {
            **self.node.env,
            "SMR_FAKE_CUDA": str(self.fake),
            "SMR_CUDA_LIBRARY": str(libraries / "libfakecuda.so"),
            "LD_LIBRARY_PATH": str(libraries),
        }
        self.base = base

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """With the driver's files in /proc, as this mount namespace sees it."""
        devices, drivers = self.base / "devices", self.base / "driver"
        text = Path("/proc/devices").read_text()
        devices.write_text(text.replace("devices:\n", "devices:\n195 nvidia\n195 nvidiactl\n511 nvidia-uvm\n", 1))
        (drivers / "nvidia").mkdir(parents=True)
        (drivers / "nvidia/version").write_text(f"NVRM version: NVIDIA UNIX Kernel Module  {DRIVER}  Wed\n")
        places = {devices: "/proc/devices", drivers: "/proc/driver"}
        with contextlib.ExitStack() as stack:
            for source, place in places.items():
                run(["mount", "--bind", source, place])
                stack.callback(run, ["umount", place])
            yield

    def reset(self) -> None:
        """Two GPUs, no fault, no process, no log."""
        self.runc.remove_all()
        shutil.rmtree(self.fake)
        self.fake.mkdir()
        self.gpus(Gpu(FIRST), Gpu(SECOND), Gpu(THIRD))

    def gpus(self, *gpus: Gpu, driver: str = DRIVER) -> None:
        """The node's."""
        (self.fake / "gpus").write_text("\n".join([driver, *(gpu.line() for gpu in gpus), ""]))

    def fault(self, call: str, words: str, inner: int = 1) -> None:
        """What `call` does for a process, named by its pid in its container: see libcuda.c."""
        (self.fake / f"fault.{call}.ns{inner}").write_text(words)

    def mend(self) -> None:
        """No faults any more, and nothing held."""
        for pattern in ("fault.*", "hold.*", "held.*", "fail.*"):
            for file in self.fake.glob(pattern):
                file.unlink()

    def calls(self, call: str = "") -> list[tuple[str, int, str]]:
        """The driver's log: call, host pid, begin or end; without questions about states."""
        file = self.fake / "log"
        lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
        return [(words[0], int(words[1]), words[2]) for words in lines if words[0] not in {"state", "init"} and call in words[0]]

    def begun(self, call: str) -> bool:
        """Whether a call has begun."""
        return any(what == "begin" for _, _, what in self.calls(call))

    def bundle(
        self, name: str, *words: str, gpus: Sequence[int] = (FIRST,), annotations: Mapping[str, str] | None = None
    ) -> Path:
        """A bundle of gpu_program.c with some of the GPUs."""

        def edit(spec: dict[str, object]) -> None:
            nodes = [(f"/dev/nvidia{minor}", minor) for minor in gpus] + [("/dev/nvidiactl", 7), ("/dev/nvidia-uvm", 8)]
            linux, mounts = spec["linux"], spec["mounts"]
            assert isinstance(linux, dict)
            assert isinstance(mounts, list)
            linux["devices"] = [{"path": path, "type": "c", "major": 1, "minor": minor} for path, minor in nodes]
            mounts.append({"destination": "/fake-cuda", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]})

        folder = self.runc.bundle(name, "/app/gpu_program", *words, annotations=annotations, edit=edit)
        shutil.copy(self.program, folder / "rootfs/app/gpu_program")
        return folder

    def start(self, name: str = "source", *words: str, gpus: Sequence[int] = (FIRST,)) -> int:
        """A container that runs, cold; the host pid of its first process."""
        self.runc.create(name, self.bundle(name, *words, gpus=gpus), bare=True)
        self.runc("start", name, bare=True)
        return self.ready(name, 1 + len({"second", "forked"} & set(words)))

    def ready(self, name: str, processes: int = 1) -> int:
        """Wait for its processes, and tell NVML of them."""
        pid = self.runc.pid(name)
        eventually(lambda: len(self.tree(pid)) == processes, what=f"{processes} processes")
        eventually(lambda: all(self.counts(one).ready for one in self.tree(pid)), what="the program is ready")
        lines = [f"{gpu} {one} {VRAM_BYTES}\n" for one in self.tree(pid) for gpu in self.minors(one)]
        with (self.fake / "procs").open("a") as file:
            file.writelines(lines)
        return pid

    def minors(self, pid: int) -> list[int]:
        """The GPUs whose device nodes a process has open."""
        return [minor for minor in UUIDS if f"/dev/nvidia{minor}" in self.open_devices(pid)]

    @staticmethod
    def open_devices(pid: int) -> list[str]:
        """NVIDIA's device nodes that a process has open, with the number of each."""
        found = []
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if (path := str(fd.readlink())).startswith("/dev/nvidia"):
                    found.append(path)
        return sorted(found)

    def tree(self, pid: int) -> list[int]:
        """A process and its children."""
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *(int(word) for word in words)]

    @staticmethod
    def inner(pid: int) -> int:
        """A process's pid in its container."""
        line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("NSpid:"))
        return int(line.split()[-1])

    def own(self, pid: int, what: str) -> Path:
        """A file of a process's in the driver's folder of its container."""
        return Path(f"/proc/{pid}/root/fake-cuda/{self.inner(pid)}.{what}")

    def counts(self, pid: int) -> Counts:
        """What a process has done."""
        return Counts.read(self.own(pid, "counts"))

    def state(self, pid: int) -> int:
        """The driver's state of it."""
        return int(self.own(pid, "state").read_text())

    def text(self, pid: int, name: str) -> str:
        """A file of the container's /fake-cuda; empty when there is none."""
        file = Path(f"/proc/{pid}/root/fake-cuda/{name}")
        return file.read_text() if file.exists() else ""

    def serves(self, pid: int) -> None:
        """Its process runs and uses its GPU, and every byte there is right."""
        before = self.counts(pid)
        eventually(lambda: self.counts(pid).uses > before.uses + 130, what="the GPU is used")
        assert self.counts(pid).bad == 0
        assert self.state(pid) == RUNNING

    def checkpoint(self, image: str, *words: str, check: bool = True, env: Mapping[str, str] | None = None) -> Done:
        """`smr checkpoint` of `source`."""
        argv = self.checkpoint_argv(image, *words)
        return run(argv, env={**self.runc.env, **(env or {})}, check=check)

    def checkpoint_argv(self, image: str, *words: str) -> list[str]:
        """The command line of it."""
        return [str(self.node.bin / "smr"), "checkpoint", "source", "-n", image, "--engine", "runc", *words]

    def has_image(self, image: str) -> bool:
        """Whether the store has a whole image of that name."""
        return self.node.smr("images", "verify", image, check=False).returncode == 0

    def config_of(self, image: str) -> dict[str, object]:
        """What `smr images inspect` says of it."""
        return json.loads(self.node.smr("images", "inspect", image, "--json").stdout)

    def restore(self, image: str, *words: str, name: str = "again", **more: object) -> int:
        """Create and start of a restore that must succeed; the host pid."""
        self.create(image, *words, name=name, **more)
        self.runc("start", name)
        return self.runc.pid(name)

    def create(
        self,
        image: str,
        *words: str,
        name: str = "again",
        gpus: Sequence[int] = (FIRST,),
        annotations: Mapping[str, str] = FAIL,
        check: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> Done:
        """Create by annotation."""
        folder = self.bundle(name, *words, gpus=gpus, annotations={"smr.restore": image, **annotations})
        kept = self.runc.env
        self.runc.env = {**kept, **(env or {})}
        try:
            return self.runc.create(name, folder, check=check)
        finally:
            self.runc.env = kept

    def helpers(self) -> list[str]:
        """SMR's helper processes of this node, and whatever else of SMR still runs."""
        return [command for _, command in self.box.processes() if "smr.shim" in command or "/smr checkpoint" in command]

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """kill -9, and its end."""
        process.send_signal(signal.SIGKILL)
        process.wait(20)

    def spawn(self, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        """A command that a test kills in the middle. It heeds all signals, also where a shell has the tests ignore some."""
        return subprocess.Popen(
            ["env", "--default-signal", *argv],
            env=self.runc.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def stopped(pid: int) -> bool:
    """Whether every thread is stopped."""
    tasks = Path(f"/proc/{pid}/task")
    return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks.iterdir())


def alive(pid: int) -> bool:
    """Whether there is such a process, no zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False
