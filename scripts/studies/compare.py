"""What a study compares: rows with its reference, rows in pairs, and how far a series spreads over the values.

Rows are compared at the subjects and seeds that both have. The seeds of a subject are repetitions, subjects are not: an
interval is Student's, of the variance within subjects, so it speaks of these subjects alone; beside it stands in how
many of them the difference has the same sign.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scripts.studies.rows import Mark, Row, within_subjects
from scripts.studies.study import Study


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
