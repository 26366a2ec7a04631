"""A Gantt chart drawn twice from one layout: as a self-contained SVG in HTML, and as PNG through Pillow (extra `trace`).

A `Chart` holds panels, a panel holds bars on one time axis; times are seconds from the panel's zero. `layout` turns a chart
into shapes in pixels with roles instead of colours; the two painters know no times. The HTML loads nothing, runs no script,
and follows the reader's light or dark setting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from smr.proto.errors import Code, SmrError

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont

WIDTH = 980
_MARGIN = 28
_LABELS = 176  # width of the column of names
_VALUES = 96  # room right of the axis for the longest bar's value
_ROW = 30
_BAR = 20
_CHARACTER = 0.56  # mean width of a character in units of the font size
_PNG_SCALE = 2

# role -> (light, dark)
_COLOURS = {
    "page": ("#ffffff", "#14171c"),
    "ink": ("#1b1f24", "#e8eaed"),
    "faint": ("#5c6570", "#a2abb6"),
    "grid": ("#e3e7ec", "#2b313a"),
    "total": ("#9aa4b0", "#6d7784"),
    "grey": ("#9aa4b0", "#7d8794"),
    "blue": ("#3b75af", "#5b9bd9"),
    "sky": ("#6fb3e0", "#86c5ee"),
    "teal": ("#35978f", "#4fbdb3"),
    "green": ("#4f9d4b", "#6cc067"),
    "yellow": ("#d9a520", "#e6bc4a"),
    "orange": ("#e07b28", "#f19a54"),
    "red": ("#c44e52", "#e57377"),
    "purple": ("#8a63a8", "#b08fce"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One row: a span of time and what it is called. `colour` is one of the named colours of this module."""

    name: str
    start_s: float
    end_s: float
    colour: str = "blue"

    @property
    def length_s(self) -> float:
        """Length of the span."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Bars on one axis from zero to `total_s`, under a heading."""

    title: str
    bars: tuple[Bar, ...]
    total_s: float
    total_label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What one picture shows. `notes` are lines at its foot."""

    title: str
    subtitle: str = ""
    panels: tuple[Panel, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A filled rectangle; `tip` is what the pointer shows over it."""

    x: float
    y: float
    width: float
    height: float
    role: str
    tip: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A thin vertical line."""

    x: float
    top: float
    bottom: float
    role: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """Text on a baseline at `y`; `anchor` is start, middle or end. A halo of the page's colour sets it off from lines behind."""

    x: float
    y: float
    text: str
    size: int = 13
    role: str = "ink"
    anchor: str = "start"
    bold: bool = False
    halo: bool = False


Shape = Box | Rule | Label


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Shapes to paint in order, and the size of the whole."""

    width: int
    height: int
    shapes: tuple[Shape, ...]


def duration(seconds: float) -> str:
    """A length of time in three digits: 0.84 ms, 12.3 ms, 123 ms, 1.23 s, 12.3 s."""
    value, unit = (seconds * 1000, "ms") if abs(seconds) < 0.9995 else (seconds, "s")
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def ticks(total_s: float, most: int = 7) -> list[float]:
    """Round times from zero to `total_s`, at most `most` + 1 of them, in steps of 1, 2 or 5 times a power of ten."""
    if total_s <= 0:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(total_s / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if total_s / (power * factor) <= most)
    return [step * index for index in range(math.floor(total_s / step + 1e-9) + 1)]


def layout(chart: Chart) -> Scene:
    """Place everything. Names and values never lie on a bar's colour, so they need no contrast with it."""
    shapes: list[Shape] = []
    y = 44.0
    for text in _wrap(chart.title, 20):
        shapes.append(Label(x=_MARGIN, y=y, text=text, size=20, bold=True))
        y += 26
    for text in _wrap(chart.subtitle, 13):
        shapes.append(Label(x=_MARGIN, y=y - 2, text=text, role="faint"))
        y += 19
    for panel in chart.panels:
        y = _place_panel(panel, y + 32, shapes)
    for text in [line for note in chart.notes for line in _wrap(note, 12)]:
        y += 18
        shapes.append(Label(x=_MARGIN, y=y + 4, text=text, size=12, role="faint"))
    return Scene(width=WIDTH, height=math.ceil(y + 30), shapes=tuple(shapes))


def _place_panel(panel: Panel, y: float, shapes: list[Shape]) -> float:
    left, right = _MARGIN + _LABELS, WIDTH - _MARGIN - _VALUES
    scale = (right - left) / panel.total_s if panel.total_s > 0 else 0.0
    shapes.append(Label(x=_MARGIN, y=y, text=panel.title, size=15, bold=True))
    if panel.total_label:
        shapes.append(Label(x=WIDTH - _MARGIN, y=y, text=panel.total_label, size=14, anchor="end", bold=True))
    top = y + 14
    bottom = top + _ROW * len(panel.bars) + 4
    marks = ticks(panel.total_s)
    for mark in marks:
        x = left + mark * scale
        shapes.append(Rule(x=x, top=top, bottom=bottom, role="grid"))
        shapes.append(Label(x=x, y=bottom + 16, text=_tick(mark, panel.total_s), size=12, role="faint", anchor="middle"))
    shapes.append(Rule(x=right, top=top, bottom=bottom, role="total"))
    for row, bar in enumerate(panel.bars):
        _place_bar(bar, (left, right), scale, top + 6 + row * _ROW, shapes)
    return bottom + 22


