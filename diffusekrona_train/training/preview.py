"""What a run shows of itself: pictures of the validation prompts at fixed seeds, and the preview at the end.

Rendered by the one sampling path with the run's own denoiser and cached text embeddings: no second model is loaded, and
only the decoder comes on top of what training holds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffusekrona_train.common import faults
from diffusekrona_train.common.device import DTYPES
from diffusekrona_train.common.files import atomic
from diffusekrona_train.config import RunConfig
from diffusekrona_train.models.source import ModelSource
from diffusekrona_train.sampling.render import SampleSettings, render
from diffusekrona_train.sampling.strengths import scheduled
from diffusekrona_train.training.checkpoint import name_of
from diffusekrona_train.training.loss import Objective


class Interrupted(Exception):
    """Somebody asked the run to stop while it was rendering."""


class Gallery:
    """Renders the validation prompts of a run into samples/step-…/NN-seed.png, each process its share."""

    def __init__(self, config: RunConfig, source: ModelSource, objective: Objective, folder: Path):
        self.config, self.source, self.objective, self.folder = config, source, objective, folder
        self.jobs = [
            (config.subject.fill(prompt), seed)
            for prompt in config.validation.prompts
            for seed in config.validation.seeds
        ]
        self._parts: dict[str, Any] = {}

    def render(self, step: int, stopping: Callable[[], bool]) -> None:
        """Writes the pictures of `step`; raises whatever goes wrong, Interrupted when `stopping()` turns true."""
        faults.reach("validation", step)
        mine = list(range(len(self.jobs)))[self.objective.rank :: self.objective.processes]
        place = self.folder / "samples" / name_of(step)

        def on_image(index: int, picture: Image.Image) -> None:
            number = mine[index]
            with atomic(place / f"{number:02d}-{self.jobs[number][1]}.png") as temporary:
                picture.save(temporary)
            if stopping():
                raise Interrupted

        pipe = self._pipeline()
        try:
            pipe.vae.to(self.objective.device)
            schedule, apply = self.config.validation.strength_schedule, self.objective.injection.set_strength
            with scheduled(self.objective.denoiser, schedule, pipe.scheduler, apply):
                render(
                    pipe,
                    self.objective.family,
                    [self.jobs[number] for number in mine],
                    self._settings(),
                    batch_size=1,
                    conditioning_of=self.objective.data.conditioning_of,
                    on_image=on_image,
                )
        finally:
            pipe.vae.to("cpu")
            if self.objective.device.type == "cuda":
                torch.cuda.empty_cache()

    def _pipeline(self) -> Any:
        if not self._parts:
            kind = DTYPES[self.config.data.vae_precision]
            self._parts = self.source.load("vae", dtype=kind) | self.source.load("scheduler")
        return self.objective.family.pipeline({"denoiser": self.objective.denoiser, **self._parts})

    def _settings(self) -> SampleSettings:
        wanted, side = self.config.validation, self.config.data.resolution
        return SampleSettings(wanted.steps, wanted.guidance, self.config.subject.fill(wanted.negative), side, side)

    def preview(self, step: int, path: Path) -> None:
        """The pictures of `step` as one labelled sheet at `path`; nothing where none were rendered."""
        from diffusekrona_train.report.sheet import contact_sheet

        rows: dict[str, list] = {}
        for number, (prompt, seed) in enumerate(self.jobs):
            file = self.folder / "samples" / name_of(step) / f"{number:02d}-{seed}.png"
            if file.is_file():
                rows.setdefault(prompt, []).append(Image.open(file).convert("RGB"))
        if rows:
            contact_sheet(list(rows.items()), path)
