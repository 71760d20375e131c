"""Generate the images to measure: one base model, adapters injected in turn, images named by their content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from diffusekrona_train.adapters.formats import inject_file
from diffusekrona_train.common.progress import Progress
from diffusekrona_train.config.prompts import prompt_warnings
from diffusekrona_train.evaluation.inputs import Generated
from diffusekrona_train.models.source import ModelSource
from diffusekrona_train.sampling.plan import draw, plan_pictures, settle_manifest
from diffusekrona_train.sampling.render import SampleSettings
from diffusekrona_train.sampling.session import Memory, Studio, Subject, about_models


class Bench:
    """The base model of an evaluation. It is loaded when the first image is missing; existing images are kept.

    texts: every prompt that will be drawn, identifiers filled in (they are encoded once, before the denoiser comes).
    """

    def __init__(
        self,
        source: ModelSource,
        texts: Sequence[str],
        settings: SampleSettings,
        folder: Path,
        *,
        device: torch.device,
        memory: Memory | None = None,
        batch_size: int = 1,
        share: tuple[int, int] = (0, 1),
        progress: Progress | None = None,
    ):
        self.source, self.settings, self.folder = source, settings, folder
        self.device, self.memory, self.batch_size = device, memory or Memory(), batch_size
        self.progress = progress or Progress()
        self.share = share
        self._texts = [*dict.fromkeys(texts), settings.negative]
        self._studio: Studio | None = None
        if share[0] == 0:
            for line in prompt_warnings(self._texts, source.load("tokenizers")["tokenizers"]):
                self.progress.warning(line)

    def pictures(
        self, subject: Subject | None, prompts: Sequence[str], seeds: Sequence[int], class_prompt: str
    ) -> tuple[list[Generated], list[Generated]]:
        """Generate prompts x seeds, and class prompt x seeds, with `subject`'s adapter (None: only the base model).

        Drawn where missing. With a share (rank, processes) only this process' part is drawn, but all are named.
        """
        subjects = [subject] if subject else []
        planned = plan_pictures(
            list(dict.fromkeys([*prompts, class_prompt])),
            seeds,
            self.settings,
            scale=1.0 if subject else None,
            about=about_models(self.source, subjects, self.memory, self.device),
        )
        missing = [item for item in planned if not (self.folder / item.file).exists()]
        if missing:
            name = "/".join(Path(subject.file.path).parts[-2:]) if subject else "the base model"
            self.progress.message(f"generating {len(missing)} of {len(planned)} images with {name}")
            paint = self._wear(subject)
            rank, world = self.share
            for item, _ in draw(planned, self.folder, paint, batch_size=self.batch_size, rank=rank, world=world):
                file = str(self.folder / item.file)
                self.progress.report("image", file=file, prompt=item.prompt, seed=item.seed)
            if world == 1:
                settle_manifest(planned, self.folder)
        found = [Generated(self.folder / item.file, item.prompt, item.seed) for item in planned]
        return [one for one in found if one.prompt in prompts], [one for one in found if one.prompt == class_prompt]

    def _wear(self, subject: Subject | None) -> Callable[[list], list]:
        """Return the studio's painter with only this adapter in the denoiser."""
        if self._studio is None:
            self._studio = Studio(self.source, [], self._texts, self.memory, self.device)
        studio = self._studio
        while studio.injections:
            injection = studio.injections.pop()
            if injection.fused:
                injection.unfuse()
            injection.eject()
        studio.subjects = [subject] if subject else []
        studio.injections = [inject_file(studio.denoiser, one.file) for one in studio.subjects]
        studio.set_scale(1.0 if subject else None, self.memory.fuses)
        return studio.painter([1.0 if subject else None], varies=bool(self.settings.strength_schedule))
