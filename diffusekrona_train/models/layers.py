"""What is known of the denoisers without building them: their layers, and how adapter files name them.

Reads assets/layers/*.json. Imports no diffusers, so `krona-inspect params` answers at once and a file can be read
with no model at hand.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from diffusekrona_train.common.files import ASSETS
from diffusekrona_train.config import AdapterConfig


@dataclass(frozen=True)
class Layer:
    """A linear layer that can be adapted."""

    name: str
    """Dotted path in the denoiser: down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"""
    in_features: int
    out_features: int
    projection: str
    """q, k, v, o or ffn"""
    kind: str
    """self, cross or ffn"""


FOLDER = ASSETS / "layers"
TABLES = {"sdxl": "sdxl", "sd15": "sd15", "sd14": "sd15", "sd21": "sd21", "toybox": "toybox"}
"""Model alias -> table; SD 1.4 has the layers of SD 1.5."""
FAMILY_OF = {"sdxl": "sdxl", "toybox": "sdxl", "sd15": "sd", "sd14": "sd", "sd21": "sd"}
"""Model alias -> family; the toybox counts as SDXL."""

PROJECTION_OF = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
_LAYER = re.compile(r"\.(attn1|attn2|ff)\.(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)$")
_ATTENTION = re.compile(r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.attentions\.(\d+)\.(.+)")


def describe_layer(name: str, in_features: int, out_features: int) -> Layer:
    """The Layer of a transformer block's linear, projection and kind read from `name`; ValueError for another name."""
    match = _LAYER.search(name)
    if match is None:
        raise ValueError(f"{name} is no attention or feed-forward linear of a transformer block")
    kind = {"attn1": "self", "attn2": "cross", "ff": "ffn"}[match[1]]
    return Layer(name, in_features, out_features, PROJECTION_OF.get(match[2], "ffn"), kind)


@functools.cache
def _table(alias: str) -> dict[str, Any]:
    if alias not in TABLES:
        raise ValueError(f"model {alias!r} has no layer table; there are {', '.join(TABLES)}")
    return json.loads((FOLDER / f"{TABLES[alias]}.json").read_text())


def layer_table(alias: str) -> list[Layer]:
    """All attention and feed-forward linears of a known denoiser, in the order of its modules."""
    return [describe_layer(*row) for row in _table(alias)["layers"]]


def base_parameters(alias: str) -> int:
    """All parameters of a known denoiser."""
    return _table(alias)["base_parameters"]


def layers_per_block(alias: str) -> int:
    """Layers in each down block of a known denoiser: SDXL's file names depend on it."""
    return _table(alias)["layers_per_block"]


def file_name(family: str, name: str, layers_per_block: int = 2) -> str:
    """The name of layer `name` (dotted diffusers path) in an adapter file of `family`, without a tensor's suffix.

    sd: lora_unet_ and the diffusers path. sdxl: lora_unet_ and the original (sgm) path where there is one. Others:
    lycoris_ and the diffusers path.
    """
    path = _sgm_path(name, layers_per_block) if family == "sdxl" else name
    return ("lora_unet_" if family in ("sd", "sdxl") else "lycoris_") + path.replace(".", "_")


def file_names(family: str, names: Iterable[str], layers_per_block: int = 2) -> dict[str, str]:
    """Dotted path -> name in an adapter file, for each of `names`; see file_name."""
    return {name: file_name(family, name, layers_per_block) for name in names}


def known_names(names: Iterable[str], layers_per_block: int = 2) -> dict[str, str]:
    """Every name that tools give these layers -> dotted path: diffusers and sgm names, dotted and with underscores."""
    known: dict[str, str] = {}
    for name in names:
        for path in {name, _sgm_path(name, layers_per_block)}:
            underscored = path.replace(".", "_")
            for form in (path, f"unet.{path}", f"lora_unet_{underscored}", f"lycoris_{underscored}"):
                known[form] = name
    return known


def _sgm_path(name: str, layers_per_block: int) -> str:
    """SDXL's original path of a diffusers path: down_blocks.1.attentions.0.x -> input_blocks.4.1.x."""
    match = _ATTENTION.match(name)
    if match is None:
        return name
    side, block, mid, attention, rest = match.groups()
    if mid:
        return f"middle_block.1.{rest}" if attention == "0" else name
    index = (layers_per_block + 1) * int(block) + int(attention)
    return f"input_blocks.{1 + index}.1.{rest}" if side == "down" else f"output_blocks.{index}.1.{rest}"


