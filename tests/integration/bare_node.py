"""Roots of nodes with a kernel, a containerd and nothing else that SMR could use, entered as nodes of their own.

`debian`: Debian's essential packages, containerd and runc, no Python and no CRIU. `musl`: what a bare Alpine is, of Debian's
packages: busybox (a static one) as the whole userland, musl as the only libc, and a containerd and runc that bring their own,
where Alpine's are its own builds.
Each node has a mount and a pid namespace of its own, so that process 1 is the node's, and shares network and cgroups.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.integration import testimage
from tests.integration.command import Done, eventually, run

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SCRIPT = "/smr-bundle/deploy/kubernetes/node.sh"
_DEBIAN = "containerd,mount,runc"
_FOLDERS = (
    "dev",
    "proc",
    "sys",
    "run",
    "tmp",
    "etc",
    "opt",
    "root",
    "usr/local/bin",
    "usr/local/sbin",
    "var/lib",
    "var/log",
    "var/tmp",
)
# What containerd makes when it starts.
_CONTAINERD = ("etc/cni/net.d", "opt/containerd/bin", "opt/containerd/lib")
# mount, pid: pivot_root rather than chroot, so that who enters the mount namespace is in the root.
_ENTER = """
mount --make-rprivate / && mount --bind "$1" "$1" && cd "$1" && mkdir -p .old
mount -t proc proc proc && mount --rbind /sys sys && mount --rbind /dev dev
mount -t tmpfs tmpfs run && mount -t tmpfs tmpfs tmp
pivot_root . .old && cd / && umount -l /.old && rmdir /.old
exec chroot / /bin/sh -c 'trap "exit 0" TERM; touch /run/ready; while :; do sleep 3600 & wait $!; done'
"""


def debian_root(archive: Path, root: Path) -> None:
    """Unpack Debian's; `archive` is made when it is not there."""
    if not archive.exists():
        part = archive.with_suffix(".part.tar")
        run(["mmdebstrap", "--mode=root", "--variant=essential", f"--include={_DEBIAN}", "trixie", part], timeout_s=300)
        part.rename(archive)
    unpack(archive, root)
    for folder in _CONTAINERD:
        (root / folder).mkdir(parents=True, exist_ok=True)


def unpack(archive: Path, root: Path) -> None:
    """A tar of a root, as it is but for device nodes."""
    root.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        tar.extractall(root, [each for each in tar if not each.isdev()], filter="fully_trusted", numeric_owner=True)


def musl_root(debian: Path, root: Path, packages: Path) -> None:
    """Busybox and musl, and the containerd of a Debian root behind its own loader. `packages`: a folder with their .deb files."""
    for folder in (*_FOLDERS, *_CONTAINERD, "bin", "lib", "usr/bin", "usr/lib/engine"):
        (root / folder).mkdir(parents=True)
    for deb in packages.glob("*.deb"):
        run(["dpkg-deb", "-x", deb, root / "var/tmp"])
    loader = next((root / "var/tmp").rglob("ld-musl-*.so.1"))
    shutil.copy(loader, root / "lib" / loader.name)
    shutil.copy(next((root / "var/tmp").rglob("bin/busybox")), root / "bin/busybox")
    shutil.rmtree(root / "var/tmp")
    (root / "var/tmp").mkdir()
    for applet in run([root / "bin/busybox", "--list"]).stdout.split():
        if not (root / "bin" / applet).exists():
            (root / "bin" / applet).symlink_to("busybox")
    lib = root / "usr/lib/engine"
    for library in (debian / "usr/lib").glob("*-linux-gnu/lib*.so.*"):
        if library.name.startswith(("libc.", "libseccomp.", "libresolv.", "libpthread.", "libdl.", "libgcc_s.", "libm.")):
            shutil.copy(library, lib / library.name)
    (loader,) = (debian / "usr/lib").glob("*-linux-gnu/ld-linux-*.so.*")
    shutil.copy(loader, lib / loader.name)
    for program in ("usr/bin/containerd", "usr/bin/containerd-shim-runc-v2", "usr/bin/ctr", "usr/sbin/runc"):
        copy = root / "usr/bin" / Path(program).name
        shutil.copy(debian / program, copy)
        run(["patchelf", "--set-rpath", "/usr/lib/engine", copy])
        run(["patchelf", "--set-interpreter", f"/usr/lib/engine/{loader.name}", copy])


