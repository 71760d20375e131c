"""A study's table as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusekrona_train.common.files import atomic
from scripts.studies.compare import Gap, against, pairs_of, reference_of, spread_gap, spreads_of
from scripts.studies.gallery import TITLES
from scripts.studies.rows import Row
from scripts.studies.study import Study

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
