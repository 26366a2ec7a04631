"""Messages in the runtime's log as runc writes them, and SMR's own log."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from smr.proto.errors import SmrError
from smr.shim.log import canonical_line, runtime_failure, runtime_message

_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d)"
ODD = 'a "quoted" word,\na second line, a \\ and é'


def test_json_is_what_containerd_reads(tmp_path: Path) -> None:
    """level, msg and time, one object a line; containerd takes the last line with level error."""
    log = tmp_path / "log.json"
    runtime_message(log, "json", "warning", "first")
    runtime_message(log, "json", "error", ODD)
    first, second = [json.loads(line) for line in log.read_text().splitlines()]
    assert (first["level"], first["msg"]) == ("warning", "first")
    assert (second["level"], second["msg"]) == ("error", ODD)
    assert re.fullmatch(_TIME, second["time"])
    assert second.keys() == {"level", "msg", "time"}


@pytest.mark.parametrize("log_format", ["text", "", "other"])
def test_text_is_one_line_in_logrus_form(tmp_path: Path, log_format: str) -> None:
    """time, level, msg, the message quoted, so that a newline in it does not end the line."""
    log = tmp_path / "log"
    runtime_message(log, log_format, "error", ODD)
    (line,) = log.read_text().splitlines()
    match = re.fullmatch(rf'time="{_TIME}" level=error msg=(".*")', line)
    assert match is not None
    assert json.loads(match[2]) == ODD


def test_log_is_appended_to(tmp_path: Path) -> None:
    """What the real runtime wrote before stays."""
    log = tmp_path / "log"
    log.write_text("before\n")
    runtime_message(log, "text", "error", "m")
    assert log.read_text().startswith("before\ntime=")


def test_without_a_log_it_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """As runc does; stdout is never written."""
    runtime_message(None, "json", "error", "m")
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err)["msg"] == "m"


def test_log_that_cannot_be_written_is_stderr_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message is not lost with the file."""
    runtime_message(tmp_path / "no" / "log", "text", "error", "m")
    out, err = capsys.readouterr()
    assert out == ""
    assert 'msg="m"' in err


def test_failure_is_in_the_log_and_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """containerd reads the log, conmon stderr; both get message and hint."""
    log = tmp_path / "log"
    runtime_failure(log, "json", SmrError("no image a", hint="smr images ls"))
    assert json.loads(log.read_text())["msg"] == "smr: no image a (smr images ls)"
    assert capsys.readouterr().err == "smr: no image a (smr images ls)\n"


def test_failure_without_a_log_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """On stderr, in the form of the log."""
    runtime_failure(None, "text", SmrError("no image a"))
    assert capsys.readouterr().err.count("no image a") == 1


def test_canonical_line_is_one_json_object(tmp_path: Path) -> None:
    """Event, time and the values; the folder is made."""
    log = tmp_path / "smr" / "smr.log"
    canonical_line(log, "restored", container="c1", stages_s={"locate": 0.1}, reason=ODD)
    canonical_line(log, "restored", container="c2")
    first, second = [json.loads(line) for line in log.read_text().splitlines()]
    assert (first["event"], first["container"], first["stages_s"], first["reason"]) == ("restored", "c1", {"locate": 0.1}, ODD)
    assert second["container"] == "c2"
    assert first["timestamp"]


def test_canonical_line_never_fails_a_container(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A log that cannot be written is said on stderr."""
    (tmp_path / "smr").write_text("a file in its place")
    canonical_line(tmp_path / "smr" / "smr.log", "restored")
    assert str(tmp_path / "smr" / "smr.log") in capsys.readouterr().err
