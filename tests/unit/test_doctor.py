"""smr doctor: secrets do not get into the report, and no state of the node keeps it from being made."""

from __future__ import annotations

import json
import tarfile
import threading
from pathlib import Path

import pytest

from smr.proto.errors import Code, SmrError
from smr.shim.config import Config
from smr.shim.doctor import archive, collect, sections
from smr.shim.doctor.collect import MOST_CHARACTERS, Part
from smr.shim.doctor.redact import GONE, Redactor, known_values
from smr.shim.state import Record, begin

SECRET = "s3cr3t-Value"


@pytest.mark.parametrize(
    "text",
    [
        f"PASSWORD={SECRET}",
        f"db_password: {SECRET}",
        f'{{"api_key": "{SECRET}"}}',
        f'{{"msg": "set {{\\"token\\": \\"{SECRET}\\"}}"}}',
        f"--api-key {SECRET} --port 80",
        f"--hf-token={SECRET}",
        f'["serve", "--api-key", "{SECRET}"]',
        f"['serve', '--api-key', '{SECRET}']",
        f"Authorization: Bearer {SECRET}",
        f"authorization: basic {SECRET}==",
        f"https://user:{SECRET}@example.com/v1",
        f"https://example.com/?access_token={SECRET}&x=1",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----\n{SECRET}",
        "hf_s3cr3t-Value",
        "sk-s3cr3t-Value",
        "eyJhbGciOiJIUzI1NiJ9.s3cr3t-Value.x",
        f"AWS_SECRET_ACCESS_KEY={SECRET}",
        f"cookie: {SECRET}; path=/",
    ],
)
def test_what_looks_like_a_secret_goes(text: str) -> None:
    """By the word before it, or by its form; what is around it stays."""
    found = Redactor()(text)
    assert SECRET not in found
    assert GONE in found


@pytest.mark.parametrize(
    "text",
    [
        "no image llama:1 in /var/lib/smr (did you mean llama:2?)",
        '{"event": "runtime_bypassed", "code": "unsupported", "total_s": 0.25}',
        "criu 4.1.1 at /opt/smr/criu/sbin/criu",
        "sha256:1c6a9a0f4e2c8f0e6f8d1a7b1d3b2f4a",
        "unix:/run/smr/agent.sock, https://example.com/path@2x",
    ],
)
def test_what_is_none_stays(text: str) -> None:
    """A report without its facts is of no use."""
    assert Redactor()(text) == text


def test_known_values_go_wherever_they_stand() -> None:
    """Whatever they look like, the longest first; what is too short to be one stays."""
    redact = Redactor(["correct horse", "correct horse battery", "80"])
    assert redact("said: correct horse battery, port 80") == f"said: {GONE}, port 80"
    odd = 'two\n"lines" é'
    assert Redactor([odd])(json.dumps({"reason": odd})) == json.dumps({"reason": GONE})


def test_environments_of_containers_are_known(tmp_path: Path) -> None:
    """Of every record's bundle; ordinary names are none, a bundle that has gone is no error."""
    config = Config(run=tmp_path / "run")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    spec = {
        "ociVersion": "1.0.2",
        "process": {"args": ["x"], "env": ["PATH=/usr/bin", f"KEY={SECRET}", "PEM=one line\ntwo lines"]},
    }
    (bundle / "config.json").write_text(json.dumps(spec))
    begin(config.run, Record(id="c1", root="", bundle=str(bundle), image="a"))
    begin(config.run, Record(id="c2", root="", bundle=str(tmp_path / "gone"), image="a"))
    assert {SECRET, "one line", "two lines"} <= set(known_values(config))
    assert "/usr/bin" not in set(known_values(config))


