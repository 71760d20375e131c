"""The judge: which method is better over all of its rates and sampling strengths, and not at one that suits it.

A method is a series; its points are its values x the study's strengths, (DINO, CLIP-T) each. Scores are averaged over a
subject's seeds first; then the hypervolume of a subject is the area that the points dominate, from (0, 0). Methods are
compared by the differences of their hypervolumes within subjects. A run that diverged has the point (0, 0). A subject
counts where no point of the method is missing: fewer points would dominate less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from scripts.studies.compare import Gap, student
from scripts.studies.records import Record
from scripts.studies.study import Bar, Study
from scripts.studies.task import Cell

AXES = ("dino", "clip_t")
Point = tuple[str, float]
"""(label of the value, strength)."""


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
