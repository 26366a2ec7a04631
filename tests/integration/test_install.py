"""install.sh against a scratch root: what it makes, once only; what it takes away; that a stopped run leaves nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.command import Done, eventually, run

REPOSITORY = Path(__file__).parents[2]
NVIDIA = """# GPU node
version = 2

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.example/pause:3.9"  # ours
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "nvidia"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.nvidia]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.nvidia.options]
        BinaryName = "/usr/bin/nvidia-container-runtime"
        SystemdCgroup = true
"""
PROGRAMS = ["smr", "smr-runtime", "smr-hook", "containerd-shim-smr-v1", "containerd-shim-smr-v2"]


@pytest.fixture(scope="module", autouse=True)
def kernel_of_a_stable_release() -> Iterator[None]:
    """The tests look at deploy/criu.lock, which kernels from 6.16 on do not use; the CRIU is only installed here, not run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMR_TEST_KERNEL", "6.1")
        yield


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and all it needs as wheels, so that the installations below need no network."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    folder = tmp_path_factory.mktemp("wheels")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("proto", "images", "shim", "hooks"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(["python3", "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "-w", folder, source], timeout_s=170)
    return folder


class Installation:
    """A scratch root with a node's configuration, and install.sh for it."""

    def __init__(self, base: Path, wheels: Path, criu: Path) -> None:
        self.root, self.prefix, self.base = base / "root", base / "opt/smr", base
        self.config = self.root / "etc/containerd/config.toml"
        self.containers = self.root / "etc/containers/containers.conf.d/50-smr.conf"
        (self.root / "usr/local/bin").mkdir(parents=True)
        self.config.parent.mkdir(parents=True)
        self.config.write_text(NVIDIA)
        self.config.chmod(0o444)
        (self.root / "etc/containers").mkdir()
        (self.root / "etc/containers/containers.conf").write_text('[engine]\nhooks_dir = ["/etc/my-hooks"]\n')
        (package,) = wheels.glob("smr_restore-*.whl")
        self.criu = criu
        self.options: list[object] = ["--prefix", self.prefix, "--root", self.root, "--source", package, "--wheels", wheels]
        self.before = self.tree()

    def words(self, *options: object) -> list[str]:
        return [str(word) for word in (REPOSITORY / "install.sh", *self.options, *options)]

    def __call__(self, *options: object, check: bool = True) -> Done:
        words = self.words("--criu", self.criu, *options)
        return run(words, check=check, timeout_s=170, env={**os.environ, "TMPDIR": str(self.temporary)})

    @property
    def temporary(self) -> Path:
        folder = self.base / "tmp"
        folder.mkdir(exist_ok=True)
        return folder

    def tree(self) -> dict[str, tuple[int, str]]:
        """Mode and content of everything below the root and around the prefix."""
        found = {}
        for top in (self.root, self.prefix.parent):
            for path in (top, *top.rglob("*")) if top.exists() else ():
                status = path.lstat()
                content = str(path.readlink()) if path.is_symlink() else ""
                if path.is_file() and not path.is_symlink():
                    content = hashlib.sha256(path.read_bytes()).hexdigest()
                found[str(path)] = (status.st_mode, content)
        return found

    def assert_untouched(self) -> None:
        assert self.tree() == self.before
        assert list(self.temporary.iterdir()) == []


@pytest.fixture
def node(tmp_path: Path, wheels: Path, criu: Path) -> Installation:
    """A node with containerd, podman and settings of its own."""
    for program in ("podman", "containerd", "runc"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: run dev/provision")
    return Installation(tmp_path, wheels, criu)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheels: Path, criu: Path) -> Iterator[Installation]:
    """One installation that several tests only look at."""
    installation = Installation(tmp_path_factory.mktemp("installed"), wheels, criu)
    installation()
    return installation


def test_a_dry_run_changes_nothing_and_says_what_an_installation_then_does(node: Installation) -> None:
    """The same lines, without the `would`; not even Python's caches are written."""
    dry = node("--dry-run").stdout
    node.assert_untouched()
    real = node().stdout
    would = [line.removeprefix("would ") for line in dry.splitlines() if line.startswith("would ")]
    assert would
    assert [line for line in real.splitlines() if line.split()[0] in ("create", "change", "link")] == would


def test_a_second_run_changes_nothing_and_says_so(node: Installation) -> None:
    """No file is written again, and options of the first run hold."""
    node("--default-runtime")
    before = node.tree()
    assert node().stdout.splitlines()[-1] == "nothing to change"
    assert node("--dry-run").stdout.splitlines()[-1] == "nothing to change"
    assert node.tree() == before