def test_a_section_that_fails_or_hangs_costs_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The others are there; the report says what went wrong, without the secret in it."""
    monkeypatch.setenv("SMR_CONFIG", str(tmp_path / "none.toml"))
    release = threading.Event()

    def broken(_: Config) -> object:
        raise SmrError(f"cannot log in with password={SECRET}", code=Code.INTERNAL)

    def worse(_: Config) -> object:
        raise MemoryError

    found = collect.collect(
        {"good": lambda _: {"n": 1}, "broken": broken, "worse": worse, "late": lambda _: release.wait()}, patience_s=0.5
    )
    release.set()
    assert found["good"] == Part(content={"n": 1})
    assert found["broken"].error.startswith("cannot log in")
    assert SECRET not in found["broken"].error
    assert "MemoryError" in found["worse"].error
    assert "did not end within 0.5 s" in found["late"].error


def test_bad_settings_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The report is made with the defaults, and says so."""
    (tmp_path / "smr.toml").write_text("[smr]\nstroe = 1\n")
    monkeypatch.setenv("SMR_CONFIG", str(tmp_path / "smr.toml"))
    monkeypatch.setenv("SMR_RUN", str(tmp_path / "run"))
    found = collect.collect({"run": lambda config: str(config.run)})
    assert "unknown key 'stroe'" in str(found["settings_problem"].content)
    assert found["run"].content == str(tmp_path / "run")


def test_the_report_is_bounded_and_redacted_all_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Members by their names, items after a flag, and the end of what is long."""
    monkeypatch.setenv("SMR_CONFIG", str(tmp_path / "none.toml"))
    data = {
        "password": SECRET,
        "args": ["serve", "--token", SECRET, "--port", "80"],
        "deep": [{"api-key": SECRET}],
        "n": 1,
        "none": None,
        "empty": [],
    }
    found = collect.collect({"data": lambda _: data, "long": lambda _: "x" * MOST_CHARACTERS * 2 + "end"})
    assert found["data"].content == {
        "password": GONE,
        "args": ["serve", "--token", GONE, "--port", "80"],
        "deep": [{"api-key": GONE}],
        "n": 1,
        "none": None,
        "empty": [],
    }
    long = str(found["long"].content)
    assert long.endswith("end")
    assert len(long) < MOST_CHARACTERS + 100


def test_the_archive(tmp_path: Path) -> None:
    """A file a section in one folder, for its owner alone; replaced whole."""
    report = {"data": Part(content={"a": 1}), "log": Part(content="line\n"), "bad": Part(error="no")}
    target = tmp_path / "report.tar.gz"
    archive.write(report, target)
    archive.write(report, target)
    assert target.stat().st_mode & 0o777 == 0o600
    with tarfile.open(target) as tar:
        members = {Path(member.name).name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]  # files
        assert len({Path(name).parent for name in tar.getnames()}) == 1
    assert members == {"data.json": b'{\n  "a": 1\n}\n', "log.txt": b"line\n", "bad.txt": b"could not be collected: no\n"}
    assert [path.name for path in tmp_path.iterdir()] == ["report.tar.gz"]


@pytest.mark.parametrize("name", ["report.zip", "none/report.tar.gz"])
def test_a_wrong_target_is_told_before_the_work(tmp_path: Path, name: str) -> None:
    """Not after a minute."""
    with pytest.raises(SmrError) as caught:
        archive.check_target(tmp_path / name)
    assert caught.value.code is Code.USAGE


def test_containerds_registries_are_not_collected(tmp_path: Path) -> None:
    """Of its configuration only runtimes: credentials of registries stand in the same file."""
    text = f"""
version = 2
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "smr"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.smr]
runtime_type = "io.containerd.smr.v1"
[plugins."io.containerd.grpc.v1.cri".registry.configs."r.example".auth]
username = "someone-known"
auth = "{SECRET}"
"""
    (tmp_path / "config.toml").write_text(text)
    found = json.dumps(sections._runtimes(tmp_path / "config.toml"))
    assert '"default_runtime_name": "smr"' in found
    assert "someone-known" not in found
    assert SECRET not in found
