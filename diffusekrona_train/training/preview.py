"""Show a run while it trains: images of the validation prompts at fixed seeds, and the preview at the end.

Rendered by the one sampling path with the run's own denoiser and cached text embeddings: only the decoder comes on top
of what training holds, and with sample.model two blocks of its denoiser.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from diffusekrona_train.adapters.inject import Injection, inject
from diffusekrona_train.common import faults
from diffusekrona_train.common.device import DTYPES, free, ran_out
from diffusekrona_train.common.files import atomic
from diffusekrona_train.common.progress import Progress
from diffusekrona_train.common.run_folder import step_name
from diffusekrona_train.config import RunConfig
from diffusekrona_train.models.contracts import Loaded
from diffusekrona_train.models.source import ModelSource
from diffusekrona_train.sampling.render import render, settings_of
from diffusekrona_train.sampling.strengths import scheduled
from diffusekrona_train.training.loss import Objective
from diffusekrona_train.training.memory import Level, images_at_once


class Interrupted(Exception):
    """Somebody asked the run to stop while it was rendering."""


class Gallery:
    """Renders the validation prompts of a run into samples/step-…/NN-seed.png, each process its share."""

    def __init__(
        self,
        config: RunConfig,
        source: ModelSource,
        objective: Objective,
        level: Level,
        folder: Path,
        progress: Progress,
    ):
        self.config, self.source, self.objective, self.folder = config, source, objective, folder
        self.level, self.progress = level, progress
        self.jobs = [
            (config.subject.fill(prompt), seed)
            for prompt in config.validation.prompts
            for seed in config.validation.seeds
        ]
        self._parts: dict[str, Any] = {}
        self._other: Injection | None = None

    def render(self, step: int, stopping: Callable[[], bool]) -> None:
        """Write the images of `step`; raise whatever goes wrong, Interrupted when `stopping()` turns true."""
        faults.reach("validation", step)
        mine = list(range(len(self.jobs)))[self.objective.rank :: self.objective.processes]
        place = self.folder / "samples" / step_name(step)

        def on_image(index: int, picture: Image.Image) -> None:
            number = left[index]
            prompt, seed = self.jobs[number]
            file = place / f"{number:02d}-{seed}.png"
            with atomic(file) as temporary:
                picture.save(temporary)
            self.progress.report("image", file=str(file), prompt=prompt, seed=seed, step=step)
            done.add(number)
            if stopping():
                raise Interrupted

        (pipe, injection), objective, done = self._pipeline(), self.objective, set[int]()
        free()
        at_once = images_at_once(self.config, objective.dtype, objective.device, objective.family.memory)
        try:
            pipe.vae.to(objective.device)
            schedule = self.config.validation.strength_schedule
            while left := [number for number in mine if number not in done]:
                with scheduled(injection.model, schedule, pipe.scheduler, injection.set_strength):
                    at_once = self._rendered(pipe, left, at_once, on_image)
        finally:
            pipe.vae.to("cpu")
            free()

    def _rendered(self, pipe: Loaded, numbers: list[int], at_once: int, on_image: Callable) -> int:
        """Render jobs in batches; return how many images to take at once for those that are left: 1 where memory ended
        with more."""
        try:
            render(
                pipe,
                self.objective.family,
                [self.jobs[number] for number in numbers],
                settings_of(self.config),
                batch_size=at_once,
                decoded_at_once=1,
                conditioning_of=self.objective.data.conditioning_of,
                on_image=on_image,
            )
        except RuntimeError as error:
            if at_once == 1 or not ran_out(error):
                raise
        free()
        return 1

    def _pipeline(self) -> tuple[Any, Injection]:
        """Return the pipeline and the adapter in its denoiser: the run's own, or those of sample.model."""
        if not self._parts:
            kind = DTYPES[self.config.data.vae_precision]
            self._parts = self.source.load("vae", dtype=kind) | self.source.load("scheduler")
        injection = self.objective.injection
        if self.config.sample.model is not None:
            injection = self._in_the_other(injection)
        return self.objective.family.pipeline({"denoiser": injection.model, **self._parts}), injection

    def _in_the_other(self, trained: Injection) -> Injection:
        """Return the trained factors in the denoiser of sample.model, whose blocks stay in host memory: it comes beside
        the one in training."""
        if self._other is None:
            quantize = self.level.quantize if self.level.quantize != "int8" else "fp8"
            objective = self.objective
            denoiser = self.source.load_denoiser(objective.dtype, objective.device, quantize, offload=True)
            self._other = inject(denoiser, trained.spec, options=trained.options)
        self._other.load_state_dict(trained.state_dict())
        return self._other

    def preview(self, step: int, path: Path) -> None:
        """Write the images of `step` as one labelled sheet at `path`; nothing if none were generated."""
        from diffusekrona_train.report.sheet import contact_sheet

        rows: dict[str, list] = {}
        for number, (prompt, seed) in enumerate(self.jobs):
            file = self.folder / "samples" / step_name(step) / f"{number:02d}-{seed}.png"
            if file.is_file():
                rows.setdefault(prompt, []).append(Image.open(file).convert("RGB"))
        if rows:
            contact_sheet(list(rows.items()), path)
