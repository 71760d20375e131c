"""What is added to a frozen linear layer: one class a type, ADAPTERS is the table. A new type is a class and a row
here.

Parameters are fp32 masters whatever the layer is; products run in the type of x.
"""

from __future__ import annotations

import math

import torch

from diffusekrona_train.adapters.base import Adapter, Fp32Module, Options, Shapes, check_tensors, to_file
from diffusekrona_train.adapters.baselines import Full, LoHa, LoKr, LoRA
from diffusekrona_train.adapters.further import OFT, DoRA, Terms
from diffusekrona_train.adapters.krona import KronA
from diffusekrona_train.adapters.plan import plan, plan_notes
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models.layers import Layer

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Fp32Module",
    "Full",
    "KronA",
    "Layer",
    "LoHa",
    "LoKr",
    "LoRA",
    "Options",
    "Shapes",
    "build_adapter",
    "check_tensors",
    "count_parameters",
    "macs",
    "plan",
    "plan_notes",
    "to_file",
]

ADAPTERS: dict[str, type[Adapter]] = {
    "krona": KronA,
    "lora": LoRA,
    "lokr": LoKr,
    "loha": LoHa,
    "full": Full,
    "terms": Terms,
    "dora": DoRA,
    "oft": OFT,
}


def build_adapter(
    spec: AdapterConfig, layer: Layer, options: Options, generator: torch.Generator | None = None
) -> Adapter:
    """Build a new adapter for `layer`, fp32 on the CPU, with random factors from `generator`."""
    return ADAPTERS[spec.type](layer, options, spec, generator)


def count_parameters(spec: AdapterConfig, layers: list[Layer]) -> int:
    """Count trainable numbers in all of these layers (what `targets: all` trains beyond these linears is not
    counted)."""
    options, kind = plan(spec, layers), ADAPTERS[spec.type]
    return sum(
        math.prod(shape)
        for layer in layers
        for suffix, shape in kind.shapes(layer, options[layer.name], spec).items()
        if suffix != "alpha"
    )


def macs(spec: AdapterConfig, layer: Layer, options: Options) -> int:
    """Count multiplications per token that the adapter needs beside the layer's own in * out."""
    return ADAPTERS[spec.type].macs(layer, options)
