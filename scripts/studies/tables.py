"""A study's table: its rows, what they are compared with, and all of it as Markdown and CSV.

A row is the mean and spread of its records over subjects and seeds. Rows are compared with the study's reference and in
pairs, at the subjects and seeds that both have. The seeds of a subject are repetitions, subjects are not: an interval
is Student's, of the variance within subjects, so it speaks of these subjects alone; beside it stands in how many of
them the difference has the same sign.
"""

from __future__ import annotations

import csv
import functools
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusekrona_train.common.files import atomic
from diffusekrona_train.evaluation.metrics import METRICS
from scripts.studies.records import Record
from scripts.studies.study import Study, Value
from scripts.studies.work import Cell

Mark = tuple[str, int]
"""(subject, seed)"""


@dataclass
class Row:
    """One row: the records of its cells that have scores, and how many of its runs diverged instead."""

    label: str
    section: str
    series: str
    value: Value
    wanted: int
    found: dict[Mark, Record]
    diverged: int = 0

    def score(self, mark: Mark, metric: str) -> float:
        return self.found[mark]["scores"][metric]

    def scores(self, metric: str) -> dict[Mark, float]:
        return {mark: self.score(mark, metric) for mark in self.found}

    def mean(self, metric: str) -> float:
        return float(np.mean(list(self.scores(metric).values())))

    def spread(self, metric: str) -> float:
        """Standard deviation (n - 1) over subjects and seeds; 0 of one."""
        return float(np.std(list(self.scores(metric).values()), ddof=1)) if len(self.found) > 1 else 0.0

    def spread_of_seeds(self, metric: str) -> float | None:
        """Standard deviation (n - 1) over the seeds of a subject, pooled over subjects; None where none has several."""
        squares, freedom = within_subjects(self.scores(metric))
        return math.sqrt(squares / freedom) if freedom else None

    @property
    def x(self) -> float | None:
        return self.value.x

    @property
    def missing(self) -> int:
        return self.wanted - len(self.found) - self.diverged

    @property
    def parameters(self) -> int:
        return max((record["parameters"] for record in self.found.values()), default=0)

    @property
    def seconds(self) -> float:
        """Mean seconds in the training loop."""
        times = [record["seconds"]["train"] for record in self.found.values()]
        return float(np.mean(times)) if times else 0.0


def within_subjects(values: Mapping[Mark, float]) -> tuple[float, int]:
    """Sum of squares around the subjects' own means, and its degrees of freedom."""
    by_subject: dict[str, list[float]] = {}
    for (subject, _), value in values.items():
        by_subject.setdefault(subject, []).append(value)
    squares = sum(float(np.var(own)) * len(own) for own in by_subject.values())
    return squares, len(values) - len(by_subject)


def rows_of(study: Study, cells: Sequence[Cell], records: dict[str, Record]) -> list[Row]:
    """The rows of a study's table, in the order of its YAML; with `rows: subjects` then its groups and all together."""
    if study.rows == "subjects":
        return _rows_of_subjects(cells, records)
    grouped: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        strength = f"strength {cell.strength:g}" if len(study.strengths) > 1 else ""
        label = ", ".join(filter(None, [cell.value.label, strength]))
        grouped.setdefault((cell.series.label, cell.value.section, label), []).append(cell)
    return [
        _row(", ".join(filter(None, [series, label])), section, series, own, records)
        for (series, section, label), own in grouped.items()
    ]


def _rows_of_subjects(cells: Sequence[Cell], records: dict[str, Record]) -> list[Row]:
    names = list(dict.fromkeys(cell.subject for cell in cells))
    rows = [_row(name, "subjects", "", [cell for cell in cells if cell.subject == name], records) for name in names]
    for group in sorted({cell.group for cell in cells}):
        rows.append(_row(f"all {group}", "groups", "", [cell for cell in cells if cell.group == group], records))
    return [*rows, _row("all subjects", "groups", "", list(cells), records)]


def _row(label: str, section: str, series: str, cells: Sequence[Cell], records: dict[str, Record]) -> Row:
    there = {(cell.subject, cell.seed): records[cell.key] for cell in cells if cell.key in records}
    found = {mark: record for mark, record in there.items() if not record.get("diverged")}
    return Row(label, section, series, cells[0].value, len(cells), found, len(there) - len(found))


@dataclass(frozen=True)
class Gap:
    """A mean difference, its 95 % interval (None where no subject has two seeds), how many subjects share its sign."""

    value: float
    low: float | None
    high: float | None
    agree: int
    subjects: int

    @property
    def clear(self) -> bool:
        """The interval leaves out 0 and all subjects have the same sign."""
        apart = self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)
        return apart and self.agree == self.subjects


