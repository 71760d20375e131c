"""The learning rate of each factor, as one table over the flat buffer: in units of ΔW, or with a ratio between factors.

The optimiser steps all factors at rate 1, and `shorten` scales what each one has moved. For AdamW, whose step is the
rate times something that does not depend on it (weight decay included), that is the same as a rate for each factor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffusekrona_train.adapters import Adapter
from diffusekrona_train.adapters.flat import ALIGN, FlatFactors, Segment
from diffusekrona_train.config.training import TrainConfig

OWN_SHARE = 0.05
"""In units of ΔW, a factor that does not start at zero moves at most this share of its own rms in a step: while its
partner is near zero, no step of it would move ΔW by the rate."""
TINY = 1e-16
"""Smallest squared gain, so that a factor whose partner is zero has a finite rate."""


def rates_of(factors: FlatFactors, train: TrainConfig) -> Rates | None:
    """Return the table that the config asks for; None where every factor has the run's own rate."""
    if train.rate_unit == "factor" and train.rate_ratio == 1.0:
        return None
    return Rates(factors, in_dw=train.rate_unit == "dw", ratio=train.rate_ratio)


class Rates:
    """A rate for each segment of the flat buffer, made on the device without waiting for it.

    In units of ΔW a factor's rate is learning_rate / g, where g (`Adapter.partners`, times the adapter's scale) is the
    rms that ΔW moves by when the factor moves by independent numbers of rms 1. `ratio` multiplies the rates of the
    factors that start at zero.
    """

    def __init__(self, factors: FlatFactors, *, in_dw: bool, ratio: float):
        self.factors, self.in_dw = factors, in_dw
        segments, device = factors.segments, factors.master.device
        grown = torch.tensor([_is_grown(factors, segment) for segment in segments], device=device)
        self._ratio = torch.where(grown, ratio, 1.0)
        self._limited = torch.where(grown, float("inf"), OWN_SHARE)
        self._sizes = torch.tensor([float(segment.size) for segment in segments], device=device)
        if in_dw:
            self._prepare(device)

    def _prepare(self, device: torch.device) -> None:
        """Note each segment's partner and weight; `_partner` is the number of segments where there is none."""
        segments = self.factors.segments
        number = {(segment.slot, segment.name): i for i, segment in enumerate(segments)}
        partners, weights, self._slow = [], [], []
        for i, segment in enumerate(segments):
            adapter = self.factors.subjects[segment.slot][segment.layer]
            known = adapter.partners() if isinstance(adapter, Adapter) else {segment.factor: (None, 1.0)}
            other, weight = (None, 0.0) if known is None else known[segment.factor]
            if isinstance(adapter, Adapter) and known is None:
                self._slow.append((i, adapter, segment.factor))
            partners.append(len(segments) if other is None else number[segment.slot, f"{segment.layer}|{other}"])
            weights.append(weight)
        self._partner = torch.tensor(partners, device=device)
        self._weight = torch.tensor(weights, device=device)
        self._places = torch.tensor([i for i, *_ in self._slow], dtype=torch.long, device=device)
        self._scale = torch.tensor([_scale(self.factors, segment) for segment in segments], device=device)

    @torch.no_grad()
    def table(self, learning_rate: float | Tensor) -> Tensor:
        """Return the rate of each segment, (segments,), for the factors as they are now."""
        if not self.in_dw:
            return self._ratio * learning_rate
        squares = self.factors.sums(self.factors.master.detach().square())
        gains = self._weight * torch.cat([squares, squares.new_ones(1)])[self._partner]
        if self._slow:
            found: dict[int, dict[str, Tensor]] = {}
            for _, adapter, _ in self._slow:
                if id(adapter) not in found:
                    found[id(adapter)] = adapter.squared_gains()
            slow = torch.stack([found[id(adapter)][factor] for _, adapter, factor in self._slow])
            gains = gains.index_copy(0, self._places, slow)
        rates = learning_rate / (gains.clamp(min=TINY).sqrt() * self._scale)
        own = (squares / self._sizes).sqrt() * self._limited
        return torch.minimum(rates, own.nan_to_num(nan=float("inf"))) * self._ratio

    @torch.no_grad()
    def shorten(self, before: Tensor, table: Tensor) -> None:
        """Scale what the factors have moved since `before`, a step at rate 1, to the rates of `table`."""
        master = self.factors.master.detach()
        blocks, rates = master.view(-1, ALIGN), self.factors.spread(table)
        blocks.copy_(torch.lerp(before.view_as(blocks), blocks, rates))


def _is_grown(factors: FlatFactors, segment: Segment) -> bool:
    adapter: nn.Module = factors.subjects[segment.slot][segment.layer]
    return segment.factor in adapter.grown if isinstance(adapter, Adapter) else True


def _scale(factors: FlatFactors, segment: Segment) -> float:
    """Return what the product is multiplied by in ΔW, without its sign."""
    adapter = factors.subjects[segment.slot][segment.layer]
    if isinstance(adapter, Adapter):
        return abs(adapter.scale * adapter.alpha_scale())
    return abs(float(getattr(adapter, "scale", 1.0)))
