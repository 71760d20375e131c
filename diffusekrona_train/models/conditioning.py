"""Batch encoded prompts: rows of unequal length are padded and masked, types are kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffusekrona_train.models.contracts import Conditioning, Tensors


def moved(row: Tensors, device: torch.device | str, dtype: torch.dtype) -> Tensors:
    """Move `row` to `device`, floating-point tensors to `dtype`; integers and booleans keep their type."""
    return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in row.items()}


def collate(rows: Sequence[Tensors]) -> Conditioning:
    """Batch rows of the same names: name -> (B, ...), stacked where shapes agree, else padded at the end of their first
    axis.

    Padding is zero (False in masks). A padded tensor `x` without an `x_mask` of its own gets one: (B, L) boolean, True
    where there is something. Raises ValueError where the rows have other names.
    """
    for row in rows[1:]:
        if row.keys() != rows[0].keys():
            raise ValueError(f"prompts with {', '.join(row)} cannot be batched with {', '.join(rows[0])}")
    batch: Conditioning = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if all(value.shape == values[0].shape for value in values):
            batch[name] = torch.stack(values)
            continue
        batch[name] = pad_sequence(values, batch_first=True)
        if not name.endswith("_mask") and f"{name}_mask" not in rows[0]:
            batch[f"{name}_mask"] = _mask(values)
    return batch


def _mask(values: Sequence[Tensor]) -> Tensor:
    lengths = torch.tensor([len(value) for value in values])
    return (torch.arange(int(lengths.max())) < lengths[:, None]).to(values[0].device)
