"""Pictures of a restore: what is drawn where, and the two files it is written to."""

from __future__ import annotations

import builtins
import itertools
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from smr.proto.errors import Code, SmrError
from smr.shim import trace
from smr.shim.chart import WIDTH, Bar, Box, Chart, Label, Panel, Rule, duration, layout, ticks, to_html
from smr.shim.cli import main
from smr.shim.state import Record, Stage, Status, begin

STAGES = [
    Stage(name="locate", start_s=0.0, end_s=0.004),
    Stage(name="create", start_s=0.071, end_s=0.622),
    Stage(name="prefetch", start_s=0.001, end_s=0.41),
    Stage(name="start", start_s=0.793, end_s=0.8421),
]


def record(**values):
    known = {
        "id": "2a2c548ed640ff32",
        "root": "",
        "bundle": "/b",
        "image": "web:1",
        "status": Status.RESTORED,
        "digest": "sha256:" + "ab" * 32,
        "started": "2026-01-02T03:04:05.678+00:00",
        "stages": STAGES,
    }
    return Record(**(known | values))


def boxes(chart):
    return [shape for shape in layout(chart).shapes if isinstance(shape, Box)]


def texts(chart):
    return [shape.text for shape in layout(chart).shapes if isinstance(shape, Label)]


def test_title_names_container_status_and_image():
    """The title says which container came from which image; the id and digest are below it."""
    chart = trace.chart(record(), "web-7")
    assert chart.title == "web-7: restored from web:1"
    assert "2a2c548ed640" in chart.subtitle
    assert "sha256:abababababab" in chart.subtitle


def test_total_is_the_end_of_the_last_stage():
    """The total is a point in time, not the sum of stages that overlap."""
    panel = trace.chart(record()).panels[0]
    assert panel.total_s == 0.8421
    assert panel.total_label == "total 842 ms"


def test_bars_are_in_order_of_start_and_overlap_as_recorded():
    """Prefetch runs beside the other stages, and is drawn so."""
    drawn = boxes(trace.chart(record()))
    assert [box.tip.split(":")[0] for box in drawn] == ["locate", "prefetch", "create", "start"]
    prefetch, create = drawn[1], drawn[2]
    assert prefetch.x < create.x < prefetch.x + prefetch.width
    assert all(one.y + one.height < other.y for one, other in itertools.pairwise(drawn))


def test_bar_lengths_are_proportional():
    """Twice the time is twice the width."""
    bars = (Bar(name="a", start_s=0, end_s=1), Bar(name="b", start_s=1, end_s=3))
    one, two = boxes(Chart(title="t", panels=(Panel(title="p", bars=bars, total_s=3.0),)))
    assert two.width == pytest.approx(2 * one.width)
    assert two.x == pytest.approx(one.x + one.width)


def test_nothing_leaves_the_page():
    """Bars and their values stay inside the picture, the last bar's value too."""
    scene = layout(trace.chart(record(id="x" * 64, image="registry/very/long/name/" * 12 + ":tag")))
    for shape in scene.shapes:
        if isinstance(shape, Box):
            assert shape.x >= 0 and shape.x + shape.width <= WIDTH and shape.y + shape.height <= scene.height
        elif isinstance(shape, Rule):
            assert 0 <= shape.x <= WIDTH and shape.bottom <= scene.height
        else:
            extent = len(shape.text) * shape.size * 0.56
            end = {"start": shape.x + extent, "middle": shape.x + extent / 2, "end": shape.x}[shape.anchor]
            assert end <= WIDTH and shape.y < scene.height


def test_failed_restore_shows_its_reason():
    """A container that started cold says why at the foot of its picture."""
    chart = trace.chart(record(status=Status.COLD, reason="CRIU 3.17 is too old", reason_code="criu_too_old"))
    assert chart.title == "2a2c548ed640: cold from web:1"
    assert "criu_too_old: CRIU 3.17 is too old" in texts(chart)


def test_no_stages_is_an_error_with_a_hint():
    """There is nothing to draw for a container whose restore never began."""
    with pytest.raises(SmrError) as caught:
        trace.chart(record(stages=[]), "web-7")
    assert caught.value.code is Code.CONTAINER_STATE
    assert "smr inspect web-7" in caught.value.hint


