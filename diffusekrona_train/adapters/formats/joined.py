"""Read files of tools that adapt other linears: fused q, k, v, whose LoRA is cut, modulations whose rows have another
order, and those that lead nowhere.

The rows of a fused weight are those of its parts, so that their LoRA shares `down`, and `up` is cut by rows: exact. A
Kronecker product cannot be cut so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffusekrona_train.adapters.formats.peftnotes import bare_name
from diffusekrona_train.models.contracts import Layer
from diffusekrona_train.models.registry import family_named

Groups = dict[str, dict[str, Tensor]]
Found = list[tuple[str, str, dict[str, Tensor]]]
"""Name of a layer in a file, a name of what it adapts, its tensors."""
ORDER = ("q", "k", "v", "ffn")
UP = "lora_up.weight"


def cut_joined(groups: Mapping[str, dict[str, Tensor]], layers: Sequence[Layer], family: str) -> Found:
    """Return the groups of a file (name of a layer in it -> its tensors), fused ones cut into those of their parts and
    halves in diffusers' order, by the layers' own dotted paths, and without those of layers that have no effect.
    ValueError where such a one is no LoRA or has another number of rows."""
    owner = family_named(family)
    dead = {form for name in owner.without_effect(layers) for form in owner.other_names(name)}
    parts: dict[str, list[Layer]] = {}
    for layer in layers:
        for name in owner.joined_names(layer.name):
            parts.setdefault(name, []).append(layer)
    turned = {name: layer for layer in layers for name in owner.turned_names(layer)}
    found: Found = []
    for name, group in groups.items():
        bare = bare_name(name)
        if bare in dead:
            continue
        if bare in parts:
            found += [(name, path, own) for path, own in _cut(name, group, parts[bare]).items()]
        elif bare in turned:
            found.append((name, turned[bare].name, _turned(name, group, turned[bare].out_features)))
        else:
            found.append((name, bare, group))
    return found


def _turned(name: str, group: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    if UP not in group:
        raise ValueError(
            f"layer {name} has its rows in another order than diffusers' linear; only a LoRA of it can be read, name "
            "it by diffusers' path otherwise"
        )
    _check_rows(name, group, rows, "shift and scale")
    return {**group, UP: torch.cat(group[UP].chunk(2)[::-1])}


def _cut(name: str, group: dict[str, Tensor], held: Sequence[Layer]) -> Groups:
    if UP not in group:
        raise ValueError(
            f"layer {name} adapts q, k and v as one linear; only a LoRA of it can be cut into theirs, a Kronecker "
            "product cannot"
        )
    width = next(layer.out_features for layer in held if layer.projection in ORDER[:3])
    wide = [layer.out_features for layer in held if layer.projection == "ffn"]
    rows = 3 * width + sum(wide)
    _check_rows(name, group, rows, "q, k and v")
    cut: Groups = {}
    for layer in held:
        first = ORDER.index(layer.projection) * width
        own = {suffix: tensor.clone() for suffix, tensor in group.items()}  # a file cannot hold one for several
        cut[layer.name] = {**own, UP: group[UP][first : first + layer.out_features].contiguous()}
    return cut


def _check_rows(name: str, group: dict[str, Tensor], rows: int, what: str) -> None:
    if tuple(group[UP].shape[:1]) != (rows,):
        raise ValueError(f"layer {name} has {(*group[UP].shape, 0)[0]} rows; {what} of this model have {rows}")