def test_uninstall_leaves_the_node_as_it_was(node: Installation) -> None:
    """Byte for byte and mode for mode; a dry run before it only talks."""
    node("--default-runtime")
    before = node.tree()
    assert "would restore" in node("--uninstall", "--dry-run").stdout
    assert node.tree() == before
    node("--uninstall")
    node.assert_untouched()
    assert node("--uninstall").stdout.splitlines() == ["nothing to change"]


def test_uninstall_keeps_what_others_changed_since(node: Installation) -> None:
    """Our lines go, theirs stay; files of theirs in our folders stay and are named; images go with --purge only."""
    node()
    with node.config.open("a") as file:
        file.write("# a remark\n")
    (node.prefix / "notes").write_text("mine")
    store = node.root / "var/lib/smr/blobs"
    store.mkdir(parents=True)
    output = node("--uninstall").stdout
    assert node.config.read_text() == NVIDIA + "# a remark\n"
    assert f"leave {node.prefix}/" in output
    assert [path.name for path in node.prefix.iterdir()] == ["notes"]
    assert "--purge" in output
    assert store.exists()
    node("--uninstall", "--purge")
    assert not store.parent.exists()


def test_edited_settings_are_kept(node: Installation) -> None:
    """smr.toml is the user's once it is edited."""
    node()
    settings = node.root / "etc/smr/smr.toml"
    settings.write_text('[smr]\nstore = "/big/disk"\n')
    assert "keep" in node().stdout
    assert settings.read_text() == '[smr]\nstore = "/big/disk"\n'


def test_narrower_engines_take_the_others_away(node: Installation) -> None:
    """What an earlier run registered and this one does not want is put back."""
    node()
    node("--engines", "podman")
    assert node.config.read_text() == NVIDIA
    assert node.containers.exists()


def test_the_installed_programs_run(installed: Installation) -> None:
    """Every link leads to a program; smr-runtime execs the real runtime at once."""
    for name in PROGRAMS:
        path = installed.root / "usr/local/bin" / name
        assert os.access(path, os.X_OK), name
        assert path.resolve() == installed.prefix / "venv/bin" / name
    real = run(["runc", "--version"]).stdout
    environment = {**os.environ, "SMR_RUNTIME": (installed.root / "etc/smr/runtime").read_text().strip()}
    assert run([installed.root / "usr/local/bin/smr-runtime", "--version"], env=environment).stdout == real
    assert str(REPOSITORY) not in (installed.prefix / "venv/bin/smr").read_text()
    assert "venv.new" not in (installed.prefix / "venv/bin/smr").read_text()


def cri(dumped: str) -> dict[str, Any]:
    plugins = tomllib.loads(dumped)["plugins"]
    keys = ("io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri")
    found: dict[str, Any] = next(plugins[key]["containerd"] for key in keys if "containerd" in plugins.get(key, {}))
    return found


@pytest.mark.parametrize("which", ["machine's", "newer"])
def test_containerd_reads_the_configuration_and_has_the_runtime(installed: Installation, engines: Path, which: str) -> None:
    """1.6 and 2.x: ours is there with the node's own options, and nothing of the node's is lost."""
    program = Path(shutil.which("containerd") or "") if which == "machine's" else engines / "containerd-new/bin/containerd"
    if not program.is_file():
        pytest.skip(f"no {which} containerd: run dev/provision")
    containerd = cri(run([program, "--config", installed.config, "config", "dump"]).stdout)
    smr = containerd["runtimes"]["smr"]
    assert smr["runtime_type"] == "io.containerd.runc.v2"
    assert smr["runtime_path"] == str(installed.prefix / "bin/containerd-shim-smr-v1")
    assert smr["pod_annotations"] == ["smr.*", "smr.*/*", "kubectl.kubernetes.io/default-container"]
    assert smr["container_annotations"] == ["smr.*", "smr.*/*"]
    assert smr["options"]["SystemdCgroup"] is True
    assert containerd["default_runtime_name"] == "nvidia"
    assert "nvidia" in containerd["runtimes"]


