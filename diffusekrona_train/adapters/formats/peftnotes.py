"""Read PEFT's and diffusers' adapter scales: not `.alpha` tensors but JSON in the header or beside the file.

The scale of a layer is alpha / r, with use_rslora alpha / sqrt(r), with patterns of layer names for both.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HEADER = "lora_adapter_metadata"
"""The key in the header of files by diffusers."""
PREFIXES = ("base_model.model.unet.", "base_model.model.", "unet.", "transformer.")
BESIDE = "adapter_config.json"
"""PEFT's own file beside adapter_model.safetensors."""
FIRST = ("lora_up.weight", "lokr_w1", "lokr_w1_a", "hada_w1_a")
"""The tensor of a layer that can carry its scale."""

REFUSED = ("lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "kasa_config", "layer_replication")
"""Settings that change what a layer computes in ways that a LoRA file cannot express."""
RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that take something out of the base's weights: such a file fits only the changed base."""


def with_scales(
    path: Path, groups: dict[str, dict[str, Tensor]], metadata: dict[str, str]
) -> dict[str, dict[str, Tensor]]:
    """Return layer -> suffix -> tensor with the scale of PEFT's JSON; `.alpha` tensors of a file take precedence.

    A LoRA gets an `alpha`, other kinds the scale in their first tensor. Without such a JSON nothing changes. ValueError
    for a DoRA and other settings that would change the result.
    """
    config = _config(path, groups, metadata)
    if not config:
        return groups
    _refuse(config)
    scaled = {}
    for name, group in groups.items():
        first = next((suffix for suffix in FIRST if suffix in group), None)
        if first is None or "alpha" in group:
            scaled[name] = group
            continue
        rank = group[first].shape[1] if first == "lora_up.weight" else int(_said(config, "r", "rank_pattern", name))
        alpha = float(_said(config, "lora_alpha" if "lora_alpha" in config else "alpha", "alpha_pattern", name))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        more = (
            {"alpha": torch.tensor(scale * rank)}
            if first == "lora_up.weight"
            else {first: group[first].float() * scale}
        )
        scaled[name] = {**group, **more}
    return scaled


def bare_name(name: str) -> str:
    """Return a layer's name in a file without what PEFT and diffusers put before it."""
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def _config(path: Path, groups: dict[str, Any], metadata: dict[str, str]) -> dict[str, Any]:
    """Return PEFT's settings for the denoiser, {} if the file has none."""
    beside = path.parent / BESIDE
    of_peft = any(name.startswith("base_model.model.") for name in groups)
    try:
        if HEADER in metadata:
            found = json.loads(metadata[HEADER])
        elif of_peft and beside.is_file():
            found = json.loads(beside.read_text(encoding="utf-8-sig"))
        elif of_peft:
            raise ValueError(f"is a PEFT file; its scale is in {BESIDE} beside it, which is missing")
        else:
            return {}
    except json.JSONDecodeError as error:
        raise ValueError(
            f"its PEFT settings ({HEADER if HEADER in metadata else BESIDE}) are not JSON: {error}"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"its PEFT settings ({HEADER}) are not a JSON object")
    parts = ("unet.", "transformer.")
    own = {key.removeprefix(part): value for part in parts for key, value in found.items() if key.startswith(part)}
    return own or {key: value for key, value in found.items() if "." not in key}


def _said(config: dict[str, Any], usual: str, patterns: str, name: str) -> Any:
    """Return a number of the settings for this layer: the first pattern that ends its name, as PEFT matches it."""
    bare = bare_name(name)
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", bare):
            return value
    if not isinstance(config.get(usual), int | float):
        raise ValueError(f"its PEFT settings have no {usual} for layer {bare}")
    return config[usual]


def _refuse(config: dict[str, Any]) -> None:
    if config.get("use_dora"):
        raise ValueError(f"is a DoRA (use_dora in its PEFT settings), {DORA}")
    for name in REFUSED:
        if config.get(name):
            raise ValueError(f"has {name}: {config[name]!r} in its PEFT settings, which cannot be read here")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(RESIDUAL):
        raise ValueError(
            f"was initialised as {start}, which changes the base's weights; save it with PEFT's "
            "path_initial_model_for_weight_conversion, which converts it to a plain LoRA"
        )


DORA = "which rescales the base's own weights; no LoRA, LoHa or LoKr says the same: merge it in the tool that made it"
