"""The judge: which method is better over all of its rates and sampling strengths, and not at one that suits it.

A method is a series; its points are its values x the study's strengths, (DINO, CLIP-T) each. Scores are averaged over a
subject's seeds first; then the hypervolume of a subject is the area that the points dominate, from (0, 0). Methods are
compared by the differences of their hypervolumes within subjects. A run that diverged has the point (0, 0). A subject
counts where no point of the method is missing: fewer points would dominate less. The verdict is a table of the methods,
the bars, what was dropped, and a figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffusekrona_train.common.files import atomic
from scripts.studies.figures import COLOURS
from scripts.studies.records import Record
from scripts.studies.study import Bar, Study
from scripts.studies.tables import TITLES, Gap, header, student, told
from scripts.studies.work import Cell

AXES = ("dino", "clip_t")
Point = tuple[str, float]
"""(label of the value, strength)."""


MOST_EDGES = 8
"""Methods up to which all of them have a colour in the plot; of more, those that go on to the next stage."""


def hypervolume(points: Iterable[tuple[float, float]]) -> float:
    """Return the area of all (x, y) >= (0, 0) that some point reaches in both coordinates."""
    area, height = 0.0, 0.0
    for x, y in sorted(points, reverse=True):  # from the right: a point adds what is above those further right
        if x > 0 and y > height:
            area += x * (y - height)
            height = y
    return area


@dataclass
class Method:
    """A series with its scores by subject, point and metric, averaged over seeds."""

    label: str
    scores: dict[str, dict[Point, dict[str, float]]]
    """Of the subjects of which every point and seed is measured."""
    parameters: int = 0
    incomplete: list[str] = field(default_factory=list)
    """Subjects that lack a record."""
    diverged: int = 0
    """Records of runs that diverged."""

    def volumes(self) -> dict[str, float]:
        """Return the hypervolume of each subject."""
        return {
            subject: hypervolume(tuple(own[axis] for axis in AXES) for own in points.values())  # type: ignore[misc]
            for subject, points in self.scores.items()
        }

    def mean(self, point: Point, metric: str) -> float:
        """Return a metric's mean over subjects at a point."""
        return float(np.mean([points[point][metric] for points in self.scores.values()]))

    def points(self) -> list[Point]:
        """Return the points that every subject has, in the study's order; none where no subject is complete."""
        return list(next(iter(self.scores.values()), {}))

    def best(self) -> Point:
        """Return the point with the highest mean product of DINO and CLIP-T over subjects."""

        def product(point: Point) -> float:
            return float(np.mean([math.prod(own[point][axis] for axis in AXES) for own in self.scores.values()]))

        return max(self.points(), key=product)


def methods_of(study: Study, cells: Sequence[Cell], records: Mapping[str, Record]) -> list[Method]:
    """Return the study's series in its order; those of which nothing is measured are left out."""
    metrics = [*dict.fromkeys([*AXES, *study.metrics])]
    return [
        method
        for series in study.series
        if (method := _method(series.label, [c for c in cells if c.series.label == series.label], records, metrics))
    ]


def _method(label: str, cells: Sequence[Cell], records: Mapping[str, Record], metrics: Sequence[str]) -> Method | None:
    found = [records[cell.key] for cell in cells if cell.key in records]
    if not found:
        return None
    scores: dict[str, dict[Point, dict[str, float]]] = {}
    incomplete = []
    for subject in dict.fromkeys(cell.subject for cell in cells):
        own = [cell for cell in cells if cell.subject == subject]
        if any(cell.key not in records for cell in own):
            incomplete.append(subject)
            continue
        seeds: dict[Point, list[dict[str, float]]] = {}
        for cell in own:
            seeds.setdefault((cell.value.label, cell.strength), []).append(_scores(records[cell.key], metrics))
        scores[subject] = {
            point: {metric: float(np.mean([one[metric] for one in values])) for metric in metrics}
            for point, values in seeds.items()
        }
    lost = sum(bool(record.get("diverged")) for record in found)
    return Method(label, scores, max(record["parameters"] for record in found), incomplete, lost)


def _scores(record: Record, metrics: Sequence[str]) -> dict[str, float]:
    """A diverged run keeps nothing of the subject nor of the prompt; what else is measured of it has no value."""
    if record.get("diverged"):
        return {metric: 0.0 if metric in AXES else math.nan for metric in metrics}
    return {metric: record["scores"][metric] for metric in metrics}


# ---- comparisons ---------------------------------------------------------------------------------------------------


def paired(one: Mapping[str, float], other: Mapping[str, float], without: Sequence[str] = ()) -> Gap | None:
    """Return one - other over the subjects that both have: their mean, Student's 95 % interval over subjects, signs.

    None without a common subject. The seeds are averaged before, so the interval is of the variance between subjects,
    and speaks of further subjects too.
    """
    gaps = [one[subject] - other[subject] for subject in one if subject in other and subject not in without]
    if not gaps:
        return None
    mean, count = float(np.mean(gaps)), len(gaps)
    agree = sum(np.sign(gap) == np.sign(mean) for gap in gaps)
    half = student(count - 1) * float(np.std(gaps, ddof=1)) / math.sqrt(count) if count > 1 else None
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return Gap(mean, low, high, int(agree), count)