def test_a_newer_containerd_gets_a_drop_in_where_its_configuration_imports_one(node: Installation, engines: Path) -> None:
    """2.x merges tables key by key: the configuration itself stays as it is."""
    newer = engines / "containerd-new/bin"
    if not (newer / "containerd").is_file():
        pytest.skip("no newer containerd: run dev/provision")
    node.config.write_text(f'imports = ["/etc/containerd/conf.d/*.toml"]\n{NVIDIA}')
    text = node.config.read_text()
    words = node.words("--criu", node.criu, "--default-runtime")
    environment = {**os.environ, "PATH": f"{newer}:{os.environ['PATH']}"}
    run(words, env=environment, timeout_s=170)
    assert node.config.read_text() == text
    imported = node.base / "imported.toml"
    imported.write_text(text.replace("/etc/containerd", str(node.config.parent)))
    containerd = cri(run([newer / "containerd", "--config", imported, "config", "dump"]).stdout)
    assert containerd["default_runtime_name"] == "smr"
    assert containerd["runtimes"]["smr"]["options"]["BinaryName"] == "/usr/bin/nvidia-container-runtime"
    assert run(words, env=environment).stdout.splitlines()[-1] == "nothing to change"


@pytest.mark.parametrize("text", [None, "", 'disabled_plugins = ["cri"]\n'])
def test_other_containerd_configurations(node: Installation, text: str | None) -> None:
    """None, empty, and the one that Docker's package ships: containerd reads the result, and uninstall puts it back."""
    node.config.unlink()
    if text is not None:
        node.config.write_text(text)
    node.before = node.tree()
    node()
    dumped = run(["containerd", "--config", node.config, "config", "dump"]).stdout
    if text != 'disabled_plugins = ["cri"]\n':
        assert {"runc", "smr"} <= set(cri(dumped)["runtimes"])
    assert node().stdout.splitlines()[-1] == "nothing to change"
    node("--uninstall")
    node.assert_untouched()


def test_a_configuration_that_containerd_refuses_stops_the_run(node: Installation) -> None:
    """Nothing is registered on top of it, and nothing else of the run is left."""
    node.config.chmod(0o644)
    node.config.write_text('version = 2\nroot = 3\n[plugins."io.containerd.grpc.v1.cri"]\n')
    node.before = node.tree()
    done = node(check=False)
    assert done.returncode != 0
    assert "containerd" in done.stderr
    node.assert_untouched()


def test_podman_lists_the_runtime_and_keeps_the_nodes_hooks(installed: Installation) -> None:
    """podman itself reads the file; crun and runc are known to it as before."""
    environment = {**os.environ, "CONTAINERS_CONF": str(installed.containers)}
    storage = ["--root", installed.base / "storage", "--runroot", installed.base / "run", "--storage-driver", "vfs"]
    form = ["info", "--format", "{{.Host.OCIRuntime.Path}}"]
    podman = ["podman", *storage, "--cgroup-manager=cgroupfs", "--events-backend=file"]
    ours = run([*podman, "--runtime", "smr", *form], env=environment).stdout.strip()
    assert ours == str(installed.prefix / "bin/smr-runtime")
    assert run([*podman, "--runtime", "runc", *form], env=environment).stdout.strip().endswith("/runc")
    hooks = tomllib.loads(installed.containers.read_text())["engine"]["hooks_dir"]
    assert hooks == ["/etc/my-hooks", str(installed.prefix / "hooks.d"), str(installed.prefix / "hooks.d/precreate")]
    assert all(list(Path(folder).glob("*.json")) for folder in hooks[1:])


def test_someone_elses_program_of_our_name_is_not_replaced(node: Installation) -> None:
    """The run fails with its path and takes back what it did."""
    (node.root / "usr/local/bin/smr").write_text("#!/bin/sh\n")
    node.before = node.tree()
    done = node(check=False)
    assert done.returncode == 1
    assert f"{node.root}/usr/local/bin/smr is there and is not install.sh's" in done.stderr
    node.assert_untouched()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_the_middle_leaves_nothing(node: Installation, number: signal.Signals) -> None:
    """While pip runs: the files made so far, the folders and the temporary ones go."""
    process = started(node)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    node.assert_untouched()


def started(node: Installation) -> subprocess.Popen[bytes]:
    """install.sh, at the time when it has begun to make the virtual environment."""
    process = subprocess.Popen(
        # A shell that puts a job in the background has it ignore the signal, and a shell cannot trap what it was born to ignore.
        ["env", "--default-signal=INT", *node.words("--criu", node.criu)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(node.temporary)},
    )
    eventually((node.prefix / ".install/venv.new/bin").exists, what="venv.new")
    return process


