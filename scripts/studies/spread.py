"""Tasks over processes: a pool on this machine, or a Ray cluster. A task that fails, or dies, costs only itself."""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts.studies import records
from scripts.studies.work import Task, perform

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60
"""Seconds that a stopped worker has to finish its step and save."""
Done = tuple[Task, str | None]
"""A task and why it failed (None: it did not)."""


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
