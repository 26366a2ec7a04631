"""install.sh --make-bundle and --bundle: a node without a network gets all from one file, and uninstall leaves nothing of it."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from pathlib import Path

import pytest

from tests.integration.command import Done, run
from tests.integration.test_install import REPOSITORY, Installation, wheels  # noqa: F401  # a fixture

pytestmark = pytest.mark.slow
LARGEST_BYTES = 64 << 20


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the bundle's programs will stand: they have the path of their loader in them."""
    return tmp_path_factory.mktemp("bundled") / "opt/smr"


@pytest.fixture(scope="module")
def bundle(prefix: Path, wheels: Path, engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A bundle for this Python with CRIU and runc, from Debian's archive and the wheels that are here."""
    if shutil.which("apt-get") is None:
        pytest.skip("needs apt")
    file = tmp_path_factory.mktemp("bundle") / "smr-bundle.tar.gz"
    (package,) = wheels.glob("smr_restore-*.whl")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    words: list[object] = [
        REPOSITORY / "install.sh",
        "--make-bundle",
        file,
        "--prefix",
        prefix,
        "--python",
        version,
        "--with-runc",
    ]
    words += ["--source", package, "--wheels", wheels, "--cache", engines.parent / "install-cache"]
    run(words, timeout_s=170)
    return file


@pytest.fixture
def path_without_engines(tmp_path: Path) -> str:
    """A PATH with all programs of this machine but runtimes and CRIU."""
    farm = tmp_path / "bin"
    farm.mkdir()
    for folder in (Path(sys.base_prefix, "bin"), *(Path(each) for each in ("/usr/bin", "/usr/sbin", "/bin", "/sbin"))):
        for program in folder.iterdir():
            if program.name not in {"runc", "crun", "criu", "podman", "containerd"} and not (farm / program.name).exists():
                (farm / program.name).symlink_to(program)
    return str(farm)


class Bare(Installation):
    """A node without network, runtime and CRIU, whose prefix is the bundle's."""

    def __init__(self, base: Path, prefix: Path, path: str, wheels: Path) -> None:  # noqa: F811
        super().__init__(base, wheels, base / "no-criu")
        self.prefix, self.path = prefix, path
        self.before = self.tree()

    def __call__(self, *options: object, check: bool = True) -> Done:
        words = ["unshare", "--net", REPOSITORY / "install.sh", "--prefix", self.prefix, "--root", self.root, *options]
        return run(words, check=check, timeout_s=170, env={**os.environ, "PATH": self.path, "TMPDIR": str(self.temporary)})


@pytest.fixture
def bare(tmp_path: Path, prefix: Path, path_without_engines: str, wheels: Path) -> Bare:  # noqa: F811
    """That node."""
    return Bare(tmp_path / "node", prefix, path_without_engines, wheels)


def test_a_bundle_is_small_and_has_what_a_node_needs(bundle: Path) -> None:
    """CRIU for both kinds of kernels, runc, wheels, and install.sh itself."""
    assert bundle.stat().st_size < LARGEST_BYTES
    with tarfile.open(bundle) as archive:
        names = archive.getnames()
    for name in ("install.sh", "format", "criu/trixie/sbin/criu", "criu/forky/sbin/criu", "runc/sbin/runc", "deploy/bundle.sh"):
        assert f"smr-bundle/{name}" in names
    assert any("/wheels/protobuf-" in name for name in names)
    assert sum("/wheels/smr_restore-" in name for name in names) == 1


def test_a_node_without_a_network_is_installed_and_left_as_it_was(bare: Bare, bundle: Path) -> None:
    """All programs run; a dry run says what comes; a second run changes nothing; uninstall leaves nothing."""
    dry = bare("--bundle", bundle, "--dry-run").stdout
    bare.assert_untouched()
    real = bare("--bundle", bundle).stdout
    would = [line.removeprefix("would ") for line in dry.splitlines() if line.startswith("would ")]
    assert would
    assert [line for line in real.splitlines() if line.split()[0] in ("create", "change", "link")] == would
    environment = {"PATH": "/nowhere", "SMR_RUNTIME": str(bare.prefix / "runc/sbin/runc")}
    assert "Version: 4." in run([bare.prefix / "criu/sbin/criu", "--version"], env=environment).stdout
    assert "runc version" in run([bare.prefix / "runc/sbin/runc", "--version"], env=environment).stdout
    assert "Usage" in run([bare.prefix / "venv/bin/smr", "--help"], env=environment).stdout
    assert (bare.root / "etc/smr/runtime").read_text().strip() == str(bare.prefix / "runc/sbin/runc")
    before = bare.tree()
    assert bare("--bundle", bundle).stdout.splitlines()[-1] == "nothing to change"
    assert bare.tree() == before
    bare("--uninstall")
    bare.assert_untouched()


def test_the_machines_own_runtime_comes_first(bare: Bare, bundle: Path) -> None:
    """A node that has runc keeps it: the bundle's is not installed."""
    runc = shutil.which("runc", path="/usr/sbin:/usr/bin")
    if runc is None:
        pytest.skip("runc is not installed: run dev/provision")
    Path(bare.path, "runc").symlink_to(runc)
    bare("--bundle", bundle)
    assert not (bare.prefix / "runc").exists()
    bare("--uninstall")
    bare.assert_untouched()


def test_the_bundles_own_install_sh(bare: Bare, bundle: Path, tmp_path: Path) -> None:
    """The file alone is enough: unpacked, its install.sh installs from its folder."""
    run(["tar", "-C", tmp_path, "-xf", bundle])
    folder = tmp_path / "smr-bundle"
    words = ["unshare", "--net", folder / "install.sh", "--bundle", folder, "--prefix", bare.prefix, "--root", bare.root]
    run(words, timeout_s=170, env={**os.environ, "PATH": bare.path, "TMPDIR": str(bare.temporary)})
    assert (bare.prefix / "venv/bin/smr").exists()
    bare("--uninstall")
    bare.assert_untouched()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 {arch} /elsewhere", "is for --prefix /elsewhere"),
        ("1 s390x {prefix}", "is for s390x"),
        ("9 {arch} {prefix}", "has format 9"),
    ],
)
def test_a_bundle_for_another_node_is_refused(bare: Bare, bundle: Path, tmp_path: Path, text: str, message: str) -> None:
    """Prefix, architecture and format are looked at before anything is done."""
    run(["tar", "-C", tmp_path, "-xf", bundle, "smr-bundle/format"])
    file = tmp_path / "smr-bundle/format"
    file.write_text(text.format(arch=file.read_text().split()[1], prefix=bare.prefix) + "\n")
    done = bare("--bundle", tmp_path / "smr-bundle", check=False)
    assert done.returncode == 1
    assert message in done.stderr
    bare.assert_untouched()


def test_a_damaged_bundle_is_refused(bare: Bare, bundle: Path, tmp_path: Path) -> None:
    """Half a file, and something else: told, and nothing is left."""
    half = tmp_path / "half.tar.gz"
    half.write_bytes(bundle.read_bytes()[: bundle.stat().st_size // 2])
    other = tmp_path / "other.tar.gz"
    other.write_text("no archive")
    for file in (half, other, tmp_path / "not-there"):
        done = bare("--bundle", file, check=False)
        assert done.returncode == 1
        assert str(file) in done.stderr
        bare.assert_untouched()


def test_a_dry_run_of_making_one(tmp_path: Path) -> None:
    """It says what it would make and fetches nothing."""
    file = tmp_path / "bundle.tar.gz"
    done = run(
        ["unshare", "--net", REPOSITORY / "install.sh", "--make-bundle", file, "--python", "3.12", "--with-runc", "--dry-run"]
    )
    assert f"would create {file}" in done.stdout
    assert "Python 3.12" in done.stdout
    assert not file.exists()
