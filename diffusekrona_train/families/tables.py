"""What is known of the denoisers without building them: their layers, and how adapter files name them.

Reads assets/layers/*.json. Imports no diffusers, so `krona-inspect params` answers at once and a file can be read
with no model at hand.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusekrona_train.adapters import Layer

FOLDER = Path(__file__).resolve().parents[1] / "assets" / "layers"
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