def ranking(methods: Sequence[Method]) -> list[Method]:
    """Return the methods that have a complete subject, the largest mean hypervolume first."""
    whole = [method for method in methods if method.scores]
    return sorted(whole, key=lambda method: -float(np.mean(list(method.volumes().values()))))


def going_on(study: Study, methods: Sequence[Method]) -> list[str]:
    """Return the labels of the next stage: the `keep` best beside those that go on anyway."""
    assert study.judge
    always = study.judge.always
    best = [method.label for method in ranking(methods) if method.label not in always]
    return [*always, *best[: study.judge.keep]]


# ---- bars ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """Whether a bar is reached by a method (None: not measured yet), and the numbers."""

    bar: Bar
    label: str
    holds: bool | None
    told: str


def findings(study: Study, methods: Sequence[Method]) -> list[Finding]:
    """Return what became of each bar: for each of its methods, and `one rate` for all of them together."""
    assert study.judge
    by_label = {method.label: method for method in methods if method.scores}
    found = []
    for bar in study.judge.bars:
        groups = [bar.methods] if bar.kind == "one rate" else [[label] for label in bar.methods]
        for labels in groups:
            needed = [*labels, *([study.judge.against] if bar.kind == "hypervolume" else [])]
            name = ", ".join(labels)
            if any(label not in by_label for label in needed):
                found.append(Finding(bar, name, None, "not measured"))
            else:
                found.append(Finding(bar, name, *JUDGED[bar.kind](bar, [by_label[label] for label in needed])))
    return found


def _hypervolume(bar: Bar, methods: Sequence[Method]) -> tuple[bool | None, str]:
    gap = paired(methods[0].volumes(), methods[1].volumes())
    if gap is None:
        return None, "no subject is measured of both"
    above = gap.agree if gap.value > 0 else 0
    return gap.value >= bar.least and above >= bar.subjects, f"{gap.value:+.3f}, above 0 in {above} of {gap.subjects}"


def _curve(method: Method, metric: str) -> dict[str, float]:
    """Means by value at strength 1, or at the strength nearest to it."""
    strength = min((point[1] for point in method.points()), key=lambda own: abs(own - 1))
    return {point[0]: method.mean(point, metric) for point in method.points() if point[1] == strength}


def _one_rate(bar: Bar, methods: Sequence[Method]) -> tuple[bool, str]:
    below: dict[str, float] = {}
    for method in methods:
        curve = _curve(method, bar.metric)
        for value, score in curve.items():
            below[value] = max(below.get(value, 0.0), max(curve.values()) - score)
    value = min(below, key=below.__getitem__)
    return below[value] <= bar.within, f"at {value} the furthest is {below[value]:.3f} below its own best"


def _floor(bar: Bar, methods: Sequence[Method]) -> tuple[bool, str]:
    curve = _curve(methods[0], bar.metric)
    value = min(curve, key=curve.__getitem__)
    below = max(curve.values()) - curve[value]
    return below <= bar.within, f"the lowest is {value}, {below:.3f} below the best"


JUDGED = {"hypervolume": _hypervolume, "one rate": _one_rate, "floor": _floor}


# ---- the verdict -----------------------------------------------------------------------------------------------------

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
    shown = [method for method in methods if len(methods) <= MOST_EDGES or method.label in going_on(study, methods)]
    for method in methods:
        if method not in shown:
            left.plot(*_plane(method), "o", markersize=2.5, alpha=0.5, color="#bbbbbb", label="_")
    for i, method in enumerate(shown):
        points = list(zip(*_plane(method), strict=True))
        colour, line = COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]
        left.plot(*_plane(method), "o", markersize=3.5, alpha=0.7, color=colour)
        left.plot(*_edge(points), line, linewidth=1.3, color=colour, label=method.label)
    x, y = (np.concatenate([_plane(method)[side] for method in shown]) for side in (0, 1))
    left.set(xlim=_around(x), ylim=_around(y))
    title = "points and what they dominate" + ("" if shown == methods else "; grey: all others")
    left.set(xlabel="CLIP-T", ylabel="DINO", title=title)
    left.legend(fontsize=8, frameon=False, loc="lower left")
    _plot_differences(right, methods, study.judge.against)
    for panel in (left, right):
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})
    return True


def _plane(method: Method) -> tuple[list[float], list[float]]:
    """CLIP-T and DINO of a method's points, means over subjects."""
    return tuple([method.mean(point, metric) for point in method.points()] for metric in ("clip_t", "dino"))  # type: ignore[return-value]


def _around(values: np.ndarray) -> tuple[float, float]:
    """Limits of an axis that leave a margin; a few points far below the others do not shrink the rest."""
    low, high = float(np.quantile(values, 0.05)), float(values.max())
    margin = 0.06 * (high - low) or 0.05
    return low - margin, high + margin


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
