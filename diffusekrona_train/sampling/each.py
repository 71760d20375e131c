"""Generate with another adapter for each prompt of a batch: one model, per-sample products, nothing fused.

Factors of one type and one set of shapes are numbers in tensors that stay where they are: another adapter is a copy
into them, and neither the model is loaded again nor what was compiled lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from diffusekrona_train.adapters.formats import fill, identified
from diffusekrona_train.adapters.packed import Pack
from diffusekrona_train.models.source import ModelSource, quiet
from diffusekrona_train.sampling.plan import Planned
from diffusekrona_train.sampling.render import render
from diffusekrona_train.sampling.session import Memory, Studio, Subject, while_drawing
from diffusekrona_train.sampling.strengths import scheduled


class EachStudio(Studio):
    """The loaded pipeline, with room for as many adapters as a batch has images."""

    @while_drawing()
    def __init__(
        self,
        source: ModelSource,
        subjects: Sequence[Subject],
        texts: Sequence[str],
        memory: Memory,
        device: torch.device,
        batch_size: int,
    ):
        super().__init__(source, (), texts, replace(memory, fuse=False), device)
        self.subjects = [replace(one, file=identified(self.denoiser, one.file)) for one in subjects]
        first, slots = self.subjects[0].file, min(batch_size, len(subjects))
        assert first.spec is not None
        self.pack = Pack(self.denoiser, first.spec, slots, options=first.options, dtype=self.denoiser.dtype)
        self._in: dict[str, int] = {}
        for subject in self.subjects:  # each once, so that one of other shapes is found before the first image
            self._slots([subject])

    def painter(
        self, scales: Sequence[float | None], keep: bool = True, varies: bool = False
    ) -> Callable[[list[Planned]], list[Any]]:
        """Return a function that generates one batch, each image with its own adapter."""

        @while_drawing()
        def paint(batch: list[Planned]) -> list[Any]:
            quiet()
            owners = [self.subjects[item.subject or 0] for item in batch]
            scale, schedule = batch[0].scale, batch[0].settings.strength_schedule
            if scale is None:
                with self.pack.off():
                    return self._render(batch)
            strengths = [scale * owner.strength for owner in owners]
            with (
                self.pack.by_prompt(self._slots(owners), strengths) as strengthen,
                scheduled(self.denoiser, schedule, self.pipe.scheduler, strengthen),
            ):
                return self._render(batch)

        return paint

    def _render(self, batch: list[Planned]) -> list[Any]:
        return render(
            self.pipe,
            self.family,
            [(item.prompt, item.seed) for item in batch],
            batch[0].settings,
            batch_size=len(batch),
            conditioning_of=self._conditioning.__getitem__,
        )

    def _slots(self, owners: Sequence[Subject]) -> list[int]:
        """Return the slot of each image's adapter; those that are in none take the slots of adapters not asked for."""
        wanted = {owner.file.path for owner in owners}
        free = [slot for slot in range(self.pack.slots) if slot not in self._in.values()]
        free += [slot for path, slot in self._in.items() if path not in wanted]
        for owner in owners:
            path = owner.file.path
            if path not in self._in:
                slot = free.pop(0)
                self._in = {other: held for other, held in self._in.items() if held != slot}
                self._load(owner, slot)
                self._in[path] = slot
        return [self._in[owner.file.path] for owner in owners]

    def _load(self, owner: Subject, slot: int) -> None:
        seat = self.pack.seat(slot)
        try:
            if owner.file.spec is None or owner.file.spec.type != self.pack.spec.type:
                raise ValueError(f"{owner.file.path}: is of another type")
            fill(seat, owner.file)
        except ValueError as error:
            first = self.subjects[0].name
            raise ValueError(f"--each: {error}; in one call all adapters have the type and shapes of {first}") from None
        seat.flatten()
