"""A study's table as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusekrona_train.files import atomic
from diffusekrona_train.metrics import METRICS
from scripts.studies.compare import against, pairs_of, reference_of, series_spread, spread_gaps
from scripts.studies.records import METRICS as SHOWN
from scripts.studies.rows import Row
from scripts.studies.study import Study

COMPARED = ("dino", "clip_t")


def columns_of(row: Row, other: Row | None) -> dict[str, Any]:
    """A row of the CSV, as numbers."""
    line: dict[str, Any] = {"section": row.section, "label": row.label, "series": row.series, "x": row.x}
    line |= {"n": len(row.found), "missing": row.missing}
    for metric in SHOWN:
        line[metric] = row.mean(metric) if row.found else None
        line[f"{metric}_spread"] = row.spread(metric) if row.found else None
        line[f"{metric}_spread_of_seeds"] = row.spread_of_seeds(metric) if row.found else None
    line |= {"trained_parameters": row.parameters, "train_seconds": round(row.seconds, 2)}
    for metric in COMPARED:
        gap = against(row, other, metric) or {}
        line |= {f"{metric}_minus_reference{end}": gap.get(name) for name, end in GAP_COLUMNS.items()}
    return line


GAP_COLUMNS = {"value": "", "low": "_low", "high": "_high"}


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
    lines += _pairs(rows)
    if study.spread_of_series:
        lines += ["## Spread over the values", "", "Standard deviation (range) of the rows' means.", ""]
        lines += ["| | values | " + " | ".join(titles) + " |", "|---|---" + "|---" * len(titles) + "|"]
        for told in series_spread(rows):
            cells = [f"{told[metric]:.3f} ({told[f'{metric}_range']:.3f})" for metric in SHOWN]
            lines.append(f"| {told['series']} | {told['values']} | {' | '.join(cells)} |")
        for gap in spread_gaps(rows):
            cells = [_told(gap[metric]) for metric in SHOWN]
            lines.append(f"| {gap['first']} minus {gap['other']} | | {' | '.join(cells)} |")
        lines.append("")
    with atomic(path) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def _pairs(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row, other in pairs_of(rows):
        gaps = [against(row, other, metric) for metric in SHOWN]
        if all(gaps):
            lines.append(f"| {row.label} | {other.label} | {' | '.join(map(_told, gaps))} |")
    if not lines:
        return []
    titles = " | ".join(METRICS[metric].title for metric in SHOWN)
    return ["## Pairs", "", f"| | minus | {titles} |", "|---|---" + "|---" * len(SHOWN) + "|", *lines, ""]


def _told(gap: dict[str, float] | None) -> str:
    return f"{gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]" if gap else ""


def _line(row: Row, other: Row | None) -> str:
    number = f"{len(row.found)}" + (f" ({row.missing} missing)" if row.missing else "")
    if not row.found:
        return (
            f"| {row.label} | "
            + " | ".join([*("missing" for _ in SHOWN), number, *([""] * (4 if other else 2))])
            + " |"
        )
    scores = [f"{row.mean(m):.3f} ± {row.spread(m):.3f} ({row.spread_of_seeds(m):.3f})" for m in SHOWN]
    gaps = [against(row, other, metric) for metric in COMPARED] if other else []
    cells = [row.label, *scores, number, f"{row.parameters:,}", f"{row.seconds:.0f}", *map(_told, gaps)]
    return "| " + " | ".join(cells) + " |"
