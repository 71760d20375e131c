"""One call of scripts/paper.py: plan, run what is missing, write every study's tables and figures."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.studies import figures, judge, records, spread, tables
from scripts.studies.judge import methods_of, ranking
from scripts.studies.plan import Planner, order, unfinished
from scripts.studies.study import CONFIRM, Base, Study, load_base, load_studies, look_alikes, suite_to_confirm
from scripts.studies.tables import rows_of
from scripts.studies.work import Cell, Task, stays, texts_of


def conduct(options: argparse.Namespace) -> int:
    """0 where everything is measured, 1 where something is missing; ValueError of one line for a user's mistake."""
    studies = load_studies(options.studies)
    base = load_base(options.model, options.base)
    photos = options.photos.expanduser().absolute() if options.photos else None
    further = subjects_to_confirm(options.studies, base, photos)
    # absolute: a process of a cluster may stand elsewhere
    runs = (options.runs or Path("runs") / "paper").expanduser().absolute()
    for name, folder in (("--runs", runs), ("--export", options.export)):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ValueError(f"{name} {folder}: is a file; give a folder")
    if options.export:
        records.lines_of(options.export / "records.jsonl")  # refused now, not after hours of work
    planner = Planner(
        options.model,
        base,
        runs,
        seeds=options.seeds,
        subjects=[name for name in (options.subjects or "").split(",") if name] or further.get("subjects"),
        photos=photos,
        suite=further.get("suite"),
        look_alikes=further.get("look_alikes", ()),
        sets=[*options.set, *([f"train.steps={options.steps}"] if options.steps else [])],
    )
    cells = {name: planner.expand(name, study, options.model) for name, study in studies.items()}
    if options.import_records:
        print(f"{records.import_lines(options.import_records, runs, planner.mark)} new records taken up")
    tasks = order(list(planner.tasks.values()))
    if options.check:
        return foresee(cells, tasks, runs, options.workers)
    failed: list[spread.Done] = []
    try:
        if not options.report_only:
            failed = work_off(tasks, runs, options.on, options.workers)
    finally:  # also after Ctrl-C: what is there is worth reading
        missing = write_all(studies, cells, runs, {name: runs / name / options.model for name in studies})
    if options.export:
        write_all(studies, cells, runs, {name: options.export / name for name in studies}, small=True)
        kept = read_all([cell for own in cells.values() for cell in own], runs)
        records.write_lines(options.export / "records.jsonl", kept.values())
    if further and not options.check:
        found = read_all(cells[CONFIRM], runs)
        told_about = about(cells[CONFIRM], found) if found else "nothing is measured yet"
        print("\n".join(judge.lines_of_verdict(studies[CONFIRM], cells[CONFIRM], found, told_about)))
    for task, why in failed:
        print(f"failed: {task.subject}, seed {task.seed}, run {task.run}: {why}", file=sys.stderr)
    return 1 if missing else 0


def subjects_to_confirm(names: Sequence[str], base: Base, photos: Path | None) -> dict[str, Any]:
    """Return what `confirm` gives the planner in the place of the base's suite; nothing for other studies."""
    if CONFIRM not in names:
        return {}
    if len(names) > 1:
        raise ValueError(f"{CONFIRM} has subjects of its own; give it alone, without other studies")
    suite = suite_to_confirm(photos, base)
    return {"suite": suite, "subjects": [row.name for row in suite.rows], "look_alikes": look_alikes()}


def work_off(tasks: Sequence[Task], runs: Path, on: str, workers: int | None) -> list[spread.Done]:
    """Performs all tasks that lack a record; those that failed, with why."""
    from tqdm import tqdm

    left = unfinished(tasks, runs)
    if not left:
        print("everything is measured")
        return []
    count = workers or max(1, spread.gpus())
    prepare(left, count)
    print(f"{len(left)} of {len(tasks)} runs are to be trained or measured{estimate(left, runs, count)}", flush=True)
    spread.obey_termination()
    failed = []
    with tqdm(total=len(left), unit="run", dynamic_ncols=True) as bar:
        for task, why in spread.RUNNERS[on](left, runs, count):
            bar.update(1)
            if why is not None:
                failed.append((task, why))
                bar.write(f"failed: run {task.run}: {why}", file=sys.stderr)
    return failed


def foresee(cells: dict[str, list[Cell]], tasks: Sequence[Task], runs: Path, workers: int | None) -> int:
    """Says what a call would do; does nothing."""
    for name, own in cells.items():
        keys = {cell.key for cell in own}
        of_study = [task for task in tasks if task.needs.keys() & keys]
        alone = sum(len(task.studies) == 1 for task in of_study)
        print(f"{name}: {len(keys)} records of {len(of_study)} runs, {alone} of them for this study alone")
    left = unfinished(tasks, runs)
    print(f"{len(left)} of {len(tasks)} runs are to be trained or measured{estimate(left, runs, workers or 1)}")
    return 0


