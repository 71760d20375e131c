"""One call of scripts/paper.py: plan, run what is missing, write every study's tables and figures.

Tasks run over processes: a pool on this machine, or a Ray cluster. A task that fails, or dies, costs only itself.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts.studies import figures, judge, records, tables
from scripts.studies.judge import methods_of, ranking
from scripts.studies.plan import Planner, order, unfinished
from scripts.studies.study import CONFIRM, Base, Study, load_base, load_studies, look_alikes, suite_to_confirm
from scripts.studies.tables import rows_of
from scripts.studies.work import Cell, Task, perform, stays, texts_of

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60
"""Seconds that a stopped worker has to finish its step and save."""
Done = tuple[Task, str | None]
"""A task and why it failed (None: it did not)."""


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
        records.lines_of(options.export / "records.jsonl.gz")  # refused now, not after hours of work
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
    failed: list[Done] = []
    try:
        if not options.report_only:
            failed = work_off(tasks, runs, options.on, options.workers)
    finally:  # also after Ctrl-C: what is there is worth reading
        missing = write_all(studies, cells, runs, {name: runs / name / options.model for name in studies})
    if options.export:
        write_all(studies, cells, runs, {name: options.export / name for name in studies}, small=True)
        kept = read_all([cell for own in cells.values() for cell in own], runs)
        records.write_lines(options.export / "records.jsonl.gz", kept.values())
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


def work_off(tasks: Sequence[Task], runs: Path, on: str, workers: int | None) -> list[Done]:
    """Performs all tasks that lack a record; those that failed, with why."""
    from tqdm import tqdm

    left = unfinished(tasks, runs)
    if not left:
        print("everything is measured")
        return []
    count = workers or max(1, gpus())
    prepare(left, count)
    print(f"{len(left)} of {len(tasks)} runs are to be trained or measured{estimate(left, runs, count)}", flush=True)
    obey_termination()
    failed = []
    with tqdm(total=len(left), unit="run", dynamic_ncols=True) as bar:
        for task, why in RUNNERS[on](left, runs, count):
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
        task.threads = 1 if workers > 1 and not gpus() else None


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


# ---- a task ---------------------------------------------------------------------------------------------------------


def attempt(task: Task, runs: Path) -> tuple[str | None, list[tuple[records.Record, bytes]]]:
    """Performs a task: (None, what was measured), or (one line that says why not, []). A traceback goes to log.txt."""
    try:
        return None, perform(task, runs)
    except Exception as error:
        folder = runs / "trained" / task.run
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            traceback.print_exc(file=log)
        return f"{type(error).__name__}: {' '.join(str(error).split())}", []


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


# ---- this machine --------------------------------------------------------------------------------------------------


class Worker:
    """A spawned process that is sent one task at a time; it ends when this process ends."""

    def __init__(self, number: int, runs: Path, card: str | None):
        context = multiprocessing.get_context("spawn")
        self.number, self.runs, self.card = number, runs, card
        self.task: Task | None = None
        self.line, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, runs, card), name=f"paper-{number}")
        self.process.start()
        theirs.close()

    def give(self, task: Task) -> None:
        self.task = task
        self.line.send(task)

    def take(self) -> Done:
        """What became of its task; a process that died in it says so."""
        task, self.task = self.task, None
        assert task is not None
        try:
            return task, self.line.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return task, f"its process ended (exit code {self.process.exitcode}); was there too little memory?"

    def stop(self) -> None:
        """Lets a training run finish its step and save, and waits for that."""
        self.line.close()
        if self.process.is_alive() and self.task is not None:
            self.process.terminate()
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(line: Any, runs: Path, card: str | None) -> None:
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C goes to the first process alone, which tells the others once
    if card is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = card
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    while True:
        try:
            task = line.recv()
        except (EOFError, KeyboardInterrupt):
            return
        why, _ = attempt(task, runs)
        try:
            line.send(why)
        except OSError:
            return


def run_local(tasks: Sequence[Task], runs: Path, workers: int) -> Iterator[Done]:
    """Tasks in their order over `workers` processes, the k-th on GPU k; yields them as they end."""
    cards = _cards(workers)
    waiting = list(tasks)
    pool = [Worker(i, runs, cards[i]) for i in range(min(workers, len(waiting)))]
    try:
        for worker in pool:
            worker.give(waiting.pop(0))
        while busy := [worker for worker in pool if worker.task is not None]:
            ready = multiprocessing.connection.wait([worker.line for worker in busy])
            for worker in [worker for worker in busy if worker.line in ready]:
                outcome = worker.take()
                if waiting:
                    if not worker.process.is_alive():
                        pool[pool.index(worker)] = worker = Worker(worker.number, runs, worker.card)
                    worker.give(waiting.pop(0))
                yield outcome
    finally:
        for worker in pool:
            worker.stop()


def _cards(workers: int) -> list[str | None]:
    count = gpus()
    if not count:
        return [None] * workers
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = named or [str(i) for i in range(count)]
    return [names[i % len(names)] for i in range(workers)]


# ---- Ray -----------------------------------------------------------------------------------------------------------


def run_ray(tasks: Sequence[Task], runs: Path, workers: int | None) -> Iterator[Done]:
    """The same over a Ray cluster: the one that RAY_ADDRESS names, else `workers` processes here.

    Each task asks for one GPU where the cluster has any, and sends its records back: the folder of runs need not be
    shared, though a stopped run goes on only where its folder is.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise ValueError("--on ray needs the extra `ray`: pip install -e '.[ray]'") from None
    own = {"num_cpus": workers or max(1, gpus()), "include_dashboard": False}
    here = {} if os.environ.get("RAY_ADDRESS") else own
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ray.init(
        **here, log_to_driver=False, logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}},
    )  # fmt: skip
    obey_termination()  # Ray has its own answer to SIGTERM
    pending: dict[Any, Task] = {}
    try:
        cards = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
        remote = ray.remote(num_cpus=1, num_gpus=cards, max_retries=0)(attempt)
        pending |= {remote.remote(task, runs): task for task in tasks}
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1)
            task = pending.pop(ready[0])
            try:
                why, found = ray.get(ready[0])
            except Exception as error:
                why, found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", []
            for record, strip in found:
                if records.read(runs, record["key"]) is None:
                    records.keep(runs, record, strip or None)
            yield task, why
    finally:
        if pending:  # stopped: like Ctrl-C in each process, which finishes its step and saves
            for reference in pending:
                ray.cancel(reference)
            ray.wait(list(pending), num_returns=len(pending), timeout=PATIENCE)
        ray.shutdown()


def obey_termination() -> None:
    """SIGTERM ends this process as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


RUNNERS = {"local": run_local, "ray": run_ray}
