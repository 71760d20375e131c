"""Keep what frozen layers make of inputs that come again: keys and values of a UNet's captions.

The text is the only input of cross-attention's k and v, so their frozen part is the same in every step that shows the
same captions. An input is known by its identity: `again` returns the same tensors for the same captions, and only for
those tensors, unchanged, is anything kept. All other inputs (images of validation, a captured step's own copies) are
computed as ever. A batch is kept as a whole, not row by row: so the numbers are those of the product that it replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from diffusekrona_train.common.device import free_bytes

LIMIT = 256 * 2**20
"""Bytes kept at most: ten captions of SDXL in 16 bits."""
SHARE_OF_FREE = 1 / 16
"""The same as a part of a GPU's free memory, asked at the first use."""

Told = dict[str, Any]
"""As models.contracts.Conditioning."""


@dataclass
class _Entry:
    told: Told
    nbytes: int
    outputs: dict[str, WeakKeyDictionary[nn.Module, tuple[int, Tensor]]] = field(default_factory=dict)
    """Name of the input -> layer -> (version of its weight, its output)."""


class Kept:
    """Inputs by key, and what layers made of them; those used longest ago are dropped beyond `limit` bytes."""

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
            self.limit = LIMIT if free is None else min(LIMIT, int(free * SHARE_OF_FREE))
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
