"""Write the page of an evaluation; its score tables and charts are also used by a run's page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusekrona_train.evaluation.metrics import METRICS
from diffusekrona_train.report.charts import Line, bar_chart, line_chart
from diffusekrona_train.report.page import Section, Strip, Table, picture, write_page

TITLES = {name: metric.title for name, metric in METRICS.items()}
Scores = dict[str, dict[str, Any]]
"""Metric -> its summary: mean, std, low, high, n, by_seed (metrics.summarise)."""


def score_table(rows: Sequence[tuple[str, Scores]], best: int | None = None, extra: Sequence[str] = ()) -> Table:
    """Return a table with one row per subject or adapter: value ± standard deviation over images. `extra` names
    further entries of scores."""
    shown = [name for name in TITLES if any(name in scores for _, scores in rows)]
    body = [
        [label, *(_cell(scores.get(name)) for name in shown), *(str(scores.get(key, "")) for key in extra)]
        for label, scores in rows
    ]
    return Table(["", *(TITLES[name] for name in shown), *extra], body, best)


def _cell(score: dict | None) -> str:
    return "–" if score is None else f"{score['value']:.3f} ± {score['std']:.3f}"


def score_charts(rows: Sequence[dict], chosen: int | None) -> list[str]:
    """Chart scores by step, one chart per metric (the paper's figure 10), each with its bootstrap interval."""
    charts = []
    for name, title in TITLES.items():
        found = [(row["step"], row["scores"][name]) for row in rows if name in row["scores"]]
        if found:
            x = [step for step, _ in found]
            bounds = [Line("", x, [score[key] for _, score in found], faint=True) for key in ("low", "high")]
            line = Line(title, x, [score["value"] for _, score in found], points=True)
            charts.append(line_chart(f"{title} by step", [*bounds, line], mark_x=chosen))
    return charts


def write_evaluation_report(
    path: Path, result: dict[str, Any], pictures: Sequence[tuple[str, Sequence[tuple[str, Path]]]] = ()
) -> Path:
    """Write the page of `krona-eval`'s result: tables, charts, settings and strips of (caption, file).

    `result` holds title, rows [(label, scores)] and settings, and where they apply summary, note, best (a row number),
    extra, groups, seeds and differences (head and body of a table).
    """
    rows = result["rows"]
    sections = [
        Section(
            "Scores",
            note=result.get("note", "Mean ± standard deviation over images."),
            tables=[score_table(rows, result.get("best"), result.get("extra", ()))],
            charts=_bars(rows),
        )
    ]
    if result.get("groups"):
        sections.append(Section("By group", tables=[score_table(result["groups"])]))
    if result.get("seeds"):
        sections.append(
            Section(
                "By seed",
                note="Means over the images of one seed; the number is the seed.",
                tables=[Table(*result["seeds"])],
            )
        )
    if result.get("differences"):
        note = "Difference to the best, image by image, with its 95 % bootstrap interval."
        sections.append(Section("Is it a difference?", note=note, tables=[Table(*result["differences"])]))
    if pictures:
        strips = [Strip(label, [picture(file, caption, side=344) for caption, file in row]) for label, row in pictures]
        sections.append(Section("Images", strips=strips))
    sections.append(
        Section("How it was measured", facts=[(key, str(value)) for key, value in result["settings"].items()])
    )
    return write_page(Path(path), result["title"], result.get("summary", ""), sections)


def _bars(rows: Sequence[tuple[str, Scores]]) -> list[str]:
    charts = []
    for name, title in TITLES.items() if len(rows) > 1 else ():
        found = [(label, scores[name]) for label, scores in rows if name in scores]
        if found:
            errors = [(max(s["value"] - s["low"], 0.0), max(s["high"] - s["value"], 0.0)) for _, s in found]
            charts.append(bar_chart(title, [label for label, _ in found], [s["value"] for _, s in found], errors))
    return charts