def gap_of(differences: dict[Mark, float]) -> Gap | None:
    """The mean of differences by (subject, seed); None without any."""
    if not differences:
        return None
    count, value = len(differences), float(np.mean(list(differences.values())))
    by_subject = {subject: [] for subject, _ in differences}
    for (subject, _), difference in differences.items():
        by_subject[subject].append(difference)
    agree = sum(np.sign(np.mean(own)) == np.sign(value) for own in by_subject.values())
    squares, freedom = within_subjects(differences)
    half = student(freedom) * math.sqrt(squares / freedom / count) if freedom else None
    low, high = (None, None) if half is None else (value - half, value + half)
    return Gap(value, low, high, int(agree), len(by_subject))


@functools.cache
def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, from its density."""
    x = np.linspace(0, 13, 1_300_001)  # the widest, of one degree of freedom, is 12.706
    norm = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = norm * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    reached = np.cumsum((density[1:] + density[:-1]) / 2 * (x[1] - x[0]))
    return float(x[1:][np.searchsorted(reached, 0.475)])


# ---- rows against rows ---------------------------------------------------------------------------------------------


def reference_of(study: Study, rows: Sequence[Row]) -> Row | None:
    """The row that the others are compared with; None where rows are subjects."""
    if study.rows == "subjects":
        return None
    return next((row for row in rows if row.value.reference), rows[0])


def against(row: Row, other: Row | None, metric: str) -> Gap | None:
    """row - other; None where they have no cell in common or are the same."""
    if other is None or row.found == other.found:
        return None
    both = [mark for mark in row.found if mark in other.found]
    return gap_of({mark: row.score(mark, metric) - other.score(mark, metric) for mark in both})


def pairs_of(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The pairs beside the reference: a value and the one that it is `against`; the first series and each other."""
    by_mark = {(row.section, row.series, row.value.label): row for row in rows}
    own = [(row, by_mark[row.section, row.series, row.value.against]) for row in rows if row.value.against]
    series = list(dict.fromkeys(row.series for row in rows))
    across = [
        (row, by_mark[row.section, other, row.value.label])
        for other in series[1:]
        for row in rows
        if row.series == series[0]
    ]
    return own + across


# ---- spread over the values ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """How far a series' scores lie apart over the values, at the cells that all rows of all series have.

    deviation and reach: by (subject, seed), the standard deviation (n - 1) and the range over the values.
    """

    series: str
    values: int
    deviation: dict[Mark, float]
    reach: dict[Mark, float]


def spreads_of(rows: Sequence[Row], metric: str) -> list[Spread]:
    """One of each series that has two values or more; empty where no cell is complete."""
    measured = [row for row in rows if row.found]
    common = [mark for mark in (measured[0].found if measured else ()) if all(mark in row.found for row in measured)]
    told = []
    for series in dict.fromkeys(row.series for row in measured):
        own = [row for row in measured if row.series == series]
        if len(own) > 1 and common:
            scores = {mark: np.array([row.score(mark, metric) for row in own]) for mark in common}
            deviation = {mark: float(values.std(ddof=1)) for mark, values in scores.items()}
            reach = {mark: float(np.ptp(values)) for mark, values in scores.items()}
            told.append(Spread(series, len(own), deviation, reach))
    return told


def spread_gap(first: Spread, other: Spread) -> Gap | None:
    """How much more the first series spreads than the other."""
    return gap_of({mark: first.deviation[mark] - other.deviation[mark] for mark in first.deviation})


TITLES = {name: metric.title for name, metric in METRICS.items()} | {"gallery": "recognised", "rank": "gallery rank"}
"""Metric -> head of its column. recognised: the share of images whose nearest photo shows the subject; gallery rank:
the subject's place among all subjects by their nearest photo, 1 where it is recognised."""
COMPARED = ("dino", "clip_t")
HOW_TO_READ = (
    "Mean ± standard deviation over subjects x seeds (over the seeds of one subject alone). Trained: trained "
    "parameters; seconds: of the training loop, checkpoints included. Minus: the mean difference at the same subjects "
    "and seeds, its 95 % interval on these subjects (Student's, of the variance within subjects), and in how many "
    "subjects it has this sign; bold where the interval leaves out 0 and all subjects agree."
)


# ---- CSV -----------------------------------------------------------------------------------------------------------


def columns_of(row: Row, other: Row | None, metrics: Sequence[str]) -> dict[str, Any]:
    """A row of the CSV, as numbers."""
    line: dict[str, Any] = {"section": row.section, "label": row.label, "series": row.series, "x": row.x}
    line |= {"n": len(row.found), "missing": row.missing, "diverged": row.diverged}
    for metric in metrics:
        line[metric] = row.mean(metric) if row.found else None
        line[f"{metric}_spread"] = row.spread(metric) if row.found else None
        line[f"{metric}_spread_of_seeds"] = row.spread_of_seeds(metric) if row.found else None
    line |= {"trained_parameters": row.parameters, "train_seconds": round(row.seconds, 2)}
    for metric in COMPARED:
        gap = against(row, other, metric)
        for end, name in GAP_COLUMNS.items():
            line[f"{metric}_minus_reference{end}"] = getattr(gap, name, None)
    return line