def test_what_an_outright_killed_run_left_is_undone_by_the_next(node: Installation) -> None:
    """kill -9 leaves the journal; the next run, an uninstall too, first undoes what it says."""
    process = started(node)
    process.kill()
    process.wait(timeout=60)
    assert (node.prefix / ".install/journal").exists()
    eventually(lambda: not _pip_runs(node), what="pip of the killed run")
    assert "an earlier run was killed" in node("--uninstall").stdout
    node.assert_untouched()


def _pip_runs(node: Installation) -> bool:
    return run(["pgrep", "-f", f"{node.prefix}/.install/venv.new"], check=False).returncode == 0


@pytest.mark.parametrize("upgrade", [False, True])
def test_a_failed_write_undoes_the_whole_run(node: Installation, upgrade: bool) -> None:
    """containerd's folder cannot be written: a first run leaves nothing, a later one the installation as it was."""
    if upgrade:
        node("--engines", "podman")
    blocker = node.config.with_name("config.toml.smr-new")
    blocker.mkdir()
    (blocker / "x").write_text("x")
    node.before = node.tree()
    done = node("--engines", "podman,containerd", "--default-runtime", check=False)
    assert done.returncode == 1
    after = node.tree()
    assert "undoing" in done.stdout
    # the name of the temporary sibling is install.sh's own: what blocks it is swept away with it
    assert {key: value for key, value in after.items() if ".smr-new" not in key} == {
        key: value for key, value in node.before.items() if ".smr-new" not in key
    }


def test_two_runs_at_once_exclude_each_other(node: Installation) -> None:
    """The second says so and touches nothing; the first goes on."""
    process = started(node)
    second = node(check=False)
    assert second.returncode == 1
    assert "another run is in progress" in second.stderr
    assert process.wait(timeout=120) == 0
    assert node().stdout.splitlines()[-1] == "nothing to change"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-such"], "unknown option --no-such"),
        (["--prefix"], "--prefix needs a value"),
        (["--prefix", "/"], "--prefix cannot be /"),
        (["--engines", "podmen"], "'podmen' is none of"),
    ],
)
def test_wrong_options_are_told_with_the_usage(options: list[str], message: str) -> None:
    """Exit status 2, before anything is looked at."""
    done = run([REPOSITORY / "install.sh", *options], check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "usage: install.sh" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--criu", "/bin/true"], "must be named criu"),
        (["--runtime", "/bin/false"], "not an OCI runtime"),
        (["--python", "/bin/false"], "Python 3.11 to 3.13 with its venv module is needed, and /bin/false is not that"),
    ],
)
def test_unusable_parts_are_refused_and_leave_nothing(node: Installation, options: list[str], message: str) -> None:
    """Each is named with what is needed."""
    done = run(node.words("--criu", node.criu, *options), check=False, timeout_s=170)
    assert done.returncode == 1
    assert message in done.stderr
    assert node.tree() == node.before


def test_an_old_criu_is_refused(node: Installation) -> None:
    """4.1 is the first that restores what SMR needs."""
    old = node.base / "old/criu"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho 'Version: 3.17.1'\n")
    old.chmod(0o755)
    done = run(node.words("--criu", old), check=False, timeout_s=170)
    assert "4.1 or newer is needed, found '3.17.1'" in done.stderr
    assert node.tree() == node.before