def test_html_is_well_formed_self_contained_and_escaped():
    """No script, no address to load from, dark colours, and names from outside cannot become markup."""
    page = to_html(trace.chart(record(image="a&b<script>alert(1)</script>"), '<b>"x"</b>'))
    ElementTree.fromstring(page.split("<body>")[1].split("</body>")[0].strip())
    assert "<script" not in page
    assert not re.search(r"(?:src|href|url)\s*[=(]", page)
    assert "http" not in page
    assert "prefers-color-scheme:dark" in page


def test_every_role_has_a_colour_in_the_html():
    """A shape without a colour would be painted black in both modes."""
    page = to_html(trace.chart(record(stages=[*STAGES, Stage(name="device", start_s=0.1, end_s=0.2)])))
    used = set(re.findall(r"var\(--(\w+)\)", page))
    assert used
    assert used <= set(re.findall(r"--(\w+):#", page))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.00 ms"),
        (0.00084, "0.84 ms"),
        (0.0123, "12.3 ms"),
        (0.1234, "123 ms"),
        (0.99949, "999 ms"),
        (1.234, "1.23 s"),
        (12.34, "12.3 s"),
    ],
)
def test_durations_have_three_digits(seconds, text):
    """A reader compares lengths at a glance."""
    assert duration(seconds) == text


@pytest.mark.parametrize("total", [0.0, 1e-6, 0.0421, 0.7, 1.0, 9.99, 61.0])
def test_ticks_are_round_and_few(total):
    """The axis begins at zero, never passes the total and carries at most eight marks."""
    marks = ticks(total)
    assert marks[0] == 0
    assert len(marks) <= 8
    assert marks[-1] <= total * (1 + 1e-6)
    if total:
        assert len(marks) >= 3


def test_writes_html_and_png(tmp_path):
    """The name of the file chooses the format; nothing but the picture is left in its folder."""
    chart = trace.chart(record())
    trace.write(chart, tmp_path / "a.html")
    trace.write(chart, tmp_path / "b.PNG")
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "b.PNG").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.PNG"]


def test_png_shows_the_bars(tmp_path):
    """Each stage's colour is found in the picture."""
    from PIL import Image

    trace.write(trace.chart(record()), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert (0xE0, 0x7B, 0x28) in colours
    assert (0x6F, 0xB3, 0xE0) in colours


def test_png_without_pillow_names_the_extra(tmp_path, monkeypatch):
    """The error says what to install and what works without it."""
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("PIL"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(SmrError) as caught:
        trace.write(trace.chart(record()), tmp_path / "a.png")
    assert caught.value.code is Code.UNSUPPORTED
    assert "smr-restore[trace]" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["picture", "picture.svg", "missing/picture.html"])
def test_unknown_format_or_folder_is_refused(tmp_path, name):
    """Before anything is drawn."""
    with pytest.raises(SmrError) as caught:
        trace.check_target(tmp_path / name)
    assert caught.value.code is Code.USAGE


@pytest.fixture
def known(tmp_path, monkeypatch):
    """A container of this record in a state directory of its own."""
    monkeypatch.setenv("SMR_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("SMR_CONFIG", str(tmp_path / "smr.toml"))
    state = begin(tmp_path / "run", record())
    state.save()
    return state.record


def test_command_draws_a_known_container(known, tmp_path, capsys):
    """`smr trace ID -o FILE --json` says where the picture is and how long all took."""
    with pytest.raises(SystemExit) as ended:
        main(["trace", known.id[:8], "-o", str(tmp_path / "a.html"), "--json"])
    assert ended.value.code == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"file": str(tmp_path / "a.html"), "container": known.id, "total_s": 0.8421}
    assert "restored from web:1" in (tmp_path / "a.html").read_text()


def test_command_refuses_a_format_before_it_looks_for_the_container(known, tmp_path, capsys):
    """Exit status 2, with a name that would do."""
    with pytest.raises(SystemExit) as ended:
        main(["trace", known.id, "-o", str(tmp_path / "a.svg")])
    assert ended.value.code == 2
    assert "a.html" in capsys.readouterr().err
