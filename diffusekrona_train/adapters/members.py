"""Adapters of equal shapes whose factors lie side by side in the flat buffers: each factor of all is one tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffusekrona_train.adapters.base import Adapter
from diffusekrona_train.adapters.flat import FlatFactors, Segment


class Members:
    """Adapters of two products each; `starts` holds the first one's segments by factor."""

    def __init__(self, flat: FlatFactors, adapters: list[Adapter], starts: Mapping[str, Segment]):
        sides = adapters[0].sides
        assert sides is not None
        (self.inner, inner), (self.outer, outer) = sides
        self.flat, self.adapters = flat, adapters
        self.segments = starts
        self._factors = starts[inner], starts[outer]
        self._views: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._each: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        self._stages: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._round = -1
        self.anchor = adapters[0].get_parameter(inner)
        self._gradients = self._of(flat.gradient)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return all members' inner and outer factors (s, o, i) in `dtype`."""
        if dtype not in self._views:
            self._views[dtype] = self._of(self.flat.shadow(dtype))
        return self._views[dtype]

    def each(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Return each member's inner and outer factor (o, i) in `dtype`."""
        if dtype not in self._each:
            self._each[dtype] = list(zip(*self.factors(dtype), strict=True))
        return self._each[dtype]

    def stages(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return where this pass's gradients of both factors go; those of an earlier use are stored first."""
        if dtype not in self._stages:
            self._stages[dtype] = self._of(self.flat.stage(dtype))
        if self._round == self.flat.round:
            for gradient, stages in zip(self._gradients, zip(*self._stages.values(), strict=True), strict=True):
                for stage in stages:
                    gradient.add_(stage)
                    stage.zero_()
        self._round = self.flat.round
        return self._stages[dtype]

    def scales(self) -> list[float]:
        return [adapter.multiplier for adapter in self.adapters]

    def _of(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(  # type: ignore[return-value]
            buffer.as_strided(
                (len(self.adapters), *first.shape),
                (first.step, first.shape[1], 1),
                buffer.storage_offset() + first.start,
            )
            for first in self._factors
        )
