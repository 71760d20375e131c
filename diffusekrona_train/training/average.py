"""A running average of the factors: what is saved and shown, while the run goes on with the factors themselves."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

from diffusekrona_train.adapters.flat import FlatFactors


class Average:
    """average = decay * average + (1 - decay) * factors after each step; at first the plain mean of all steps so far.

    It is the average of A and of B, not of ΔW = A ⊗ B: where both move, their product is not the average product. One
    move of the factors fades to half in log(1/2) / log(decay) steps: 13.5 for 0.95.
    """

    def __init__(self, factors: FlatFactors, decay: float):
        self.factors, self.decay = factors, decay
        self.values = factors.master.detach().clone()
        self.steps = torch.zeros((), device=self.values.device)

    @torch.no_grad()
    def update(self, bad: torch.Tensor) -> None:
        """Take the factors in; a `bad` step, which has not moved them, does not count. Does not wait for the device."""
        self.steps += ~bad
        weight = (1 / self.steps.clamp(min=1)).clamp(min=1 - self.decay)
        self.values.lerp_(self.factors.master.detach(), torch.where(bad, 0.0, weight))

    @contextmanager
    def shown(self) -> Generator[None]:
        """Put the average in the factors' place inside the block; they return bit for bit."""
        own = self.factors.master.detach().clone()
        self._put(self.values)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: torch.Tensor) -> None:
        self.factors.master.copy_(values)
        self.factors.refresh()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what a resume state keeps: the count of steps, and a tensor for each factor."""
        return {"steps": self.steps} | {segment.name: segment.of(self.values) for segment in self.factors.segments}

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put back what `tensors` gave; KeyError where a factor is missing."""
        self.steps.copy_(tensors["steps"])
        for segment in self.factors.segments:
            segment.of(self.values).copy_(tensors[segment.name])
