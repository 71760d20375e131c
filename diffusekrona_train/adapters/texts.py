"""What layers make of captions: computed once and kept where it comes again, made for all blocks before the model runs.

The text is the only input of cross-attention's k and v. So their frozen part is the same in every step that shows the
same captions (`Kept`), and what their adapters add need not wait for the blocks (`Ahead`):

    y of all layers = their frozen outputs + scale * outer factors on (inner factors on x)

In a block, each of these small products would be a kernel of its own, forward and backward. Here it is two products for
all layers of one shape, and backward one for the gradients of each factor, whenever the last block has given its own.
Layers return what is ready, inside a checkpointed block too: there the graph is that of the first pass, to which
recomputing adds nothing. Where it cannot be (`Ahead.prepare`), layers compute as `grouped` does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from diffusekrona_train.adapters.base import Adapter
from diffusekrona_train.adapters.flat import FlatFactors, Members
from diffusekrona_train.adapters.kron import Left, computes_in_own_type
from diffusekrona_train.common.device import free_bytes

MOST_KEPT = 256 * 2**20
"""Bytes kept at most: ten captions of SDXL in 16 bits."""
SHARE_OF_FREE = 1 / 16
"""The same as a part of a GPU's free memory, asked at the first use."""
MOST_AHEAD = 256 * 2**20
"""Bytes of outputs at most, nine captions of SDXL in 16 bits: they stay from the first block to the last, and their
gradients take as much again."""

Told = dict[str, Any]
"""As models.contracts.Conditioning."""


class Texts:
    """What an injection's layers make of captions: what they keep, and what is ready for the pass that comes."""

    def __init__(self) -> None:
        self.kept = Kept()
        self.ahead: list[Ahead] = []
        self.ready: dict[int, Ready] = {}

    def expect(self, x: Tensor) -> None:
        """Compute what depends only on x (B, L, width), before a model that gives x to its layers unchanged runs.

        Its layers take it while that tensor is unchanged, until the gradients of the pass are stored or forgotten.
        """
        found: dict[nn.Module, Tensor] = {}
        for ahead in self.ahead if torch.is_grad_enabled() else ():
            found |= ahead.prepare(x, self.kept)
        if found:
            self.ready[id(x)] = Ready(x, x._version, found)

    def take(self, adapter: nn.Module, x: Tensor) -> Tensor | None:
        """Return what is ready of an adapter's layer for x; None where nothing is.

        A block that is called without gradients may be called again with them (reentrant checkpointing): in a graph of
        its own, which must not end in that of all blocks. From then on its layers compute themselves.
        """
        ready = self.ready.get(id(x))
        if ready is None or ready.version != x._version:
            return None
        if not torch.is_grad_enabled():
            ready.outputs.pop(adapter, None)
            return None
        return ready.outputs.get(adapter)

    def forget(self) -> None:
        """Drop what is ready, and with it the pass's graph."""
        self.ready.clear()


@dataclass
class Ready:
    """What was computed of an input before the model runs; `version` is the input's then."""

    x: Tensor
    version: int
    outputs: dict[nn.Module, Tensor]
    """Adapter -> its layer's output, what it adds included."""


# ---- kept ------------------------------------------------------------------------------------------------------------


@dataclass
class _Entry:
    told: Told
    nbytes: int
    outputs: dict[str, WeakKeyDictionary[nn.Module, tuple[int, Tensor]]] = field(default_factory=dict)
    """Name of the input -> layer -> (version of its weight, its output)."""


class Kept:
    """Inputs by key, and what layers made of them; those used longest ago are dropped beyond `limit` bytes.

    An input is known by its identity: `again` returns the same tensors for the same captions, and only for those
    tensors, unchanged, is anything kept. All other inputs (images of validation, a captured step's own copies) are
    computed as ever. A batch is kept as a whole, not row by row: so the numbers are those of the product that it
    replaces.
    """

    def __init__(self, limit: int | None = None):
        self.limit, self.on, self.nbytes = limit, True, 0
        self._entries: dict[Hashable, _Entry] = {}
        self._places: dict[int, tuple[_Entry, str, int]] = {}

    def again(self, key: Hashable, make: Callable[[], Told]) -> Told:
        """Return what `make` returned for this key, the same tensors while they are kept."""
        entry = self._entries.pop(key, None)
        if entry is None:
            told = make()
            tensors = {name: value for name, value in told.items() if isinstance(value, Tensor)}
            size = sum(value.nbytes for value in tensors.values())
            if not tensors or len(tensors) < len(told) or not self._fits(size, next(iter(tensors.values())).device):
                return told
            entry = _Entry(told, size)
            self.nbytes += size
            self._places.update({id(value): (entry, name, value._version) for name, value in tensors.items()})
        self._entries[key] = entry  # the last one is the one in use
        return entry.told

    def of(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """Return layer(x) without a gradient, computed once; None where x is not kept or the layer is not frozen.

        Nobody may write into it.
        """
        entry, name, version = self._places.get(id(x), (None, "", 0))
        if entry is None or x._version != version or not is_frozen(layer):
            return None
        outputs = entry.outputs.setdefault(name, WeakKeyDictionary())
        of_weight, y = outputs.get(layer, (None, None))
        if y is not None and of_weight == layer.weight._version:  # type: ignore[union-attr]
            return y
        with torch.no_grad():
            made = layer(x)
        if y is None and self._fits(made.nbytes, x.device, entry):
            entry.nbytes += made.nbytes
            self.nbytes += made.nbytes
        elif y is None:
            return made
        outputs[layer] = layer.weight._version, made  # type: ignore[assignment,union-attr]
        return made

    def stop(self) -> None:
        """Drop everything and keep nothing any more."""
        self.on, self.nbytes = False, 0
        self._entries.clear()
        self._places.clear()

    def _fits(self, more: int, device: torch.device, using: _Entry | None = None) -> bool:
        """Return whether `more` bytes may be kept, after dropping the oldest entries but the one in use."""
        if not self.on:
            return False
        if self.limit is None:
            free = free_bytes(device)
            self.limit = MOST_KEPT if free is None else min(MOST_KEPT, int(free * SHARE_OF_FREE))
        for key, entry in list(self._entries.items()):
            if self.nbytes + more <= self.limit:
                break
            if entry is not using:
                del self._entries[key]
                self.nbytes -= entry.nbytes
                for value in entry.told.values():
                    self._places.pop(id(value), None)
        return self.nbytes + more <= self.limit


def is_frozen(layer: nn.Module) -> bool:
    """Return whether a layer is one frozen product: nothing beneath it trains, and nobody listens to its calls."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    return not hooks and not layer._modules and not any(value.requires_grad for value in layer.parameters())


# ---- ahead ---------------------------------------------------------------------------------------------------------


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

    def prepare(self, x: Tensor, kept: Kept) -> dict[nn.Module, Tensor]:
        """Return adapter -> output (..., out) of its layer for x (..., in).

        {} if a layer is not frozen, elsewhere (in host memory) or off, if x wants a gradient, is of another width or
        under autocast, if scales differ, or if the outputs are more than MOST_AHEAD.
        """
        together = self.all
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
        narrow = x.shape[-1] == layer.in_features and size <= MOST_AHEAD
        here = all(_is_on(site.base, x.device) for site in self.sites)
        return narrow and here and not x.requires_grad and computes_in_own_type(x)

    def _takes(self, site: Site) -> bool:
        return is_frozen(site.base) and not (site.fused or site.adapter.off)


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
