"""Compute keys and values of all cross-attentions at once, before the model runs: they depend on the caption only.

    y of all layers = their frozen outputs + scale * outer factors on (inner factors on x)

In a block, each of these small products would be a kernel of its own, forward and backward. Here it is two products for
all layers of one shape, and backward one for the gradients of each factor, whenever the last block has given its own.
Layers return what is ready, inside a checkpointed block too: there the graph is that of the first pass, to which
recomputing adds nothing. Where it cannot be (`Ahead.prepare`), layers compute as `grouped` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from diffusekrona_train.adapters.base import Adapter
from diffusekrona_train.adapters.flat import FlatFactors
from diffusekrona_train.adapters.kept import is_frozen
from diffusekrona_train.adapters.kron import Left, computes_in_own_type
from diffusekrona_train.adapters.members import Members

LIMIT = 256 * 2**20
"""Bytes of outputs at most, nine captions of SDXL in 16 bits: they stay from the first block to the last, and their
gradients take as much again."""


class Site(Protocol):
    """A layer with its adapter (`grouped.AdaptedLinear`)."""

    base: nn.Module
    adapter: Adapter
    fused: bool


class Ahead:
    """Layers of one shape with one input, of several blocks."""

    def __init__(self, flat: FlatFactors, groups: Sequence[Members], sites: Sequence[Site]):
        self.all = _All(flat, groups)
        self.sites = list(sites)

    def prepare(self, x: Tensor) -> dict[nn.Module, Tensor]:
        """Return adapter -> output (..., out) of its layer for x (..., in).

        {} if a layer is not frozen, elsewhere (in host memory) or off, if x wants a gradient, is of another width or
        under autocast, if scales differ, or if the outputs are more than LIMIT.
        """
        together, kept = self.all, self.all.flat.kept
        if not (self._fits(x) and all(map(self._takes, self.sites)) and len(set(together.scales())) == 1):
            return {}
        with torch.no_grad():
            frozen = [y if (y := kept.of(site.base, x)) is not None else site.base(x) for site in self.sites]
        if any(y.dtype != x.dtype for y in frozen):
            return {}
        outputs: tuple[Tensor, ...] = _Ahead.apply(together, x, frozen, together.anchor)  # type: ignore[assignment]
        return dict(zip(together.adapters, outputs, strict=True))

    def _fits(self, x: Tensor) -> bool:
        layer = self.all.adapters[0].layer
        size = len(self.sites) * x.numel() // layer.in_features * layer.out_features * x.itemsize
        narrow = x.shape[-1] == layer.in_features and size <= LIMIT
        here = all(_is_on(site.base, x.device) for site in self.sites)
        return narrow and here and not x.requires_grad and computes_in_own_type(x)

    def _takes(self, site: Site) -> bool:
        return is_frozen(site.base) and not (site.fused or site.adapter.off)


def take(flat: FlatFactors, adapter: nn.Module, x: Tensor) -> Tensor | None:
    """Return what is ready of an adapter's layer for x; None where nothing is.

    A block that is called without gradients may be called again with them (reentrant checkpointing): in a graph of its
    own, which must not end in that of all blocks. From then on its layers compute themselves.
    """
    ready = flat.ready.get(id(x))
    if ready is None or ready.version != x._version:
        return None
    if not torch.is_grad_enabled():
        ready.outputs.pop(adapter, None)
        return None
    return ready.outputs.get(adapter)


class _All(Members):
    """The members of all blocks. Sides are products `across` members: (s, parts, n, width of a part)."""

    def __init__(self, flat: FlatFactors, groups: Sequence[Members]):
        super().__init__(flat, [adapter for group in groups for adapter in group.adapters], groups[0].segments)
        self.groups = groups

    def stages(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return where the gradients go, as a group does: each block's may have been used alone in this pass."""
        for group in self.groups:
            group.stages(dtype)
        if dtype not in self._stages:
            self._stages[dtype] = self._of(self.flat.stage(dtype))
        return self._stages[dtype]

    def parts(self) -> tuple[int, int]:
        """Return in how many parts a token is split before the first product, and after the last."""
        inner, outer = self._factors
        if Left not in (self.inner, self.outer):
            return 1, 1
        rows, columns = (inner if self.inner is Left else outer).shape
        return columns, rows


class _Ahead(torch.autograd.Function):
    """All layers' outputs (..., out). `frozen` is hidden in a list, and x wants none: no gradient passes there."""

    @staticmethod
    def forward(ctx, together: _All, x: Tensor, frozen: list[Tensor], anchor: Tensor):
        before, after = together.parts()
        inner, outer = together.factors(x.dtype)
        parts = _split(x.reshape(1, -1, x.shape[-1]), before)
        z = together.inner.across(inner, parts.expand(len(inner), -1, -1, -1))
        added = together.outer.across(outer, z)
        y = torch.stack(frozen)
        n = parts.shape[2]
        y.view(len(y), n, after, -1).add_(added.transpose(1, 2), alpha=together.scales()[0])
        ctx.together, ctx.parts, ctx.scale = together, after, together.scales()[0]
        ctx.save_for_backward(parts, z)
        ctx.set_materialize_grads(False)
        return tuple(y.unbind())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor | None):  # type: ignore[override]
        parts, z = ctx.saved_tensors
        together: _All = ctx.together
        some = next(grad for grad in grads if grad is not None)
        whole = torch.stack([torch.zeros_like(some) if grad is None else grad for grad in grads])
        grad = _split(whole.view(len(whole), -1, whole.shape[-1]), ctx.parts)
        to_inner, to_outer = together.stages(z.dtype)
        together.outer.across_grams(to_outer, grad, z, ctx.scale)
        grad_z = together.outer.across(together.factors(z.dtype)[1].mT, grad)
        together.inner.across_grams(to_inner, grad_z, parts.expand(len(grad_z), -1, -1, -1), ctx.scale)
        return None, None, None, None


def _split(rows: Tensor, parts: int) -> Tensor:
    """(s, n, parts * width) -> (s, parts, n, width): all tokens' first parts come first."""
    return rows.view(len(rows), rows.shape[1], parts, -1).transpose(1, 2).contiguous()


def _is_on(base: nn.Module, device: torch.device) -> bool:
    return all(tensor.device == device for tensor in _tensors(base))


def _tensors(base: nn.Module) -> Iterable[Tensor]:
    yield from base.parameters()
    yield from base.buffers()