# ---- in a model that is built ---------------------------------------------------------------------------------------

ROLES = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out"}


def find_layers(model: nn.Module, spec: AdapterConfig | None) -> list[Layer]:
    """The layers of `model` that `spec` chooses, in the model's order; none: all attention and feed-forward linears.

    Raises ValueError where the model has no such attention, or a pattern matches nothing (with near misses).
    """
    layers = [layer for name, module in model.named_modules() for layer in _layers_of(name, module)]
    if not any(layer.kind != "ffn" for layer in layers):
        raise ValueError(f"{type(model).__name__} has no attention module with to_q, to_k, to_v and to_out")
    return layers if spec is None else select_layers(layers, spec)


def select_layers(layers: list[Layer], spec: AdapterConfig) -> list[Layer]:
    """The same choice from a list of layers, such as a table of a model that is not there. Raises as `find_layers`."""
    if spec.targets == "all":
        return layers
    chosen = [layer for layer in layers if _has_role(layer, spec)]
    if not chosen:
        kinds = sorted({layer.kind for layer in layers})
        raise ValueError(
            f"adapter: targets {spec.targets} with attention: {spec.attention} match no layer; "
            f"the model has layers of these kinds: {', '.join(kinds) or 'none'}"
        )
    if spec.blocks is None:
        return chosen
    for pattern in spec.blocks:
        if not any(_matches(layer.name, pattern) for layer in chosen):
            raise ValueError(f"adapter.blocks: {pattern!r} matches no layer; near: {', '.join(_near(pattern, chosen))}")
    return [layer for layer in chosen if any(_matches(layer.name, pattern) for pattern in spec.blocks)]


def _layers_of(name: str, module: nn.Module) -> Iterator[Layer]:
    """The layers that `module` has by its own role: an attention's projections, or a feed-forward's linears."""
    if all(hasattr(module, role) for role in ROLES.values()):
        linears = {letter: next(_linears(role, getattr(module, role)), None) for letter, role in ROLES.items()}
        if all(linears.values()):
            kind = "cross" if _is_cross(name, module) else "self"
            for letter, (path, linear) in ((k, v) for k, v in linears.items() if v):
                yield _layer(f"{name}.{path}", linear, letter, kind)
    elif isinstance(getattr(module, "net", None), nn.ModuleList | nn.Sequential):
        for path, linear in _linears("net", module.net):  # type: ignore[arg-type]
            yield _layer(f"{name}.{path}", linear, "ffn", "ffn")


def _layer(name: str, linear: nn.Module, projection: str, kind: str) -> Layer:
    return Layer(name.removeprefix("."), linear.in_features, linear.out_features, projection, kind)  # type: ignore[arg-type]


def _linears(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, linear) below `module`; whatever has in_features counts, bitsandbytes' and adapted ones too."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _linears(f"{path}.{name}", child)


def _is_cross(name: str, module: nn.Module) -> bool:
    """diffusers' attention says it itself; others are told by the widths that keys and queries come from."""
    said = getattr(module, "is_cross_attention", None)
    if said is not None:
        return bool(said)
    return name.endswith("attn2") or module.to_k.in_features != module.to_q.in_features  # type: ignore[union-attr]


def _has_role(layer: Layer, spec: AdapterConfig) -> bool:
    if layer.kind == "ffn":
        return spec.ffn
    return layer.projection in spec.targets and spec.attention in ("both", layer.kind)


def _matches(name: str, pattern: str) -> bool:
    return pattern in name or fnmatchcase(name, f"*{pattern}*")


def _near(pattern: str, layers: list[Layer]) -> list[str]:
    """Dotted beginnings of layer names that look like `pattern`."""
    parts = [layer.name.split(".") for layer in layers]
    prefixes = list(dict.fromkeys(".".join(words[:n]) for words in parts for n in range(1, len(words) + 1)))
    return (
        difflib.get_close_matches(pattern, prefixes, n=3, cutoff=0.5) or [p for p in prefixes if p.count(".") == 1][:6]
    )
