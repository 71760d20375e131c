"""The slots of one frozen base: loaded once, and a run for each job that has a slot."""

from __future__ import annotations

import contextlib
import gc
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from diffusekrona_train.adapters import formats
from diffusekrona_train.adapters.packed import Pack
from diffusekrona_train.common import run_folder
from diffusekrona_train.common.progress import EventLog, Fields, Progress
from diffusekrona_train.config import RunConfig
from diffusekrona_train.fleet.folder import CANCEL_FILE
from diffusekrona_train.fleet.jobs import Job
from diffusekrona_train.fleet.step import NoRoom, PackedStep
from diffusekrona_train.models import configured_model
from diffusekrona_train.models.source import ModelSource
from diffusekrona_train.training import loop, run, setup
from diffusekrona_train.training.base import Base, choose_level, compile_blocks, load_denoiser

KEPT = ("vae", "text_encoders", "tokenizers")
"""Parts that are kept from one job to the next."""


class JobProgress(Progress):
    """The events of one job, passed on with its id; it stops where all are to stop, or its own folder says so."""

    def __init__(self, above: Progress, name: str, folder: Path):
        super().__init__()
        self.above, self.name, self.folder = above, name, folder
        self.loss: float | None = None

    @property
    def cancelled(self) -> bool:
        """Return whether somebody made the file `cancel` in the job's folder."""
        return (self.folder / CANCEL_FILE).exists()

    def report(self, event: str, **fields: object) -> None:
        if event == "loss" and fields.get("loss") is not None:
            self.loss = fields["loss"]
        if event != "step":
            self.above.report(event, **_with_job(fields, self.name))

    def should_stop(self) -> bool:
        return self.above.should_stop() or self.cancelled


def _with_job(fields: Fields, name: str) -> Fields:
    return {"job": name, **fields}


@dataclass
class Rider:
    """A job that has a slot."""

    job: Job
    hash: str
    slot: int
    run: setup.Run
    progress: JobProgress
    closing: contextlib.ExitStack
    step: int = 0
    began: float = field(default_factory=time.monotonic)
    device_seconds: float = 0.0

    @property
    def steps(self) -> int:
        return self.run.config.train.steps

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


