"""Jobs over a Ray cluster: an actor for each GPU with its own base and slots, fed from one queue of jobs.

An actor asks the queue for a job whenever it has a free slot, and says when one has ended. If an actor is lost, its
unfinished jobs go back into the queue, and whoever takes one resumes it from its checkpoint: what is done, half done or
held is told by the job's folder, so the output must be a folder that all machines see, or a URL is refused.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Protocol

from diffusekrona_train.common.progress import Fields, Progress
from diffusekrona_train.fleet.call import Call
from diffusekrona_train.fleet.jobs import JobError, Tree, shown_id
from diffusekrona_train.fleet.photos import is_url
from diffusekrona_train.fleet.service import Done, Source, train_here

POLL_SECONDS = 0.2
LOSSES = 3
"""Actors that may be lost in a row, no job ending between, before a call gives up."""
PACKAGE = Path(__file__).resolve().parents[2]
Row = tuple[int, Tree | JobError]
Reference = object
"""Ray's name for a result that comes later, which `ray.get` waits for."""


class Method(Protocol):
    """A method of an actor in another process."""

    def remote(self, *given: object) -> Reference: ...


class Actor(Protocol):
    """An actor, as the others see it."""

    def __getattr__(self, name: str, /) -> Method: ...


class Queue:
    """The jobs that wait, who has which, and how those that ended did. It is an actor; every call is short."""

    def __init__(self) -> None:
        self.waiting: list[Row] = []
        self.taken: dict[int, tuple[str, Row]] = {}
        self.ended: list[tuple[int, Done]] = []
        self.events: list[tuple[str, Fields]] = []
        self.complete = self.stopping = False

    def put(self, row: Row) -> None:
        """Add a job."""
        self.waiting.append(row)

    def close(self, stopping: bool = False) -> None:
        """Say that no more jobs come; `stopping`: that running ones save and end."""
        self.complete, self.stopping = True, stopping

    def take(self, actor: str) -> Row | None | bool:
        """Return a job for an actor; None: none now; False: none any more, as all have ended."""
        if self.waiting and not self.stopping:
            row = self.waiting.pop(0)
            self.taken[row[0]] = (actor, row)
            return row
        return False if self.complete and (self.stopping or not self.taken) else None

    def end(self, number: int, done: Done) -> None:
        """Note how a job ended."""
        if self.taken.pop(number, None) is not None:
            self.ended.append((number, done))

    def tell(self, event: str, fields: Fields) -> bool:
        """Take an event of an actor; return whether it is to stop."""
        self.events.append((event, fields))
        return self.stopping

    def lost(self, actor: str) -> int:
        """Put the jobs of a lost actor back, at the front; return how many."""
        own = [number for number, (holder, _) in self.taken.items() if holder == actor]
        self.waiting[:0] = [self.taken.pop(number)[1] for number in own]
        return len(own)

    def news(self) -> tuple[list[tuple[int, Done]], list[tuple[str, Fields]], int]:
        """Return what has ended and was told since the last call, and how many jobs wait or run."""
        found = self.ended, self.events, len(self.waiting) + len(self.taken)
        self.ended, self.events = [], []
        return found


class FromQueue:
    """The queue as a source of jobs for one actor."""

    def __init__(self, ray: ModuleType, queue: Actor, actor: str):
        self.ray, self.queue, self.actor = ray, queue, actor
        self.numbers: dict[str, list[int]] = {}

    def take(self, wait: bool) -> Row | None:
        row = self.ray.get(self.queue.take.remote(self.actor))
        if row is False:
            raise StopIteration
        if row is None:
            if wait:
                time.sleep(POLL_SECONDS)
            return None
        number, job = row
        self.numbers.setdefault(job.id if isinstance(job, JobError) else shown_id(job, number), []).append(number)
        return row

    def end(self, done: Done) -> None:
        """Tell the queue that a job has ended."""
        self.ray.get(self.queue.end.remote(self.numbers[done.id].pop(0), done))


class Teller(Progress):
    """Passes an actor's events to the queue, and hears from it when all are to stop."""

    def __init__(self, ray: ModuleType, queue: Actor, actor: str):
        super().__init__()
        self.ray, self.queue, self.actor = ray, queue, actor

    def report(self, event: str, **fields: object) -> None:
        if event in ("job", "pack", "warning") and self.ray.get(
            self.queue.tell.remote(event, {**fields, "on": self.actor})
        ):
            self.stop()