def _place_bar(bar: Bar, axis: tuple[float, float], scale: float, y: float, shapes: list[Shape]) -> None:
    left, right = axis
    x = left + bar.start_s * scale
    width = max(2.0, bar.length_s * scale)
    tip = f"{bar.name}: {duration(bar.length_s)}, from {duration(bar.start_s)} to {duration(bar.end_s)}"
    base = y + _BAR - 5
    shapes.append(Label(x=left - 14, y=base, text=_shorten(bar.name, _LABELS - 14, 13), anchor="end"))
    shapes.append(Box(x=x, y=y, width=width, height=_BAR, role=bar.colour, tip=tip))
    value = duration(bar.length_s)
    room = 13 * _CHARACTER * len(value) + 7
    crosses_total = x + width + 2 < right < x + width + room + 3
    if crosses_total and x - room > left:
        shapes.append(Label(x=x - 7, y=base, text=value, role="faint", anchor="end", halo=True))
    else:
        shapes.append(Label(x=x + width + 7, y=base, text=value, role="faint", halo=True))


def _tick(mark: float, total_s: float) -> str:
    return f"{mark * 1000:g} ms" if total_s < 2 else f"{mark:g} s"


def _wrap(text: str, size: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, max(20, int((WIDTH - 2 * _MARGIN) / (size * _CHARACTER))))


def _shorten(text: str, width: float, size: int) -> str:
    fits = int(width / (size * _CHARACTER))
    return text if len(text) <= fits else text[: fits - 1] + "\u2026"


def to_html(chart: Chart) -> str:
    """A whole HTML document."""
    scene = layout(chart)
    light = "".join(f"--{role}:{colours[0]};" for role, colours in _COLOURS.items())
    dark = "".join(f"--{role}:{colours[1]};" for role, colours in _COLOURS.items())
    body = "\n".join(_svg(shape) for shape in scene.shapes)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{escape(chart.title)}</title>\n<style>\n'
        f":root{{color-scheme:light dark;{light}}}\n@media(prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        "body{margin:0;background:var(--page)}\n"
        f"svg{{display:block;margin:0 auto;width:100%;max-width:{scene.width}px;height:auto;"
        "font-family:system-ui,'Segoe UI','Helvetica Neue',Arial,sans-serif;font-variant-numeric:tabular-nums}\n"
        f"</style>\n</head>\n<body>\n"
        f'<svg viewBox="0 0 {scene.width} {scene.height}" role="img" aria-label="{escape(chart.title, quote=True)}">\n'
        f"{body}\n</svg>\n</body>\n</html>\n"
    )


def _svg(shape: Shape) -> str:
    if isinstance(shape, Box):
        place = f'x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}" height="{shape.height:.1f}"'
        return f'<rect {place} rx="3" style="fill:var(--{shape.role})"><title>{escape(shape.tip)}</title></rect>'
    if isinstance(shape, Rule):
        place = f'x1="{shape.x:.1f}" x2="{shape.x:.1f}" y1="{shape.top:.1f}" y2="{shape.bottom:.1f}"'
        return f'<line {place} style="stroke:var(--{shape.role})"/>'
    weight = ' font-weight="600"' if shape.bold else ""
    place = f'x="{shape.x:.1f}" y="{shape.y:.1f}" font-size="{shape.size}" text-anchor="{shape.anchor}"{weight}'
    halo = ";stroke:var(--page);stroke-width:4;paint-order:stroke" if shape.halo else ""
    return f'<text {place} style="fill:var(--{shape.role}){halo}">{escape(shape.text)}</text>'


def write_png(chart: Chart, file: Path) -> None:
    """Paint `chart` to `file` in the light colours. UNSUPPORTED without Pillow."""
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise SmrError(
            "a PNG needs Pillow, which is not installed",
            hint="pip install 'smr-restore[trace]', or write FILE.html, which needs nothing",
            code=Code.UNSUPPORTED,
        ) from error
    scene = layout(chart)
    size = (scene.width * _PNG_SCALE, scene.height * _PNG_SCALE)
    picture = Image.new("RGB", size, _COLOURS["page"][0])
    draw = ImageDraw.Draw(picture)
    fonts = _Fonts()
    for shape in scene.shapes:
        _paint(draw, fonts, shape)
    picture.save(file, "PNG", optimize=True)


class _Fonts:
    """Pillow's own scalable font, by size; there is no bold one, so bold is painted with a thin stroke."""

    def __init__(self) -> None:
        self._known: dict[int, ImageFont.FreeTypeFont | ImageFont.ImageFont] = {}

    def get(self, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        from PIL import ImageFont

        if size not in self._known:
            self._known[size] = ImageFont.load_default(size * _PNG_SCALE)
        return self._known[size]


def _paint(draw: ImageDraw.ImageDraw, fonts: _Fonts, shape: Shape) -> None:
    colour = _COLOURS[shape.role][0]
    if isinstance(shape, Box):
        corners = _scaled(shape.x, shape.y, shape.x + shape.width, shape.y + shape.height)
        draw.rounded_rectangle(corners, radius=min(3.0, shape.width / 2) * _PNG_SCALE, fill=colour)
    elif isinstance(shape, Rule):
        draw.line(_scaled(shape.x, shape.top, shape.x, shape.bottom), fill=colour, width=_PNG_SCALE)
    else:
        anchor = {"start": "ls", "middle": "ms", "end": "rs"}[shape.anchor]
        at = (shape.x * _PNG_SCALE, shape.y * _PNG_SCALE)
        if shape.halo:
            page = _COLOURS["page"][0]
            draw.text(at, shape.text, fill=page, font=fonts.get(shape.size), anchor=anchor, stroke_width=4, stroke_fill=page)
        stroke = 0.7 if shape.bold else 0
        draw.text(at, shape.text, fill=colour, font=fonts.get(shape.size), anchor=anchor, stroke_width=stroke)


def _scaled(*values: float) -> Sequence[float]:
    return tuple(value * _PNG_SCALE for value in values)