class SharedSource(ModelSource):
    """A model whose small parts are loaded once: they wait in host memory between two jobs."""

    @staticmethod
    def of(source: ModelSource) -> SharedSource:
        """Return the same model, whatever its config asked for."""
        return SharedSource(
            **{each.name: getattr(source, each.name) for each in fields(source) if not each.name.startswith("_")}
        )

    def load(self, *parts: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Load as `ModelSource.load`, each of KEPT once a type."""
        held: dict[tuple[str, torch.dtype | None], Any] = self.__dict__.setdefault("_held", {})
        found = {}
        for part in parts:
            if part not in KEPT:
                found |= super().load(part, dtype=dtype, device=device)
                continue
            if (part, dtype) not in held:
                held[part, dtype] = super().load(part, dtype=dtype)[part]
            found[part] = held[part, dtype]
            _move(found[part], device)
        return found

    def rest(self) -> None:
        """Send what is kept back to host memory."""
        for part in self.__dict__.get("_held", {}).values():
            _move(part, "cpu")


def _move(part: object, device: torch.device | str) -> None:
    for module in part if isinstance(part, list) else [part]:
        if isinstance(module, torch.nn.Module):
            module.to(device)


class Seats:
    """Up to `count` runs on one base, which is loaded when the first job comes. `progress` gets all jobs' events."""

    def __init__(self, count: int, progress: Progress):
        self.count, self.progress = count, progress
        self.riders: list[Rider] = []
        self.base: Base | None = None
        self.packed: PackedStep | None = None
        self.source: SharedSource | None = None

    @property
    def free(self) -> bool:
        return len(self.riders) < self.count

    def model(self, config: RunConfig) -> SharedSource:
        """Return the model of all jobs, which is found when the first one asks."""
        if self.source is None:
            self.source = SharedSource.of(configured_model(config))
        return self.source

    def open(self, job: Job, config: RunConfig, mark: str, folder: Path) -> Rider:
        """Give a job a free slot, from its newest checkpoint where it has one; ValueError and others where it cannot
        start."""
        progress = JobProgress(self.progress, job.id, folder)
        events = EventLog(progress)
        with contextlib.ExitStack() as stack:
            stack.enter_context(run_folder.claimed(folder))
            accelerator, dtype = setup.start_accelerator(config, folder)
            start = setup.Start(config, folder, accelerator, dtype, events)
            base = self._loaded(start)
            slot = next(slot for slot in range(self.count) if slot not in {rider.slot for rider in self.riders})
            base = replace(base, inject=lambda config: self._seated(slot, config))
            opened = run.set_up(start, True, None, base)
            base.source.rest()  # type: ignore[attr-defined]
            self._show(slot, config)
            loop.begin(opened)
            stack.callback(accelerator.end_training)
            rider = Rider(job, mark, slot, opened, progress, stack.pop_all(), step=opened.start)
        self.riders.append(rider)
        return rider

    def _loaded(self, start: setup.Start) -> Base:
        if self.base is None:
            config, source = start.config, self.model(start.config)
            batch = config.train.batch_size * self.count
            wide = config.model_copy(update={"train": config.train.model_copy(update={"batch_size": batch})})
            setup.check_start(config, source)
            level, why, room = choose_level(wide, source, start.accelerator, start.dtype)
            denoiser = load_denoiser(config, source, level, start.dtype, start.accelerator.device)
            pack = Pack(denoiser, config.adapter, self.count, dtype=start.dtype)
            if config.train.compile:
                compile_blocks(denoiser)
            self.packed = PackedStep(pack)
            gc.freeze()  # what is there now stays: to look through it after every job would take longer than a step
            self.base = Base(source, level, f"{why}, {self.count} slots", room, denoiser, _nobody, pack.off)
        return self.base

    def _seated(self, slot: int, config: RunConfig) -> Any:
        assert self.packed is not None
        seat = self.packed.pack.seat(slot, config.train.seed)
        if config.train.init_from is not None:
            file = formats.read_adapter(Path(config.train.init_from).expanduser())
            formats.fill(seat, formats.identified(seat.model, file))
        return seat

    def step(self) -> list[tuple[Rider, Exception]]:
        """Take one step of every run; return those that end with it before their last step, and why."""
        assert self.packed is not None
        began, runs = time.monotonic(), [(rider.run, rider.step) for rider in self.riders]
        try:
            self.packed.gradients(runs)
        except NoRoom as error:
            return [(rider, error) for rider in self.riders if rider.run is error.run]
        self.packed.apply(runs)
        ended: list[tuple[Rider, Exception]] = []
        for rider in self.riders:
            try:
                self._show(rider.slot, rider.run.config)
                loop.conclude(rider.run, rider.step, rider.run.descent.wish)
                rider.step += 1
            except Exception as error:
                ended.append((rider, error))
        share = (time.monotonic() - began) / len(runs)
        for rider in self.riders:
            rider.device_seconds += share
        return ended

    def _show(self, slot: int, config: RunConfig) -> None:
        """Let validation see this slot."""
        assert self.packed is not None
        if config.validation.every:
            self.packed.pack.choose([slot])

    def end(self) -> None:
        """Close what is still open, and let the model go."""
        for rider in list(self.riders):
            self.close(rider)
        if self.base is not None:
            gc.unfreeze()
        self.base = self.packed = self.source = None

    def close(self, rider: Rider) -> None:
        """Take a job out of its slot."""
        self.riders.remove(rider)
        rider.run.stop.obey()
        rider.closing.close()


def _nobody(config: RunConfig) -> Any:
    raise AssertionError("a slot is given before factors are made")
