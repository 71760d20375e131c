"""Read files of tools that adapt other linears: fused q, k, v, whose LoRA is cut, and those that lead nowhere.

The rows of a fused weight are those of its parts, so that their LoRA shares `down`, and `up` is cut by rows: exact. A
Kronecker product cannot be cut so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from diffusekrona_train.adapters.formats.peftnotes import bare_name
from diffusekrona_train.models.contracts import Layer
from diffusekrona_train.models.registry import family_named

Groups = dict[str, dict[str, Tensor]]
ORDER = ("q", "k", "v", "ffn")
UP = "lora_up.weight"


def cut_joined(groups: Mapping[str, dict[str, Tensor]], layers: Sequence[Layer], family: str) -> Groups:
    """Return the groups of a file (name of a layer in it -> its tensors), fused ones cut into those of their parts, by
    the parts' own dotted paths, and without those of layers that have no effect. ValueError where a fused one is no
    LoRA or has another number of rows."""
    owner = family_named(family)
    dead = {form for name in owner.without_effect(layers) for form in owner.other_names(name)}
    parts: dict[str, list[Layer]] = {}
    for layer in layers:
        for name in owner.joined_names(layer.name):
            parts.setdefault(name, []).append(layer)
    found: Groups = {}
    for name, group in groups.items():
        if bare_name(name) in dead:
            continue
        held = parts.get(bare_name(name))
        found |= {name: group} if held is None else _cut(name, group, held)
    return found


def _cut(name: str, group: dict[str, Tensor], held: Sequence[Layer]) -> Groups:
    if UP not in group:
        raise ValueError(
            f"layer {name} adapts q, k and v as one linear; only a LoRA of it can be cut into theirs, a Kronecker "
            "product cannot"
        )
    width = next(layer.out_features for layer in held if layer.projection in ORDER[:3])
    wide = [layer.out_features for layer in held if layer.projection == "ffn"]
    rows = 3 * width + sum(wide)
    if group[UP].shape[0] != rows:
        raise ValueError(f"layer {name} has {group[UP].shape[0]} rows; q, k and v of this model have {rows}")
    cut: Groups = {}
    for layer in held:
        first = ORDER.index(layer.projection) * width
        cut[layer.name] = {**group, UP: group[UP][first : first + layer.out_features].contiguous()}
    return cut
