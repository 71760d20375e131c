"""The rows of a study's table: means and spreads of their records over subjects and seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scripts.studies.records import Record
from scripts.studies.study import Study, Value
from scripts.studies.task import Cell


@dataclass
class Row:
    """One row: its cells, and the records that are there, by (subject, seed)."""

    label: str
    section: str
    series: str
    value: Value
    wanted: int
    found: dict[tuple[str, int], Record]

    def scores(self, metric: str) -> list[float]:
        return [record["scores"][metric] for record in self.found.values()]

    def mean(self, metric: str) -> float:
        return float(np.mean(self.scores(metric)))

    def spread(self, metric: str) -> float:
        """Standard deviation (n - 1) over subjects and seeds; 0 of one."""
        return float(np.std(self.scores(metric), ddof=1)) if len(self.found) > 1 else 0.0

    def spread_of_seeds(self, metric: str) -> float:
        """Standard deviation (n - 1) over the seeds of a subject, pooled over subjects; 0 where none has several."""
        by_subject: dict[str, list[float]] = {}
        for (subject, _), record in self.found.items():
            by_subject.setdefault(subject, []).append(record["scores"][metric])
        several = [scores for scores in by_subject.values() if len(scores) > 1]
        squares = sum(float(np.var(scores)) * len(scores) for scores in several)
        return math.sqrt(squares / sum(len(scores) - 1 for scores in several)) if several else 0.0

    @property
    def x(self) -> float | None:
        return self.value.x

    @property
    def missing(self) -> int:
        return self.wanted - len(self.found)

    @property
    def parameters(self) -> int:
        return max((record["parameters"] for record in self.found.values()), default=0)

    @property
    def seconds(self) -> float:
        """Mean seconds in the training loop."""
        times = [record["seconds"]["train"] for record in self.found.values()]
        return float(np.mean(times)) if times else 0.0


def rows_of(study: Study, cells: Sequence[Cell], records: dict[str, Record]) -> list[Row]:
    """The rows of a study's table, in the order of its YAML; with `rows: subjects` then its groups and all together."""
    if study.rows == "subjects":
        return _rows_of_subjects(cells, records)
    grouped: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        grouped.setdefault((cell.series.label, cell.value.section, cell.value.label), []).append(cell)
    return [
        _row(", ".join(filter(None, [series, label])), section, series, own, records)
        for (series, section, label), own in grouped.items()
    ]


def _rows_of_subjects(cells: Sequence[Cell], records: dict[str, Record]) -> list[Row]:
    groups = {cell.subject: records[cell.key]["group"] for cell in cells if cell.key in records}
    names = list(dict.fromkeys(cell.subject for cell in cells))
    rows = [_row(name, "subjects", "", [cell for cell in cells if cell.subject == name], records) for name in names]
    for group in sorted(set(groups.values())):
        own = [cell for cell in cells if groups.get(cell.subject) == group]
        rows.append(_row(f"all {group}", "groups", "", own, records))
    return [*rows, _row("all subjects", "groups", "", list(cells), records)]


def _row(label: str, section: str, series: str, cells: Sequence[Cell], records: dict[str, Record]) -> Row:
    found = {(cell.subject, cell.seed): records[cell.key] for cell in cells if cell.key in records}
    return Row(label, section, series, cells[0].value, len(cells), found)