class Worker:
    """One GPU, or one CPU process, with its own base and slots."""

    def __init__(self, call: Call, queue: Actor, name: str):
        self.call, self.queue, self.name = call, queue, name

    def pid(self) -> int:
        """Return the process, for whoever wants to see or end it."""
        return os.getpid()

    def work(self) -> None:
        """Train jobs of the queue until there is none any more."""
        ray: ModuleType = importlib.import_module("ray")
        source = FromQueue(ray, self.queue, self.name)
        for done in train_here(
            self.call, source, Teller(ray, self.queue, self.name), events=f"events-{self.name}.jsonl"
        ):
            source.end(done)


def train_on_ray(call: Call, source: Source, progress: Progress) -> Iterator[Done]:
    """Train all jobs of a checked call over a cluster: the one of `call.address`, else one of this machine.

    ValueError where Ray is not installed or the output is a URL; RuntimeError where actor after actor is lost.
    """
    if is_url(call.output):
        raise ValueError(f"--output {call.output}: on Ray, give a folder that all machines share")
    try:
        ray: ModuleType = importlib.import_module("ray")
    except ImportError:
        raise ValueError("--on ray needs the extra `ray`: pip install -e '.[ray]'") from None
    paths = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    here = {"address": call.address} if call.address else {"num_cpus": call.workers, "include_dashboard": False}
    variables = {"PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}
    ray.init(**here, log_to_driver=False, logging_level="error", runtime_env={"env_vars": variables})
    try:
        yield from Crew(
            ray, replace(call, output=str(Path(call.output).expanduser().resolve())), source, progress
        ).ends()
    finally:
        ray.shutdown()


class Crew:
    """The actors of a call, seen from the process that started it."""

    def __init__(self, ray: ModuleType, call: Call, source: Source, progress: Progress):
        self.ray, self.source, self.progress = ray, source, progress
        self.call = replace(call, on="here", address=None, workers=None)
        cards = int(ray.cluster_resources().get("GPU", 0))
        self.options = {"num_cpus": 1, "num_gpus": 1 if cards else 0, "max_restarts": 0}
        self.size = call.workers or max(1, cards)
        self.queue = ray.remote(Queue).options(num_cpus=0).remote()
        self.running: dict[Reference, tuple[str, Actor]] = {}
        self.started = 0
        self.losses = 0

    def ends(self) -> Iterator[Done]:
        """Yield each job as it ends, wherever."""
        for _ in range(self.size):
            self._start()
        fed = False
        while True:
            fed = fed or self._feed()
            if self.progress.should_stop():
                self.ray.get(self.queue.close.remote(True))
            ended, events, left = self.ray.get(self.queue.news.remote())
            for event, fields in events:
                self.progress.report(event, **fields)
            for _, done in ended:
                self.losses = 0
                yield done
            if not self.running and (fed and not left or self.progress.should_stop()):
                return
            self._watch(left > 0 or not fed)

    def _start(self) -> None:
        name = f"{self.started}"
        self.started += 1
        actor = self.ray.remote(Worker).options(**self.options).remote(self.call, self.queue, name)
        process = self.ray.get(actor.pid.remote())  # before it works: an actor does one thing at a time
        self.running[actor.work.remote()] = (name, actor)
        self.progress.report("message", text=f"actor {name}: process {process}")

    def _feed(self) -> bool:
        """Pass on the jobs that are there; return whether these were all."""
        while True:
            try:
                row = self.source.take(wait=False)
            except StopIteration:
                self.ray.get(self.queue.close.remote(False))
                return True
            if row is None:
                return False
            self.ray.get(self.queue.put.remote(row))

    def _watch(self, wanted: bool) -> None:
        """Look after the actors: the jobs of one that is lost go back, and another takes its place."""
        ready, _ = self.ray.wait(list(self.running), num_returns=1, timeout=POLL_SECONDS)
        for reference in ready:
            name, _ = self.running.pop(reference)
            try:
                self.ray.get(reference)
            except self.ray.exceptions.RayActorError:
                back = self.ray.get(self.queue.lost.remote(name))
                self.losses += 1
                self.progress.warning(f"actor {name} was lost; {back} jobs go on from their checkpoints elsewhere")
                if self.losses > LOSSES:
                    raise RuntimeError(f"{self.losses} actors were lost and no job ended between") from None
                if wanted and not self.progress.should_stop():
                    self._start()