class BareNode:
    """A node that runs. `namespace` is containerd's, and the cgroup's name."""

    def __init__(self, root: Path, pid: int, namespace: str) -> None:
        self.root, self.pid, self.namespace = root, pid, namespace

    def __call__(self, *words: object, check: bool = True, env: Mapping[str, str] | None = None, timeout_s: float = 90) -> Done:
        """Run a program of the node on it."""
        variables = {"PATH": PATH, "CONTAINERD_NAMESPACE": self.namespace, **(env or {})}
        argv = ["nsenter", "-t", self.pid, "-m", "-p", "--", *words]
        return run(argv, env=variables, check=check, timeout_s=timeout_s)

    def pod(self, image: Path, verb: str, *, options: str = "", check: bool = True, host_pid: bool = True) -> Done:
        """Run the image's entry point as a privileged container with hostPID of this node would."""
        steps = [
            f"mount --bind {image} {image}",
            f"mount -t proc proc {image}/proc",
            f'exec env -i PATH="$PATH" SMR_OPTIONS="{options}" chroot {image} /smr-bundle/python/bin/sh {_SCRIPT} {verb}',
        ]
        enter = ["nsenter", "-t", self.pid, "-p", "--"] if host_pid else ["unshare", "--pid", "--fork"]
        (image / "proc").mkdir(exist_ok=True)
        return run(
            [*enter, "unshare", "--mount", "--propagation", "private", "sh", "-c", " && ".join(steps)], check=check, timeout_s=170
        )

    def containerd(self) -> Containerd:
        """Start containerd on it."""
        return Containerd(self)

    def tree(self) -> dict[str, tuple[int, str]]:
        """Mode, and digest or target, of everything on its disk, but for containerd's own data."""
        found = {}
        for folder, folders, files in os.walk(self.root):
            here = Path(folder)
            if here == self.root:
                folders[:] = [name for name in folders if name not in {"proc", "sys", "dev", "run", "tmp"}]
            if here == self.root / "var/lib":
                folders[:] = [name for name in folders if name != "containerd"]
            for name in (*folders, *files):
                path = here / name
                status = path.lstat()
                if path.is_symlink():
                    content = str(path.readlink())
                else:
                    content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
                found[str(path.relative_to(self.root))] = (status.st_mode, content)
        return found


class Containerd:
    """containerd on a bare node: a context manager, and its `ctr`."""

    def __init__(self, node: BareNode) -> None:
        self.node = node

    def __enter__(self) -> Containerd:
        argv = ["nsenter", "-t", str(self.node.pid), "-m", "-p", "--", "containerd"]
        log = self.node.root / "var/log/containerd.log"
        with log.open("ab") as output:
            self._daemon = subprocess.Popen(argv, env={"PATH": PATH}, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        eventually(lambda: self.node("ctr", "version", check=False).returncode == 0, what=f"containerd serves: {log}")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names():
            self.remove(name)
        self.node(
            "sh", "-c", "for p in /proc/[0-9]*; do case $(cat $p/comm) in containerd) kill ${p##*/};; esac; done", check=False
        )
        self._daemon.wait(20)
        (self.node.root / "var/log/containerd.log").unlink()

    def names(self) -> Sequence[str]:
        """All containers."""
        return self.node("ctr", "containers", "ls", "-q").stdout.split()

    def load(self, archive: Path) -> None:
        """Import an image."""
        shutil.copy(archive, self.node.root / "var/image.tar")
        self.node("ctr", "images", "import", "/var/image.tar")
        (self.node.root / "var/image.tar").unlink()

    def start(self, name: str, *options: str) -> None:
        """`ctr run -d` of the workload under SMR."""
        words = ["ctr", "run", "-d", "--null-io", "--runtime", "io.containerd.smr.v2", *options, testimage.NAME, name]
        self.node(*words, "python3", "/app/workload.py", "memory")

    def ask(self, name: str, path: str = "count") -> dict[str, object]:
        """A request to the workload."""
        words = ["ctr", "task", "exec", "--exec-id", f"e{os.urandom(4).hex()}", name, "wget", "-q", "-O-"]
        answer: dict[str, object] = json.loads(self.node(*words, f"http://127.0.0.1:8000/{path}").stdout)
        return answer

    def remove(self, name: str) -> None:
        """Kill and delete."""
        self.node("ctr", "task", "kill", "-s", "SIGKILL", name, check=False)
        eventually(lambda: self.node("ctr", "task", "delete", name, check=False).returncode == 0 or not self._task(name))
        self.node("ctr", "containers", "delete", name)

    def _task(self, name: str) -> bool:
        return name in self.node("ctr", "task", "ls", "-q").stdout.split()


@contextlib.contextmanager
def running(root: Path, namespace: str) -> Iterator[BareNode]:
    """Boot a root; nothing of it runs in the end."""
    argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", _ENTER, "sh", str(root)]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        pid = int(eventually(lambda: children.read_text().strip(), what="the node's first process"))
        eventually(lambda: Path(f"/proc/{pid}/root/run/ready").exists(), what="the node is up")
        yield BareNode(root, pid, namespace)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait()
