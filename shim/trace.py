"""The picture of one restore: its stages as a Gantt chart, from the state record that the runtime keeps until `delete`.

The record (`smr.shim.state`) times stages from the moment the runtime first saw the annotation. What is drawn is what was
recorded: a stage that overlaps another (prefetch) overlaps it in the picture, and the total is the end of the last stage.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from smr.proto.errors import Code, SmrError
from smr.shim.chart import Bar, Chart, Panel, duration, to_html, write_png
from smr.shim.files import write_atomic
from smr.shim.state import Record, Stage

FORMATS = (".html", ".png")

_COLOURS = {
    "locate": "grey",
    "preflight": "blue",
    "prefetch": "sky",
    "rootfs": "teal",
    "rewrite": "yellow",
    "create": "orange",
    "fill": "red",
    "start": "green",
    "cold": "grey",
}
_CYCLE = ("purple", "blue", "teal", "yellow")


def chart(record: Record, name: str = "") -> Chart:
    """The chart of one container; `name` is what its engine calls it. CONTAINER_STATE when no stage was recorded."""
    what = name or record.id[:12]
    if not record.stages:
        raise SmrError(
            f"container {what} has no recorded stages: status {record.status.value}",
            hint=f"'smr inspect {what}' shows what is known of it",
            code=Code.CONTAINER_STATE,
            container=record.id,
        )
    end = total_s(record.stages)
    panel = Panel(title="Stages", bars=tuple(stage_bars(record.stages)), total_s=end, total_label=f"total {duration(end)}")
    return Chart(
        title=f"{what}: {record.status.value} from {record.image or record.digest}",
        subtitle=_subtitle(record),
        panels=(panel,),
        notes=tuple(_notes(record)),
    )


def stage_bars(stages: Iterable[Stage], offset_s: float = 0.0) -> list[Bar]:
    """One bar a stage in order of their starts, moved by `offset_s`."""
    ordered = sorted(stages, key=lambda stage: (stage.start_s, stage.end_s))
    names = [stage.name for stage in ordered]
    others = [name for name in dict.fromkeys(names) if name not in _COLOURS]
    colours = _COLOURS | {name: _CYCLE[index % len(_CYCLE)] for index, name in enumerate(others)}
    return [Bar(name=s.name, start_s=s.start_s + offset_s, end_s=s.end_s + offset_s, colour=colours[s.name]) for s in ordered]


def total_s(stages: Iterable[Stage]) -> float:
    """The end of the last stage, seconds since the record's start."""
    return max((stage.end_s for stage in stages), default=0.0)


def check_target(file: Path) -> None:
    """Raise USAGE unless `file` ends in a format we write and its folder is there."""
    if file.suffix.lower() not in FORMATS:
        raise SmrError(
            f"cannot tell the format of {file}: needed a name that ends in .html or .png",
            hint=f"use -o {file.with_suffix('.html')}",
            code=Code.USAGE,
        )
    if not file.absolute().parent.is_dir():
        raise SmrError(f"no such folder: {file.absolute().parent}", hint=f"mkdir -p {file.parent}", code=Code.USAGE)


def write(picture: Chart, file: Path) -> None:
    """Write `picture` as HTML or PNG by the name of `file`; whole or not at all. USAGE for another name."""
    check_target(file)
    try:
        if file.suffix.lower() == ".html":
            write_atomic(file, to_html(picture).encode(), mode=0o644)
        else:
            _write_png(picture, file)
    except OSError as error:
        raise SmrError(f"cannot write {file}: {error.strerror}", code=Code.USAGE, file=file) from error


def _write_png(picture: Chart, file: Path) -> None:
    temporary = file.with_name(f".{file.name}.tmp.png")
    try:
        write_png(picture, temporary)
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)


def _subtitle(record: Record) -> str:
    parts = [f"container {record.id[:12]}", f"image {record.digest[:19]}" if record.digest else "", record.started]
    return "  \u00b7  ".join(part for part in parts if part)


def _notes(record: Record) -> list[str]:
    reason = [f"{record.reason_code}: {record.reason}"] if record.reason else []
    return reason + [f"warning: {warning}" for warning in record.warnings]
