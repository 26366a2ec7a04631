"""Rootless podman: an annotated container starts cold or fails in plain words, a checkpoint is refused, nothing is harmed."""

from __future__ import annotations

import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration import testimage
from tests.integration.command import Done, run
from tests.integration.node import REPOSITORY
from tests.integration.sandbox import Sandbox

USER = 3333
# What the user's mount namespace has in place of the machine's.
ETC = {
    "passwd": "root:x:0:0::/root:/bin/sh\nsmrt:x:3333:3333::{home}:/bin/sh\n",
    "group": "root:x:0:\nsmrt:x:3333:\n",
    "subuid": "smrt:100000:65536\n",
    "subgid": "smrt:100000:65536\n",
}
CONF = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=20000:20000"]
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "{runtime}"
[engine.runtimes]
smr = ["{home}/smr-runtime"]
"""


class User:
    """A user with a home, podman and an SMR; `home` is the only place where it may write."""

    def __init__(self, home: Path, runtime: Path) -> None:
        self.home = home
        home.chmod(0o755)
        (home / "etc").mkdir()
        for name, text in ETC.items():
            (home / "etc" / name).write_text(text.format(home=home))
        (home / "containers.conf").write_text(CONF.format(home=home, runtime=runtime))
        shutil.copy2(REPOSITORY / "shim/bin/smr-runtime", home / "smr-runtime")
        # The tests' own Python may be where a user may not look.
        packages = f"{REPOSITORY / '.venv/smr-path'} {sysconfig.get_path('purelib')}"
        self.script(
            "python3",
            f"""exec /usr/bin/python3 -c 'import runpy, sys; sys.path[:0] = sys.argv[1:3]; sys.argv = sys.argv[5:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)' {packages} "$@" """,
        )
        call = "import sys; sys.path[:0] = sys.argv[1:3]; del sys.argv[1:3]; from smr.shim.cli import main; main()"
        self.script("smr", f"exec /usr/bin/python3 -c '{call}' {packages} \"$@\"")
        (home / "run").mkdir(mode=0o700)
        run(["chown", "-R", f"{USER}:{USER}", home])

    def script(self, name: str, text: str) -> None:
        """A program in the home."""
        (self.home / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.home / name).chmod(0o755)

    def __call__(self, command: str, *, check: bool = True) -> Done:
        """Run a shell command as the user."""
        mounts = " && ".join(f"touch /etc/{name} && mount --bind {self.home}/etc/{name} /etc/{name}" for name in ETC)
        path = f"{self.home}:/usr/sbin:/usr/bin:/sbin:/bin"
        variables = f"HOME={self.home} XDG_RUNTIME_DIR={self.home}/run PATH={path} CONTAINERS_CONF={self.home}/containers.conf"
        become = f"cd {self.home} && exec setpriv --reuid={USER} --regid={USER} --clear-groups env -i {variables} sh -c"
        return run(["unshare", "--mount", "--propagation=slave", "sh", "-c", f'{mounts} && {become} "$0"', command], check=check)


@pytest.fixture
def user(box: Sandbox, engines: Path, runtimes: dict[str, Path], image_archive: Path) -> Iterator[User]:
    """A user who has loaded the test image; skips where a container of a user's cannot be started at all."""
    needed = ("podman", "newuidmap", "setpriv")
    version = run(["/usr/bin/python3", "-c", "import sys; print(*sys.version_info[:2])"], check=False).stdout.split()
    if not all(map(shutil.which, needed)) or "runc" not in runtimes or version != [str(part) for part in sys.version_info[:2]]:
        pytest.skip(f"needs {', '.join(needed)}, runc, and a Python for all users that is of this one's version")
    one = User(Path(tempfile.mkdtemp(dir="/var/tmp", prefix=f"{box.token}-home-")), runtimes["runc"])
    shutil.copyfile(testimage.archive(engines), one.home / "image.tar")
    probe = one(f"podman --storage-driver vfs load -q -i image.tar && {PODMAN} --name probe {testimage.NAME} true", check=False)
    try:
        if probe.returncode != 0:
            pytest.skip(f"no rootless podman here: {probe.stderr.strip()[-300:]}")
        yield one
    finally:
        tidy = "podman --storage-driver vfs rm -fa -t 0; podman unshare rm -rf .local"
        one(f"{tidy}; kill $(cat run/libpod/tmp/pause.pid)", check=False)  # podman keeps a process for the namespace
        shutil.rmtree(one.home)


PODMAN = "podman --storage-driver vfs run -d --network=none"


def test_rootless(user: User) -> None:
    """Without the annotation nothing changes; with it the container starts cold, or fails with the reason."""
    wanted = f"{PODMAN} --annotation smr.restore=llama:warm --runtime smr"
    tail = f"{testimage.NAME} python3 /app/workload.py"
    user(f"{PODMAN} --runtime smr --name plain {tail}")
    user(f"{wanted} --name cold {tail}")
    failed = user(f"{wanted} --annotation smr.fallback=fail --name fail {tail}", check=False)
    assert failed.returncode != 0
    assert f"root of this user namespace is the node's uid {USER}" in failed.stderr
    states = user("podman --storage-driver vfs ps --format '{{.Names}} {{.Status}}'").stdout
    assert {line.split()[0] for line in states.splitlines() if " Up " in line} == {"plain", "cold"}
    reason = user(
        "podman --storage-driver vfs container inspect --format '{{index .Config.Annotations \"smr.restore\"}}' cold"
    ).stdout
    assert reason.strip() == "llama:warm"
    refused = user("smr checkpoint plain -n llama:warm", check=False)
    assert refused.returncode != 0
    assert f"CRIU needs root, this is uid {USER}" in refused.stderr
    refused = user("podman unshare smr checkpoint plain -n llama:warm", check=False)
    assert "root of this user namespace" in refused.stderr
    assert "Up" in user("podman --storage-driver vfs ps --filter name=plain --format '{{.Status}}'").stdout
