"""One step of several runs on one frozen base: passes over all of their samples, then each run's own optimiser step.

Samples of one shape go through the model together, each run's as one equal share; runs whose photos have another shape
in this step have a pass of their own. A run that is not finite, or ends, changes nothing for the others: its samples
reach its own factors only, and its optimiser is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusekrona_train.adapters.packed import Pack, Seat
from diffusekrona_train.common import faults
from diffusekrona_train.common.device import free, ran_out
from diffusekrona_train.models.contracts import Conditioning, Tensors
from diffusekrona_train.training import memory
from diffusekrona_train.training.loss import AGAINST_BASE, Batch
from diffusekrona_train.training.setup import Run
from diffusekrona_train.training.step import learning_rate


@dataclass(frozen=True)
class Share:
    """One run's batch in a pass."""

    run: Run
    batch: Batch

    @property
    def slot(self) -> int:
        seat = self.run.objective.injection
        assert isinstance(seat, Seat)
        return seat.slot

    @property
    def shape(self) -> tuple[object, ...]:
        """Equal for batches that can be in one pass."""
        extras = tuple((name, value.shape) for name, value in self.batch.extras.items())
        return self.batch.x_0.shape, self.batch.teacher, extras


class NoRoom(RuntimeError):
    """One run alone does not fit into memory."""

    def __init__(self, run: Run):
        super().__init__(memory.out_of_memory(run.level))
        self.run = run


class PackedStep:
    """Steps of the runs of a pack. `most` is how many runs have fitted into one pass, None while all have."""

    def __init__(self, pack: Pack):
        self.pack = pack
        self.most: int | None = None

    def gradients(self, runs: Sequence[tuple[Run, int]]) -> None:
        """Add the gradients of each run at its step; NoRoom, with no gradient left, where one alone does not fit."""
        try:
            self._micro_batches(runs)
        except NoRoom:
            for run, _ in runs:
                run.descent.clear()
            raise
        for _, step in runs:
            faults.reach("step", step)

    def _micro_batches(self, runs: Sequence[tuple[Run, int]]) -> None:
        for micro in range(max(run.config.train.gradient_accumulation for run, _ in runs)):
            groups: dict[object, list[Share]] = {}
            for run, step in runs:
                if micro < run.config.train.gradient_accumulation:
                    for batch in run.objective.samples(step, micro):
                        share = Share(run, batch)
                        groups.setdefault(share.shape, []).append(share)
            for shares in groups.values():
                self._passes(shares)

    def apply(self, runs: Sequence[tuple[Run, int]]) -> None:
        """Move each run's factors by its gradients."""
        for run, step in runs:
            run.descent.step(learning_rate(run, step), run.stop.wanted())

    def _passes(self, shares: list[Share]) -> None:
        """Forward and backward of shares of one shape, in as few passes as memory allows."""
        left = list(shares)
        while left:
            part = left[: self.most]
            try:
                self._pass(part)
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                if len(part) == 1:
                    raise NoRoom(part[0].run) from error
                self.most = len(part) // 2
            else:
                left = left[len(part) :]
                continue
            free()  # out here, where the error does not hold the pass's tensors any more

    def _pass(self, shares: Sequence[Share]) -> None:
        self.pack.choose([share.slot for share in shares])
        losses = [
            per_sample.sum() / (share.run.config.train.batch_size * share.run.config.train.gradient_accumulation)
            for share, per_sample in zip(shares, losses_of(self.pack, shares), strict=True)
        ]
        total = torch.stack([_scaled(share.run, loss) for share, loss in zip(shares, losses, strict=True)]).sum()
        self.pack.backward(total)
        for share, loss in zip(shares, losses, strict=True):
            share.run.descent.factors.flush(loss.detach())


def _scaled(run: Run, loss: Tensor) -> Tensor:
    """Return the loss times the run's own scale, in fp16."""
    scaler = run.accelerator.scaler
    return loss if scaler is None else scaler.scale(loss)  # type: ignore[return-value]


def losses_of(pack: Pack, shares: Sequence[Share]) -> list[Tensor]:
    """Return the loss of each sample of each share, (B,) fp32: what `Objective.per_sample` gives for it alone."""
    objectives = [share.run.objective for share in shares]
    batches, process = [share.batch for share in shares], objectives[0].process
    x_0, eps, t = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("x_0", "eps", "t"))
    rows = [row for share in shares for row in share.run.objective.prompts(share.batch)]
    extras = {name: torch.cat([batch.extras[name] for batch in batches]) for name in batches[0].extras}
    x_t, wanted = process.noised(x_0, eps, t), process.target(x_0, eps, t)
    size, taught = len(batches[0]), batches[0].teacher
    if taught:
        held = torch.cat([torch.arange(end - taught, end) for end in range(size, len(t) + 1, size)])
        some, held = [rows[index] for index in held.tolist()], held.to(t.device)
        with torch.no_grad(), pack.off():
            named = {name: value[held] for name, value in extras.items()}
            wanted = wanted.index_copy(0, held, _predicted(shares[0].run, x_t[held], t[held], some, named))
    predicted = _predicted(shares[0].run, x_t, t, rows, extras)
    bare: Sequence[Tensor | None] = [None] * len(batches)
    if any(objective.config.train.loss in AGAINST_BASE for objective in objectives):
        with torch.no_grad(), pack.off():
            bare = _predicted(shares[0].run, x_t, t, rows, extras).split(size)
    parts = zip(predicted.split(size), wanted.split(size), batches, bare, strict=True)
    return [objective.judged(*part) for objective, part in zip(objectives, parts, strict=True)]


def _predicted(run: Run, x_t: Tensor, t: Tensor, rows: Sequence[Tensors], extras: Tensors) -> Tensor:
    objective = run.objective
    conditioning: Conditioning = {**objective.family.collate(rows), **extras}
    return objective.family.predict(objective.denoiser, x_t.to(objective.dtype), t, conditioning).float()
