"""What a study compares: rows with its reference, rows in pairs, and how far a series spreads over the values.

Rows are compared at the subjects and seeds that both have; intervals are 95 % bootstrap percentiles over these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusekrona_train.metrics import BOOTSTRAPS, difference
from scripts.studies.records import METRICS
from scripts.studies.rows import Row
from scripts.studies.study import Study


def reference_of(study: Study, rows: Sequence[Row]) -> Row | None:
    """The row that the others are compared with; None where rows are subjects."""
    if study.rows == "subjects":
        return None
    return next((row for row in rows if row.value.reference), rows[0])


def against(row: Row, other: Row | None, metric: str) -> dict[str, Any] | None:
    """row - other over the subjects and seeds that both have; None where they share none or are the same."""
    both = [mark for mark in other.found if mark in row.found] if other else []
    if other is None or row.found == other.found or not both:
        return None
    sides = [[side.found[mark]["scores"][metric] for mark in both] for side in (row, other)]
    return difference(*sides)


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


def series_spread(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each series, how far its rows' means lie apart: standard deviation (n - 1) and range over the values."""
    told = []
    for series in dict.fromkeys(row.series for row in rows):
        own = [row for row in rows if row.series == series and row.found]
        if len(own) > 1:
            means = {metric: np.array([row.mean(metric) for row in own]) for metric in METRICS}
            told.append(
                {"series": series, "values": len(own)}
                | {metric: float(values.std(ddof=1)) for metric, values in means.items()}
                | {f"{metric}_range": float(np.ptp(values)) for metric, values in means.items()}
            )
    return told


def spread_gaps(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The first series' standard deviation over the values minus each other's, by metric as {value, low, high}."""
    series = list(dict.fromkeys(row.series for row in rows))
    own = [[row for row in rows if row.series == name] for name in series]
    told = []
    for name, others in zip(series[1:], own[1:], strict=True):
        both = [mark for mark in own[0][0].found if all(mark in row.found for row in (*own[0], *others))]
        if len(own[0]) < 2 or len(others) < 2 or not both:
            continue
        line: dict[str, Any] = {"first": series[0], "other": name, "n": len(both)}
        for metric in METRICS:
            scores = [
                np.array([[row.found[mark]["scores"][metric] for mark in both] for row in side])
                for side in (own[0], others)
            ]
            line[metric] = _spread_gap(*scores)
        told.append(line)
    return told


def _spread_gap(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """first, second (values, cells): the same cells are drawn for both, as often as there are, BOOTSTRAPS times."""
    count = first.shape[1]
    picks = np.random.default_rng(0).integers(0, count, (BOOTSTRAPS, count))
    gap = [side.mean(axis=1).std(ddof=1) for side in (first, second)]
    drawn = [side[:, picks].mean(axis=2).std(axis=0, ddof=1) for side in (first, second)]
    low, high = np.percentile(drawn[0] - drawn[1], (2.5, 97.5))
    return {"value": float(gap[0] - gap[1]), "low": float(low), "high": float(high)}