@pytest.mark.slow
def test_a_private_criu_runs_with_its_own_loader_and_libraries(tmp_path: Path, engines: Path) -> None:
    """From the machine's own Debian archive, checked against the lock; from the cache too; an altered package is fetched anew."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("needs root and apt")
    cache = engines.parent / "install-cache"
    prefix = tmp_path / "smr"
    words = [REPOSITORY / "install.sh", "--criu-only", "--prefix", prefix, "--cache", cache]
    run(words, timeout_s=170)
    criu = prefix / "criu/sbin/criu"
    assert "Version: 4.1" in run([criu, "--version"]).stdout
    loaded = run([next((prefix / "criu/lib").glob("ld-linux-*")), "--list", criu]).stdout
    assert all(str(prefix) in line for line in loaded.splitlines() if "=>" in line)
    run([criu, "check"])
    assert run(words).stdout.splitlines()[-1] == "nothing to change"
    altered = next((cache / "debs").glob("libnet1_*.deb"))
    altered.write_bytes(altered.read_bytes()[:-1] + b"x")
    run([*words[:-4], "--prefix", tmp_path / "other", "--cache", cache], timeout_s=170)
    assert hashlib.sha256(altered.read_bytes()).hexdigest() in (REPOSITORY / "deploy/criu.lock").read_text()
    run([REPOSITORY / "install.sh", "--uninstall", "--prefix", prefix])
    assert not prefix.exists()


def test_the_scripts_are_clean() -> None:
    """shellcheck has nothing to say."""
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: run dev/provision")
    run(["shellcheck", "-x", "-P", REPOSITORY, REPOSITORY / "install.sh", REPOSITORY / "dev/criu-lock"])


def test_the_mirror_comes_from_both_forms_of_apt_sources(tmp_path: Path) -> None:
    """deb822 files and one-line lists; archives of main suites come before those of security and updates."""
    if shutil.which("apt-get") is None:
        pytest.skip("needs apt")
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "a.sources").write_text(
        "Types: deb\nURIs: http://one.example/security\nSuites: stable-security\nComponents: main\n\n"
        "Types: deb\nURIs: http://two.example/debian\nSuites: stable stable-updates\nComponents: main contrib\n"
    )
    (parts / "b.list").write_text("deb [arch=amd64] http://three.example/debian stable main\n")
    conf = tmp_path / "apt.conf"
    conf.write_text(f'Dir::Etc::sourcelist "/dev/null";\nDir::Etc::sourceparts "{parts}";\n')
    script = f'HERE={REPOSITORY} TMP={tmp_path}; . "$HERE/deploy/criu.sh"; archives'
    found = run(["sh", "-c", script], env={**os.environ, "APT_CONFIG": str(conf)}).stdout.split()
    assert found == ["http://two.example/debian/", "http://three.example/debian/", "http://one.example/security/"]


def altered_lock(tmp_path: Path, line: str) -> list[object]:
    """install.sh --criu-only with another line for libnet1 in the lock."""
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(REPOSITORY / "install.sh", copy)
    shutil.copytree(REPOSITORY / "deploy", copy / "deploy")
    lock = copy / "deploy/criu.lock"
    lock.write_text("".join(line if each.startswith("libnet1 ") else each for each in lock.read_text().splitlines(keepends=True)))
    return [copy / "install.sh", "--criu-only", "--prefix", tmp_path / "smr"]


@pytest.mark.slow
def test_a_pinned_package_that_is_gone_is_replaced_with_a_warning(tmp_path: Path, engines: Path) -> None:
    """A point release of the suite must not stop installations: apt's signature still holds."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("needs root and apt")
    words = altered_lock(tmp_path, f"libnet1 0.0-0 amd64 {'0' * 64}\n")
    done = run([*words, "--cache", engines.parent / "install-cache"], timeout_s=170)
    assert "warning: libnet1 0.0-0 is no longer in Debian trixie" in done.stdout
    assert "Version: 4.1" in run([tmp_path / "smr/criu/sbin/criu", "--version"]).stdout


@pytest.mark.slow
def test_a_package_whose_sum_is_not_the_pinned_one_is_refused(tmp_path: Path, engines: Path) -> None:
    """Same version, other bytes: nothing is unpacked and nothing is left."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("needs root and apt")
    pinned = next(
        each
        for each in (REPOSITORY / "deploy/criu.lock").read_text().splitlines()
        if each.startswith("libnet1 ") and "amd64" in each
    )
    words = altered_lock(tmp_path, f"{pinned.rsplit(' ', 1)[0]} {'0' * 64}\n")
    cache = tmp_path / "cache"
    shutil.copytree(engines.parent / "install-cache", cache, dirs_exist_ok=True)
    done = run([*words, "--cache", cache], check=False, timeout_s=170)
    assert done.returncode == 1
    assert "its SHA-256 is not the one in" in done.stderr
    assert not (tmp_path / "smr").exists()


def test_uninstall_waits_for_containers_that_run_through_smr(node: Installation) -> None:
    """Their monitors would find no runtime to stop them with; --force goes on."""
    node("--engines", "none")
    monitor = node.base / "conmon"
    monitor.write_text("#!/bin/sh\nread line\n")
    monitor.chmod(0o755)
    with subprocess.Popen([monitor, node.prefix / "bin/smr-runtime"], stdin=subprocess.PIPE) as process:
        eventually(lambda: (Path("/proc") / str(process.pid) / "comm").read_text() == "conmon\n")
        before = node.tree()
        done = node("--uninstall", check=False)
        assert done.returncode == 1
        assert f"containers run that need SMR (processes {process.pid})" in done.stderr
        assert node.tree() == before
        node("--uninstall", "--force")
        process.communicate(b"\n")
    node.assert_untouched()
