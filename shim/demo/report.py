"""How the demo's outcome is shown: as JSON for programs, as tables for people, and as a picture."""

from __future__ import annotations

from datetime import UTC, datetime

from smr.shim.chart import Bar, Chart, Panel, duration
from smr.shim.demo.demo import Outcome, Report, Restored, machine
from smr.shim.trace import stage_bars


def as_json(report: Report) -> dict[str, object]:
    """One member an engine; `skipped` says why an engine gave nothing, `error` what failed on it."""
    return {outcome.engine: _outcome(outcome) for outcome in report.outcomes}


def _outcome(outcome: Outcome) -> dict[str, object]:
    if outcome.skipped:
        return {"skipped": outcome.skipped}
    if outcome.error is not None:
        return {"error": outcome.error.as_json()}
    return {
        "cold_ttft_s": round(outcome.cold_ttft_s, 3),
        "restored_ttft_s": round(outcome.restored_ttft_s, 3),
        "tokens_equal": outcome.tokens_equal,
        "stages_ms": outcome.stages_ms,
    }


COLUMNS = ("ENGINE", "COLD", "RESTORED", "SOONER", "TOKENS", "IMAGE", "PAUSE")


def rows(report: Report) -> list[tuple[str, ...]]:
    """The table of results: time to first token, cold and restored."""
    from smr.shim.cli.output import size

    lines: list[tuple[str, ...]] = []
    for outcome in report.outcomes:
        if outcome.skipped or outcome.error is not None:
            lines.append((outcome.engine, "skipped" if outcome.skipped else "failed", "", "", "", "", ""))
            continue
        lines.append(
            (
                outcome.engine,
                f"{outcome.cold_ttft_s:.2f} s",
                f"{outcome.restored_ttft_s:.2f} s",
                f"{ratio(outcome):.1f} x",
                "equal" if outcome.tokens_equal else "DIFFERENT",
                size(outcome.image_bytes),
                f"{outcome.pause_s:.2f} s",
            )
        )
    return lines


def ratio(outcome: Outcome) -> float:
    """How many times sooner a restored container gives its first token."""
    return outcome.cold_ttft_s / outcome.restored_ttft_s


def stage_rows(report: Report) -> list[tuple[str, ...]]:
    """The table of stages: one row a stage, one column an engine that was restored; milliseconds."""
    done = restored(report)
    names = dict.fromkeys(name for outcome in done for name in outcome.stages_ms)
    return [(name, *(f"{outcome.stages_ms.get(name, 0.0):.1f} ms" for outcome in done)) for name in names]


def restored(report: Report) -> list[Outcome]:
    """Outcomes with measurements."""
    return [outcome for outcome in report.outcomes if outcome.restored]


def chart(report: Report) -> Chart:
    """Cold against restored on one axis, then for each engine the stages of its last restore."""
    done = restored(report)
    compared: list[Bar] = []
    for outcome in done:
        compared.append(Bar(name=f"{outcome.engine}, cold", start_s=0.0, end_s=outcome.cold_ttft_s, colour="grey"))
        compared.append(Bar(name=f"{outcome.engine}, restored", start_s=0.0, end_s=outcome.restored_ttft_s, colour="green"))
    panels = [Panel(title="Time to first token", bars=tuple(compared), total_s=max((bar.end_s for bar in compared), default=0.0))]
    panels += [_stages(outcome.engine, outcome.restored[-1]) for outcome in done]
    return Chart(
        title="Inference server: cold start against restore by annotation",
        subtitle=f"{report.model}  \u00b7  {machine()}  \u00b7  {datetime.now(UTC).date().isoformat()}",
        panels=tuple(panels),
        notes=(
            f"Median of {report.plan.runs}. From the engine command's start to the first greedy token received, "
            "with all files in the page cache.",
            *(f"{outcome.engine}: {ratio(outcome):.1f} times sooner, {_tokens(outcome)}." for outcome in done),
        ),
    )


def _tokens(outcome: Outcome) -> str:
    return f"greedy tokens {'equal' if outcome.tokens_equal else 'DIFFERENT'}"


def _stages(engine: str, run: Restored) -> Panel:
    """Stages on the axis of the whole start: before them the engine works, after them the server answers."""
    bars = stage_bars(run.stages, run.offset_s)
    end = max(bar.end_s for bar in bars)
    engine_bar = Bar(name=engine, start_s=0.0, end_s=run.offset_s, colour="grey")
    answer = Bar(name="first token", start_s=min(end, run.ttft_s), end_s=run.ttft_s, colour="purple")
    return Panel(
        title=f"Restore on {engine}",
        bars=(engine_bar, *bars, answer),
        total_s=run.ttft_s,
        total_label=f"first token after {duration(run.ttft_s)}",
    )
