"""Keep ΔW = scale * A ⊗ B below a share of its layer's own weight: σ(A ⊗ B) = σ(A) σ(B), so two small matrices decide.

For each of A and B the Gram matrix of its shorter side is squared SQUARINGS times; the trace of that power bounds the
largest eigenvalue from above, within a factor of side ** (2 ** -SQUARINGS). All matrices of one side are one batch, no
step waits for the device, and nothing is kept between steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffusekrona_train.adapters.flat import FlatFactors, Segment
from diffusekrona_train.adapters.krona import KronA

SQUARINGS = 6
"""The bound on σ is at most 1.8 % too high for a side of 10, 2.7 % for 32, and mostly much nearer."""
POWER_ITERATIONS = 40
"""For σ(W), once a run. It stays below the true value, by up to 3 % where many are nearly as large."""

ROUNDING = 1e-5
"""ΔW may be larger than the cap by this share."""


def sigma_bound(grams: Tensor) -> Tensor:
    """Return an upper bound on the square roots of the largest eigenvalues of grams (s, n, n), (s,); 0 becomes tiny.

    λ <= trace(G ** (2 ** k)) ** (2 ** -k); each power is divided by its trace, whose logarithms are summed.
    """
    logs = torch.zeros(len(grams), device=grams.device)
    for k in range(SQUARINGS + 1):
        trace = grams.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=torch.finfo(grams.dtype).tiny)
        logs = logs + trace.log() / 2**k
        if k < SQUARINGS:
            grams = grams / trace[:, None, None]
            grams = torch.bmm(grams, grams)
    return (logs / 2).exp()


def sigma_of(layer: torch.nn.Module, width_in: int) -> float:
    """Return the largest singular value of a linear layer (quantised or not) or a 1x1 convolution of this input width.

    Power iteration through the layer itself, so that no weight has to be unpacked; always from the same vector.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    x = torch.randn(width_in, generator=torch.Generator().manual_seed(0)).to(weight.device)
    sigma = 0.0
    for _ in range(POWER_ITERATIONS):
        x = (x / x.norm().clamp(min=torch.finfo(x.dtype).tiny)).requires_grad_()
        token = x.to(dtype)[None]
        with torch.enable_grad():
            y = layer(token[:, :, None, None] if weight.ndim == 4 else token)
            bias = layer.bias
            y = y.flatten() if bias is None else y.flatten() - bias  # type: ignore[operator]
            (x,) = torch.autograd.grad(y, x, y.detach())  # Wᵀ W x, whose length is σ² in the end
        sigma = x.norm()
    return float(sigma) ** 0.5


class NormCap:
    """After a step, B *= min(1, share * σ(W) / σ(ΔW)) for each layer of flat KronA factors, so σ(ΔW) <= share * σ(W).

    `sigmas` maps layer names to σ(W); a layer with 0 there is left alone.
    """

    def __init__(self, factors: FlatFactors, sigmas: Mapping[str, float], share: float):
        self.factors = factors
        segments, device = factors.segments, factors.master.device
        by_side: dict[int, dict[tuple[int, ...], list[int]]] = {}
        for i, segment in enumerate(segments):
            by_side.setdefault(min(segment.shape), {}).setdefault(segment.shape, []).append(i)
        self._batches = [[[segments[i] for i in own] for own in by_shape.values()] for by_shape in by_side.values()]
        order = [i for by_shape in by_side.values() for own in by_shape.values() for i in own]
        self._order = torch.tensor(order, device=device).argsort()
        number = {(segment.slot, segment.name): i for i, segment in enumerate(segments)}
        pairs = [(number[s.slot, f"{s.layer}|A"], number[s.slot, f"{s.layer}|B"]) for s in segments if s.factor == "B"]
        self._A, self._B = torch.tensor(pairs, device=device).unbind(1)
        adapters = [factors.subjects[segments[b].slot][segments[b].layer] for _, b in pairs]
        scales = [abs(adapter.scale) for adapter in adapters if isinstance(adapter, KronA)]
        limits = [share * sigmas[segments[b].layer] or float("inf") for _, b in pairs]
        self._limits = torch.tensor(limits, device=device) / torch.tensor(scales, device=device)

    @torch.no_grad()
    def bounds(self) -> Tensor:
        """Return an upper bound on each segment's σ, (segments,)."""
        found = [sigma_bound(torch.cat([self._grams(own) for own in by_shape])) for by_shape in self._batches]
        return torch.cat(found)[self._order]

    def _grams(self, segments: list[Segment]) -> Tensor:
        """Return (s, n, n), n the shorter side, for segments of one shape."""
        stack = torch.stack([segment.of(self.factors.master.detach()) for segment in segments])
        stack = stack.mT if stack.shape[1] > stack.shape[2] else stack
        return torch.bmm(stack, stack.mT)

    @torch.no_grad()
    def apply(self) -> None:
        """Shorten B where ΔW is too large."""
        sigma = self.bounds()
        shorter = (self._limits / (sigma[self._A] * sigma[self._B])).clamp(max=1.0)
        shorter = torch.where(shorter > 1 - ROUNDING, 1.0, shorter)  # what was shortened already stays as it is
        self.factors.scale(torch.ones_like(sigma).index_copy(0, self._B, shorter))
