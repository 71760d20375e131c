"""The sheet and the plot of a study."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffusekrona_train.common.files import atomic
from diffusekrona_train.evaluation.inputs import photos_of
from diffusekrona_train.report.sheet import contact_sheet
from scripts.studies.records import Record, strip_of
from scripts.studies.study import Study
from scripts.studies.tables import TITLES, Row
from scripts.studies.work import Cell

COLOURS = ("#3b82f6", "#e8833a", "#22a06b", "#a169e0")


def write_sheet(
    path: Path, study: Study, cells: Sequence[Cell], records: dict[str, Record], runs: Path, *, small: bool = False
) -> bool:
    """Rows are values (or subjects), columns a photo and prompts, of the first subject and seed.

    False where no picture is here.

    `small`: at the pictures' own size and with 96 colours, for a repository.
    """
    subject, seed = cells[0].subject, cells[0].seed
    by_subject = study.rows == "subjects"
    chosen = [cell for cell in cells if cell.seed == seed and (by_subject or cell.subject == subject)]
    rows, prompts = [], []
    for cell in chosen:
        strip = strip_of(runs, cell.key)
        if cell.key in records and strip.is_file():
            own = records[cell.key]["of"]["sampling"]["prompts"]
            parts = [cell.series.label, cell.value.section, cell.value.label]
            label = cell.subject if by_subject else ", ".join(filter(None, parts))
            rows.append((label, [*_photo(cell.images), *_cut(strip, len(own))[:WIDEST]]))
            prompts = prompts or own[:WIDEST]
    if not rows:
        return False
    heads = ["photo"] if chosen[0].images else []
    heads += [prompt.replace("a [V] {class} ", "").replace("[V] {class}", "subject") for prompt in prompts]
    title = f"{study.title}: " + (f"seed {seed}" if by_subject else f"{subject}, seed {seed}")
    contact_sheet(rows, path, columns=heads, title=title, cell=128 if small else None)
    if small:
        with atomic(path) as temporary:
            Image.open(path).quantize(96, dither=Image.Dither.NONE).save(temporary, "PNG", optimize=True)
    return True


WIDEST = 8
"""Prompts in a row."""


@functools.cache
def _photo(images: str) -> list[Image.Image]:
    """The subject's first photo, in a list; an empty list without a place."""
    return photos_of(images)[:1] if images else []


def _cut(strip: Path, count: int) -> list[Image.Image]:
    with Image.open(strip) as opened:
        whole = opened.convert("RGB")
    side = whole.width // count
    return [whole.crop((i * side, 0, (i + 1) * side, whole.height)) for i in range(count)]


def write_plot(path: Path, study: Study, rows: Sequence[Row]) -> bool:
    """Each metric against the value, and the subject against the prompt: what one gains, the other often loses.

    Thin bars are the spread over subjects and seeds, thick ones over seeds alone; False where there is nothing to plot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.found]
    if not rows:
        return False
    numeric = all(row.x is not None for row in rows)
    labels = [row.label if len(row.label) <= 24 else row.label[:23] + "…" for row in rows]
    lines = list(dict.fromkeys(row.series or row.section for row in rows))
    figure = Figure(figsize=(13, 3.3 if numeric else 3.3 + 0.045 * max(map(len, labels))), layout="constrained")
    FigureCanvasAgg(figure)
    *panels, last = figure.subplots(1, len(study.metrics) + 1, width_ratios=[1] * len(study.metrics) + [1.25])
    _draw_exchange(last, rows, lines, joined=numeric)
    for panel, metric in zip(panels, study.metrics, strict=True):
        panel.set_title(TITLES[metric], loc="left", fontsize=10)
        for i, series in enumerate(lines):
            own = [k for k, row in enumerate(rows) if (row.series or row.section) == series]
            x = [rows[k].x if numeric else k for k in own]
            heights = [rows[k].mean(metric) for k in own]
            spreads = [rows[k].spread(metric) for k in own]
            style = {"marker": "o", "markersize": 4, "capsize": 3, "color": COLOURS[i % len(COLOURS)]}
            line = "-" if numeric else "none"
            panel.errorbar(x, heights, spreads, linestyle=line, elinewidth=0.8, label=series or None, **style)
            seeds = [rows[k].spread_of_seeds(metric) or 0.0 for k in own]
            panel.errorbar(x, heights, seeds, linestyle="none", elinewidth=4, alpha=0.4, color=style["color"])
        if numeric:
            panel.set_xscale("log" if study.log_axis else "linear")
            places = {row.x: row.value.label if study.log_axis else f"{row.x:g}" for row in rows if row.x is not None}
            panel.set_xticks(list(places), list(places.values()), fontsize=8)
            panel.set_xticks([], minor=True)
        else:
            panel.set_xticks(range(len(rows)), labels, rotation=60, ha="right", fontsize=7)
        panel.set_xlabel(study.axis, fontsize=9)
        panel.tick_params(axis="y", labelsize=8)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper right", ncols=len(names), frameon=False, fontsize=8)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})
    return True


def _draw_exchange(panel: Any, rows: Sequence[Row], lines: Sequence[str], *, joined: bool) -> None:
    """DINO over CLIP-T, a point a trained row: up and to the right is better."""
    rows = [row for row in rows if not row.value.untrained]
    for i, series in enumerate(lines):
        own = [row for row in rows if (row.series or row.section) == series]
        x, y = ([row.mean(metric) for row in own] for metric in ("clip_t", "dino"))
        panel.plot(x, y, "o", linestyle="-" if joined else "none", markersize=4, color=COLOURS[i % len(COLOURS)])
        for row, *place in zip(own, x, y, strict=True):
            near = {"xytext": (4, 3 if i % 2 == 0 else -8), "textcoords": "offset points", "fontsize": 6}
            panel.annotate(row.label.removeprefix(f"{row.series}, "), place, color=COLOURS[i % len(COLOURS)], **near)
    panel.set_title("DINO over CLIP-T", loc="left", fontsize=10)
    panel.set_xlabel("CLIP-T", fontsize=9)
    panel.tick_params(labelsize=8)
    panel.margins(0.12)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