GAP_COLUMNS = {"": "value", "_low": "low", "_high": "high", "_subjects_agree": "agree"}


def write_csv(path: Path, study: Study, rows: Sequence[Row]) -> None:
    other = reference_of(study, rows)
    lines = [columns_of(row, other, study.metrics) for row in rows]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({name: round(value, 6) if isinstance(value, float) else value for name, value in line.items()})
    with atomic(path) as temporary:
        temporary.write_text(buffer.getvalue(), encoding="utf-8")


# ---- Markdown ------------------------------------------------------------------------------------------------------


def write_markdown(path: Path, study: Study, rows: Sequence[Row], about: str) -> None:
    titles = [TITLES[metric] for metric in study.metrics]
    other = reference_of(study, rows)
    gaps = [f"{TITLES[metric]} minus {other.label}" for metric in COMPARED] if other else []
    head = ["", *titles, "n", "trained", "seconds", *gaps]
    lines = [f"# {study.title} ({study.paper})", "", about, "", HOW_TO_READ, ""]
    for section in dict.fromkeys(row.section for row in rows):
        lines += [f"## {section}", ""] if section else []
        lines += [*header(head), *(_line(row, other, study) for row in rows if row.section == section), ""]
    lines += _pairs(rows, study)
    if study.spread_of_series:
        lines += _spreads(rows, study)
    with atomic(path) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def header(titles: Sequence[str]) -> list[str]:
    """Return the two lines that a Markdown table begins with."""
    return ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]


def _line(row: Row, other: Row | None, study: Study) -> str:
    lost = {"missing": row.missing, "diverged": row.diverged}
    number = ", ".join([f"{len(row.found)}", *(f"{count} {what}" for what, count in lost.items() if count)])
    if not row.found:
        empty = ["–" for _ in study.metrics]
        return "| " + " | ".join([row.label, *empty, number, "", "", *("" for _ in COMPARED if other)]) + " |"
    scores = [_score(row, metric) for metric in study.metrics]
    gaps = [told(against(row, other, metric)) for metric in COMPARED] if other else []
    return "| " + " | ".join([row.label, *scores, number, f"{row.parameters:,}", f"{row.seconds:.0f}", *gaps]) + " |"


def _score(row: Row, metric: str) -> str:
    of_seeds = row.spread_of_seeds(metric)
    return f"{row.mean(metric):.3f} ± {row.spread(metric):.3f}" + ("" if of_seeds is None else f" ({of_seeds:.3f})")


def _pairs(rows: Sequence[Row], study: Study) -> list[str]:
    lines = []
    for row, other in pairs_of(rows):
        gaps = [against(row, other, metric) for metric in study.metrics]
        if all(gaps):
            lines.append(f"| {row.label} | {other.label} | {' | '.join(map(told, gaps))} |")
    if not lines:
        return []
    return ["## Pairs", "", *header(["", "minus", *(TITLES[metric] for metric in study.metrics)]), *lines, ""]


def _spreads(rows: Sequence[Row], study: Study) -> list[str]:
    """The spread of each series, then the first's minus the others'."""
    by_metric = [spreads_of(rows, metric) for metric in study.metrics]
    lines = []
    for own in zip(*by_metric, strict=True):
        cells = [f"{_mean(one.deviation):.3f} ({_mean(one.reach):.3f})" for one in own]
        lines.append(f"| {own[0].series} | {own[0].values} | {' | '.join(cells)} |")
    for k, other in enumerate(by_metric[0][1:], start=1):
        cells = [told(spread_gap(own[0], own[k])) for own in by_metric]
        lines.append(f"| {by_metric[0][0].series} minus {other.series} | | {' | '.join(cells)} |")
    head = header(["", "values", *(TITLES[metric] for metric in study.metrics)])
    told_as = "Standard deviation (range) over the values at one subject and seed; the mean over subjects and seeds."
    return ["## Spread over the values", "", told_as, "", *head, *lines, ""]


def told(gap: Gap | None) -> str:
    """'**+0.026** [+0.008, +0.045] 4/4'; empty for none."""
    if gap is None:
        return ""
    value = f"**{gap.value:+.3f}**" if gap.clear else f"{gap.value:+.3f}"
    interval = "" if gap.low is None else f" [{gap.low:+.3f}, {gap.high:+.3f}]"
    return f"{value}{interval} {gap.agree}/{gap.subjects}"


def _mean(values: dict) -> float:
    return float(np.mean(list(values.values())))
