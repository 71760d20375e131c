"""Quantise the frozen denoiser to 4 or 8 bits: its transformer linears become bitsandbytes' ones, on CPU or GPU, or
fp8's (models/stored.py).

Embeddings, convolutions and the small time projections keep their type: they hold few parameters and shape every block.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import nn

from diffusekrona_train.models.stored import store_linears


def quantize_linears(model: nn.Module, kind: str, compute_dtype: torch.dtype, wanted: Callable[[str], bool]) -> int:
    """Replace in place every linear whose dotted name is `wanted`; 'nf4', 'int8' or 'fp8'. Returns how many.

    The numbers are rounded when the model moves to a device (on the CPU: at `.to("cpu")`), so call it before.
    ValueError for another kind, and where no linear is wanted.
    """
    if kind == "fp8":
        return store_linears(model, kind, wanted)
    if kind not in ("nf4", "int8"):
        raise ValueError(f"quantize {kind!r} is unknown; use none, nf4, int8 or fp8")
    import bitsandbytes as bnb

    targets = [name for name, module in model.named_modules() if type(module) is nn.Linear and wanted(name)]
    if not targets:
        raise ValueError(f"quantize: {kind} finds no linear to replace in this {type(model).__name__}")
    for name in targets:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, child, _quantized(bnb, getattr(parent, child), kind, compute_dtype))
    return len(targets)


def _quantized(bnb: ModuleType, linear: nn.Linear, kind: str, compute_dtype: torch.dtype) -> nn.Module:
    shape = (linear.in_features, linear.out_features)
    bias = linear.bias is not None  # pyright: ignore[reportUnnecessaryComparison]  torch types it as never None
    if kind == "nf4":
        new = bnb.nn.Linear4bit(*shape, bias=bias, compute_dtype=compute_dtype, quant_type="nf4")
        # on a CPU with AVX512-BF16, bitsandbytes 0.50 would repack the weights at the first call without gradients, for
        # a kernel that has no backward pass and misreads permuted inputs
        new.support_avx512bf16_for_cpu = False
        new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    else:
        # a threshold would look for outliers in every input, and wait for the device each time
        new = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False, threshold=0.0)
        new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    if bias:
        new.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    return new
