"""Tables of a study from its records: mean and spread over subjects and seeds, differences to one row, gaps."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusekrona_train.files import atomic
from diffusekrona_train.metrics import METRICS, difference
from scripts.studies.records import METRICS as SHOWN
from scripts.studies.records import Record
from scripts.studies.study import Study
from scripts.studies.task import Cell

COMPARED = ("dino", "clip_t")


@dataclass
class Row:
    """One row: its cells, and the records that are there, by (subject, seed)."""

    label: str
    section: str
    series: str
    x: float | None
    wanted: int
    found: dict[tuple[str, int], Record]
    reference: bool = False

    def scores(self, metric: str) -> list[float]:
        return [record["scores"][metric] for record in self.found.values()]

    def mean(self, metric: str) -> float:
        return float(np.mean(self.scores(metric)))

    def spread(self, metric: str) -> float:
        """Standard deviation (n - 1) over subjects and seeds; 0 of one."""
        return float(np.std(self.scores(metric), ddof=1)) if len(self.found) > 1 else 0.0

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
    return Row(label, section, series, cells[0].value.x, len(cells), found, cells[0].value.reference)


def reference_of(study: Study, rows: Sequence[Row]) -> Row | None:
    """The row that the others are compared with; None where rows are subjects."""
    if study.rows == "subjects":
        return None
    return next((row for row in rows if row.reference), rows[0])


def against(row: Row, other: Row | None, metric: str) -> dict[str, Any] | None:
    """row - other over the subjects and seeds that both have; None where they share none or are the same."""
    both = [mark for mark in other.found if mark in row.found] if other else []
    if other is None or row.found == other.found or not both:
        return None
    sides = [[side.found[mark]["scores"][metric] for mark in both] for side in (row, other)]
    return difference(*sides)


def columns_of(row: Row, other: Row | None) -> dict[str, Any]:
    """A row of the CSV, as numbers."""
    line: dict[str, Any] = {"section": row.section, "label": row.label, "series": row.series, "x": row.x}
    line |= {"n": len(row.found), "missing": row.missing}
    for metric in SHOWN:
        line[metric] = row.mean(metric) if row.found else None
        line[f"{metric}_spread"] = row.spread(metric) if row.found else None
    line |= {"trained_parameters": row.parameters, "train_seconds": round(row.seconds, 2)}
    for metric in COMPARED:
        gap = against(row, other, metric) or {}
        line |= {f"{metric}_minus_reference{end}": gap.get(name) for name, end in GAP_COLUMNS.items()}
    return line


GAP_COLUMNS = {"value": "", "low": "_low", "high": "_high"}


def series_spread(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each series, how far its rows' means lie apart: standard deviation (n - 1) and range over the values."""
    told = []
    for series in dict.fromkeys(row.series for row in rows):
        own = [row for row in rows if row.series == series and row.found]
        if len(own) > 1:
            means = {metric: np.array([row.mean(metric) for row in own]) for metric in SHOWN}
            told.append(
                {"series": series, "values": len(own)}
                | {metric: float(values.std(ddof=1)) for metric, values in means.items()}
                | {f"{metric}_range": float(np.ptp(values)) for metric, values in means.items()}
            )
    return told


def write_csv(path: Path, study: Study, rows: Sequence[Row]) -> None:
    other = reference_of(study, rows)
    lines = [columns_of(row, other) for row in rows]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({name: round(value, 6) if isinstance(value, float) else value for name, value in line.items()})
    with atomic(path) as temporary:
        temporary.write_text(buffer.getvalue(), encoding="utf-8")


def write_markdown(path: Path, study: Study, rows: Sequence[Row], about: str) -> None:
    titles = [METRICS[metric].title for metric in SHOWN]
    other = reference_of(study, rows)
    gaps = [f"{METRICS[metric].title} minus {other.label}" for metric in COMPARED] if other else []
    head = ["", *titles, "n", "trained", "seconds", *gaps]
    lines = [f"# {study.title} ({study.paper})", "", about, ""]
    for section in dict.fromkeys(row.section for row in rows):
        lines += [f"## {section}", ""] if section else []
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        lines += [_line(row, other) for row in rows if row.section == section] + [""]
    if study.spread_of_series:
        lines += ["## Spread over the values", "", "Standard deviation (range) of the rows' means.", ""]
        lines += ["| | values | " + " | ".join(titles) + " |", "|---|---" + "|---" * len(titles) + "|"]
        for told in series_spread(rows):
            cells = [f"{told[metric]:.3f} ({told[f'{metric}_range']:.3f})" for metric in SHOWN]
            lines.append(f"| {told['series']} | {told['values']} | {' | '.join(cells)} |")
        lines.append("")
    with atomic(path) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def _line(row: Row, other: Row | None) -> str:
    number = f"{len(row.found)}" + (f" ({row.missing} missing)" if row.missing else "")
    if not row.found:
        return (
            f"| {row.label} | "
            + " | ".join([*("missing" for _ in SHOWN), number, *([""] * (4 if other else 2))])
            + " |"
        )
    scores = [f"{row.mean(metric):.3f} ± {row.spread(metric):.3f}" for metric in SHOWN]
    gaps = [against(row, other, metric) for metric in COMPARED] if other else []
    told = [f"{gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]" if gap else "" for gap in gaps]
    cells = [row.label, *scores, number, f"{row.parameters:,}", f"{row.seconds:.0f}", *told]
    return "| " + " | ".join(cells) + " |"