def prepare(tasks: Sequence[Task], workers: int) -> None:
    """Tells each task what its process should keep ready, and how many threads it may take."""
    everything = texts_of(tasks)
    for task in tasks:
        task.texts = everything if stays(task.config["model"]) else texts_of([task])
        task.threads = 1 if workers > 1 and not spread.gpus() else None


def estimate(tasks: Sequence[Task], runs: Path, workers: int) -> str:
    """', about M minutes', from the records that are there of this model."""
    if not tasks:
        return ""
    model = tasks[0].of["model"]
    done = [record for path in (runs / "records").glob("*.json") if (record := records.read(runs, path.stem))]
    done = [record for record in done if record["of"]["run"]["model"] == model]
    done = [record for record in done if not record.get("diverged")]
    trained = [record for record in done if record["of"]["step"] and record["seconds"]["train"]]
    if not trained:
        return " (no record yet from which to say how long that takes)"
    a_step = _mean([record["seconds"]["train"] / record["of"]["step"] for record in trained])
    a_draw = _mean([record["seconds"]["sample"] / _evaluations(record["of"]["sampling"]) for record in done])
    rest = _mean([record["seconds"]["measure"] for record in done])
    begin = _mean([record["seconds"]["set_up"] for record in trained if record["seconds"]["set_up"]] or [0.0])
    seconds = sum(
        a_step * max([0, *task.steps])
        + (begin if task.steps else 0)
        + sum(a_draw * _evaluations(need["sampling"]) + rest for need in task.needs.values())
        for task in tasks
    )
    return f", about {max(1, round(seconds / workers / 60))} minutes"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _evaluations(sampling: dict) -> int:
    """Calls of the denoiser, by picture."""
    return sampling["steps"] * len(sampling["prompts"]) * len(sampling["seeds"])


def read_all(cells: Sequence[Cell], runs: Path) -> dict[str, records.Record]:
    found = ((cell.key, records.read(runs, cell.key)) for cell in cells)
    return {key: record for key, record in found if record is not None}


def write_all(
    studies: dict[str, Study],
    cells: dict[str, list[Cell]],
    runs: Path,
    targets: dict[str, Path],
    *,
    small: bool = False,
) -> int:
    """Tables and figures of every study in its folder of `targets`; how many records are missing."""
    missing = 0
    for name, study in studies.items():
        found = read_all(cells[name], runs)
        lacking = len({cell.key for cell in cells[name]} - found.keys())
        missing += lacking
        if not found:
            print(f"{name}: nothing is measured yet")
            continue
        rows, target = rows_of(study, cells[name], found), targets[name]
        shown = cells[name]
        tables.write_csv(target / "table.csv", study, rows)
        if study.judge:
            judge.write_verdict(target / "table.md", study, shown, found, about(shown, found))
            judge.write_fronts(target / "plot.png", study, shown, found)
            shown = best_cells(study, shown, found)
        else:
            tables.write_markdown(target / "table.md", study, rows, about(shown, found))
            figures.write_plot(target / "plot.png", study, rows)
        if shown:
            figures.write_sheet(target / "sheet.png", study, shown, found, runs, small=small)
        print(f"{os.path.relpath(target / 'table.md')}" + (f" ({lacking} records missing)" if lacking else ""))
    return missing


def best_cells(study: Study, cells: Sequence[Cell], found: dict[str, records.Record]) -> list[Cell]:
    """Return each method's cells at its best point: a sheet of all points would be hundreds of rows."""
    best = {method.label: method.best() for method in ranking(methods_of(study, cells, found))}
    return [cell for cell in cells if best.get(cell.series.label) == (cell.value.label, cell.strength)]


def about(cells: Sequence[Cell], found: dict[str, records.Record]) -> str:
    """What was measured: the model, the subjects, how many pictures."""
    one = next(iter(found.values()))
    sampling = one["of"]["sampling"]
    subjects = list(dict.fromkeys(cell.subject for cell in cells))
    seeds = len({cell.seed for cell in cells})
    kinds = sorted({record["drawn_in"] for record in found.values() if "drawn_in" in record})
    mixed = f" Drawn in {' and '.join(kinds)}: differences between machines are in these numbers." * (len(kinds) > 1)
    return (
        f"{one['of']['run']['model'].split(' ')[0]}; {_count(len(subjects), 'subject')} ({', '.join(subjects)}), "
        f"{_count(seeds, 'seed')}, {_count(len(sampling['prompts']), 'prompt')} x "
        f"{_count(len(sampling['seeds']), 'picture')} each.{mixed}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
