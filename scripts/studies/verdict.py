"""What the judge says of a study: a table of its methods, its bars, what was dropped, and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusekrona_train.common.files import atomic
from scripts.studies.figures import COLOURS
from scripts.studies.gallery import TITLES
from scripts.studies.judge import AXES, Finding, Method, findings, going_on, methods_of, paired, ranking
from scripts.studies.records import Record
from scripts.studies.study import Bar, Study
from scripts.studies.tables import header, told
from scripts.studies.task import Cell

HOW_TO_READ = (
    "Hypervolume: the area in (DINO, CLIP-T) that a method's values and sampling strengths dominate together, from "
    "(0, 0), of scores averaged over a subject's seeds; the mean over subjects. Minus: its difference within subjects, "
    "Student's 95 % interval over them, and in how many it has this sign; bold where the interval leaves out 0 and all "
    "agree. Best point: the value and strength with the highest mean product of DINO and CLIP-T, then its scores. Runs "
    "that diverged count as (0, 0)."
)


def lines_of_verdict(study: Study, cells: Sequence[Cell], records: dict[str, Record], about: str) -> list[str]:
    """Return the verdict as lines of Markdown."""
    judge = study.judge
    assert judge
    methods = methods_of(study, cells, records)
    lines = [f"# {study.title} ({study.paper})", "", about, "", HOW_TO_READ, ""]
    strengths = ", ".join(f"{strength:g}" for strength in study.strengths)
    values = ", ".join(dict.fromkeys(cell.value.label for cell in cells))
    lines += [f"{study.axis.capitalize()}: {values}. Strengths: {strengths}.", "", *_table(study, methods), ""]
    if incomplete := [f"{m.label}: {', '.join(m.incomplete)}" for m in methods if m.incomplete]:
        lines += [f"Not complete, and left out: {'; '.join(incomplete)}.", ""]
    if judge.keep:
        lines += [f"To the next stage: {', '.join(going_on(study, methods))}.", ""]
    if judge.bars:
        lines += ["## Bars", "", *header(["bar", "method", "measured", "holds"])]
        lines += [_bar_line(finding, judge.against) for finding in findings(study, methods)] + [""]
    if judge.dropped:
        lines += ["## Tried and dropped", "", *header(["what", "why"])]
        lines += [f"| {one.what} | {one.why} |" for one in judge.dropped] + [""]
    return lines


def _table(study: Study, methods: Sequence[Method]) -> list[str]:
    judge = study.judge
    assert judge
    shown = [*AXES, *(metric for metric in study.metrics if metric not in AXES)]
    other = next((method for method in methods if method.label == judge.against), None)
    apart = [f"without {', '.join(judge.selected_on)}"] if judge.selected_on else []
    titles = ["", "trained", "hypervolume", f"minus {judge.against}", *apart, "best point"]
    lines = header([*titles, *(TITLES[metric] for metric in shown)])
    for method in ranking(methods):
        volumes, compared = method.volumes(), other.volumes() if other and other is not method else {}
        gaps = [told(paired(volumes, compared))]
        gaps += [told(paired(volumes, compared, judge.selected_on)) for _ in apart]
        best = method.best()
        scores = [f"{method.mean(best, metric):.3f}" for metric in shown]
        lost = f" ({method.diverged} diverged)" if method.diverged else ""
        cells = [method.label + lost, f"{method.parameters:,}", f"{np.mean(list(volumes.values())):.3f}", *gaps]
        lines.append("| " + " | ".join([*cells, f"{best[0]}, strength {best[1]:g}", *scores]) + " |")
    return lines


BARS = {
    "hypervolume": "hypervolume at least {bar.least:+.3f} over {against}, above 0 in {bar.subjects} subjects",
    "one rate": "one value within {bar.within:.3f} {metric} of each method's best",
    "floor": "no value more than {bar.within:.3f} {metric} below the best",
}
HOLDS = {True: "**yes**", False: "no", None: "–"}


def describe(bar: Bar, against: str) -> str:
    """Return a bar as a phrase."""
    return BARS[bar.kind].format(bar=bar, against=against, metric=TITLES[bar.metric])


def _bar_line(finding: Finding, against: str) -> str:
    return f"| {describe(finding.bar, against)} | {finding.label} | {finding.told} | {HOLDS[finding.holds]} |"


def write_verdict(path: Path, study: Study, cells: Sequence[Cell], records: dict[str, Record], about: str) -> None:
    """Write the verdict's table."""
    with atomic(path) as temporary:
        temporary.write_text("\n".join(lines_of_verdict(study, cells, records, about)), encoding="utf-8")


def write_fronts(path: Path, study: Study, cells: Sequence[Cell], records: dict[str, Record]) -> bool:
    """Plot each method's points and the edge of what they dominate, and the differences by subject; False without any.

    The left panel shows means over subjects; the hypervolumes are of each subject by itself.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    methods = ranking(methods_of(study, cells, records))
    if not methods:
        return False
    assert study.judge
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.1])
    for i, method in enumerate(methods):
        colour = COLOURS[i % len(COLOURS)]
        points = [(method.mean(point, "clip_t"), method.mean(point, "dino")) for point in method.points()]
        left.plot(*zip(*points, strict=True), "o", markersize=3, alpha=0.55, color=colour)
        left.plot(*_edge(points), linewidth=1.2, color=colour, label=method.label)
    left.set(xlabel="CLIP-T", ylabel="DINO", title="points and what they dominate")
    left.legend(fontsize=7, frameon=False)
    _plot_differences(right, methods, study.judge.against)
    for panel in (left, right):
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})
    return True


def _edge(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The staircase around what points (x, y) dominate, from the upper left to the lower right."""
    x, y, height = [], [], 0.0
    steps = []
    for right, top in sorted(points, reverse=True):
        if top > height:
            steps.append((right, height, top))
            height = top
    for right, low, top in reversed(steps):
        x, y = [*x, right, right], [*y, top, low]
    return x, y


def _plot_differences(panel: Any, methods: Sequence[Method], against: str) -> None:
    """Each subject's difference of hypervolumes as a dot, the mean and its interval as a bar."""
    other = next((method for method in methods if method.label == against), None)
    rest = [method for method in methods if method is not other]
    for i, method in enumerate(rest):
        volumes, base = method.volumes(), other.volumes() if other else {}
        gap = paired(volumes, base)
        if gap is None:
            continue
        gaps = [volumes[subject] - base[subject] for subject in volumes if subject in base]
        panel.plot(gaps, [i] * len(gaps), "o", markersize=3, alpha=0.5, color="#888888")
        half = 0.0 if gap.high is None else gap.high - gap.value
        panel.errorbar(gap.value, i, xerr=half, fmt="D", markersize=5, capsize=3, color=COLOURS[0])
    panel.axvline(0, color="#444444", linewidth=0.8)
    panel.set_yticks(range(len(rest)), [method.label for method in rest], fontsize=8)
    panel.invert_yaxis()
    panel.set(xlabel=f"hypervolume minus {against}'s, by subject", title="differences")
