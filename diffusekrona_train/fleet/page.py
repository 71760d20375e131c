"""`fleet.html`: a row a job, with its photo, its samples, its scores, seconds and cost; made from the folders only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from diffusekrona_train.common.files import atomic
from diffusekrona_train.common.run_folder import read_metrics, step_of
from diffusekrona_train.config import RunConfig
from diffusekrona_train.data import Picture, crop_pixels, plan_crops
from diffusekrona_train.fleet.folder import Failures, Record, read_record
from diffusekrona_train.report.page import Figure, Section, Strip, Table, picture, write_page

PHOTO = "photo.png"
SIDE = 128
"""Pixels of a thumbnail."""
SHOWN_SAMPLES = 4
SHOWN_JOBS = 200
"""Jobs that are shown with images, the newest; all are in the table."""
REFRESH_SECONDS = 15


def keep_photo(folder: Path, config: RunConfig, pictures: Sequence[Picture]) -> None:
    """Save a thumbnail of a job's first photo, as it is trained on, in its folder."""
    crop = plan_crops(list(pictures[:1]), config.data, config.train.seed)[0][0]
    image = Image.fromarray(crop_pixels(crop))
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    with atomic(folder / PHOTO) as temporary:
        image.save(temporary)


def write_fleet_page(output: Path, *, dollars_an_hour: float | None = None, running: bool = False) -> Path:
    """Write fleet.html from what the folders of an output say; while jobs are running it reloads itself."""
    records = sorted(_records(output), key=lambda record: record.finished or float("inf"))
    failed = Failures(output).read()
    done = [record for record in records if record.state == "done"]
    summary = f"{len(done)} done, {len(records) - len(done)} open, {len(failed)} failed"
    head = ["job", "state", "steps", "loss", "held-out loss", "seconds", "device seconds", "cost"]
    rows = [[record.id, *_told(output, record, dollars_an_hour)] for record in records]
    sections = [
        Section("Jobs", strips=[_strip(output, record) for record in reversed(records[-SHOWN_JOBS:])]),
        Section("All", tables=[Table(head, rows)] if rows else []),
        Section("Failed", tables=[Table(["job", "why"], [[one["id"], one["reason"]] for one in failed])]),
    ]
    kept = [section for section in sections if section.strips or any(table.rows for table in section.tables)]
    return write_page(
        output / "fleet.html",
        output.resolve().name,
        summary,
        kept,
        refresh_seconds=REFRESH_SECONDS if running else None,
    )


def _records(output: Path) -> list[Record]:
    found = []
    for path in sorted(output.glob("*/job.json")):
        try:
            record = read_record(path.parent)
        except ValueError:
            continue
        if record is not None:
            found.append(record)
    return found


def _told(output: Path, record: Record, dollars_an_hour: float | None) -> list[str]:
    held_out = [line["validation_loss"] for line in read_metrics(output / record.id / "metrics.jsonl") if _held(line)]
    cost = "" if dollars_an_hour is None else f"${record.device_seconds / 3600 * dollars_an_hour:.4f}"
    return [
        record.state,
        str(record.steps or ""),
        "" if record.loss is None else f"{record.loss:.4f}",
        f"{held_out[-1]:.4f}" if held_out else "",
        f"{record.seconds:.0f}" if record.seconds else "",
        f"{record.device_seconds:.1f}" if record.device_seconds else "",
        cost,
    ]


def _held(line: dict) -> bool:
    return isinstance(line.get("validation_loss"), float)


def _strip(output: Path, record: Record) -> Strip:
    """Return a job's photo and its newest samples."""
    folder = output / record.id
    steps = sorted((path for path in folder.glob("samples/step-*") if step_of(path) >= 0), key=step_of)
    samples = sorted(steps[-1].glob("*.png"))[:SHOWN_SAMPLES] if steps else []
    figures = [_figure(folder / PHOTO, "photo"), *(_figure(path, f"step {step_of(steps[-1])}") for path in samples)]
    scores = json.dumps(_scores(folder))[1:-1].replace('"', "")
    label = f"{record.id}: {record.state}" + (f", {record.seconds:.0f} s" if record.seconds else "")
    return Strip(label + (f", {scores}" if scores else ""), [figure for figure in figures if figure is not None])


def _scores(folder: Path) -> dict[str, float]:
    """Return the scores of the checkpoint that krona-eval best chose, where it was asked."""
    path = folder / "evaluation" / "best.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return {}
    rows = [row for row in found.get("checkpoints", []) if row.get("step") == found.get("chosen_step")]
    scores = rows[0].get("scores", {}) if rows else {}
    return {name: round(value, 4) for name, value in scores.items() if isinstance(value, float)}


def _figure(path: Path, caption: str) -> Figure | None:
    try:
        return picture(path, caption, side=SIDE) if path.is_file() else None
    except OSError:
        return None
