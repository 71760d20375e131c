"""The rows of a study's table: means and spreads of their records over subjects and seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scripts.studies.records import Record
from scripts.studies.study import Study, Value
from scripts.studies.task import Cell

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
