"""Convert adapter files for other tools. EXPORTERS is the table: a format is a function and a row."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusekrona_train.adapters.formats import tensorfile
from diffusekrona_train.adapters.formats.adapterfile import AdapterFile, write_adapter
from diffusekrona_train.adapters.formats.merged import (
    OVER_BASE,
    delta,
    kind_of_adapter,
    merge,
    no_rank,
    refuse_over_base,
    to_checkpoint,
    to_merged,
)
from diffusekrona_train.adapters.kron import lora_truncate
from diffusekrona_train.adapters.spectra import lora_pair, norm, terms
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models.layers import Layer
from diffusekrona_train.models.registry import FAMILIES, family_named
from diffusekrona_train.models.source import ModelSource

__all__ = ["EXPORTERS", "delta", "exact_rank", "export_command", "lora_pairs", "merge", "row_order"]

CUT_RANK = 64
"""The rank to propose where the exact one is too large."""
Pairs = dict[str, tuple[Tensor, Tensor]]
"""Layer -> (up (out, r), down (r, in)) with every scale inside up."""


def to_native(
    file: AdapterFile, out: Path, *, dtype: str, rank: int | None = None, source: ModelSource | None = None
) -> list[str]:
    """Write this project's own file, with its JSON."""
    no_rank(rank, "native")
    write_adapter(out, file, dtype)
    return [f"{len(file.layers)} layers of {kind_of_adapter(file)}"]


def to_lokr(
    file: AdapterFile, out: Path, *, dtype: str, rank: int | None = None, source: ModelSource | None = None
) -> list[str]:
    """Write a plain LoKr file. ValueError for adapters that are not a Kronecker product and for the authors' row
    order."""
    no_rank(rank, "lokr")
    if file.row_permutation:
        raise ValueError(
            f"{file.path}: the authors' layers permute the rows of A ⊗ B, which a LoKr file cannot express; "
            "use --to lora or merged"
        )
    if kind_of_adapter(file) not in ("krona", "lokr"):
        raise ValueError(
            f"{file.path}: holds {kind_of_adapter(file)}, not a Kronecker product; use --to lora, diffusers or merged"
        )
    write_adapter(out, file, dtype, own_json=False)
    shapes = Counter(tuple(group["lokr_w1"].shape) for group in file.groups.values() if "lokr_w1" in group)
    remarks = [f"{len(file.layers)} layers"]
    if any(rows != columns for rows, columns in shapes):
        remarks.append("A is not square: ComfyUI, A1111 and Forge read it; diffusers, PEFT and LyCORIS need --to lora")
    return remarks


def to_lora(
    file: AdapterFile, out: Path, *, dtype: str, rank: int | None = None, source: ModelSource | None = None
) -> list[str]:
    """Write a LoRA file in kohya's keys, one alpha for the whole file (diffusers mis-scales files where alphas
    differ)."""
    pairs, remarks = lora_pairs(file, rank)
    alpha = Counter(up.shape[1] for up, _ in pairs.values()).most_common(1)[0][0]
    groups = {
        name: {
            "lora_down.weight": _shaped(file, name, down),
            "lora_up.weight": _shaped(file, name, up * (up.shape[1] / alpha)),
            "alpha": torch.tensor(float(alpha)),
        }
        for name, (up, down) in pairs.items()
    }
    options: dict[str, Any] = {name: {"rank": up.shape[1], "alpha": float(alpha)} for name, (up, _) in pairs.items()}
    spec = AdapterConfig(type="lora", rank=alpha, alpha=float(alpha))
    write_adapter(out, replace(file, groups=groups, options=options, spec=spec), dtype, own_json=False)
    return remarks


def to_diffusers(
    file: AdapterFile, out: Path, *, dtype: str, rank: int | None = None, source: ModelSource | None = None
) -> list[str]:
    """Write what the family's own pipeline loads by `load_lora_weights`: a LoRA file in PEFT's keys,
    `unet.<path>.lora_A.weight` (or transformer.), alpha equal to the rank, so that the scale is 1; a LoKr file where
    the products are no exact LoRA and the pipeline takes LoKr."""
    part = family_named(file.family).parts.denoiser.folder if file.family in FAMILIES else "unet"
    products, reason = _products_for_peft(file)
    dense = any(exact_rank(file.groups[layer.name]) > _largest_rank(layer) for layer in file.layers if products)
    if rank is None and dense:
        tensors = {f"{part}.{name}.lokr_w{i + 1}": one for name, pair in products.items() for i, one in enumerate(pair)}
        tensorfile.write(out, tensorfile.cast(tensors, dtype), {"format": "pt"})
        return [f"{len(products)} layers, as LoKr: for diffusers only; ComfyUI and Forge read --to lokr"]
    pairs, remarks = lora_pairs(file, rank, reason)
    tensors = {f"{part}.{name}.lora_A.weight": _shaped(file, name, down) for name, (_, down) in pairs.items()}
    tensors |= {f"{part}.{name}.lora_B.weight": _shaped(file, name, up) for name, (up, _) in pairs.items()}
    ranks = {name: up.shape[1] for name, (up, _) in pairs.items()}
    most = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{name}": value for name, value in ranks.items() if value != most}
    config = {
        f"{part}.r": most,
        f"{part}.lora_alpha": most,
        f"{part}.rank_pattern": others,
        f"{part}.alpha_pattern": others,
        f"{part}.target_modules": sorted(pairs),
    }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    tensorfile.write(out, tensorfile.cast(tensors, dtype), metadata)
    return [*remarks, "ComfyUI, A1111, Forge and InvokeAI do not read this file: --to lora is for those"]


EXPORTERS: dict[str, Callable[..., list[str]]] = {
    "native": to_native,
    "lokr": to_lokr,
    "lora": to_lora,
    "diffusers": to_diffusers,
    "merged": to_merged,
    "checkpoint": to_checkpoint,
}
"""Format -> fn(file, out, *, dtype, rank, source) -> remarks to print. The file must be identified."""


def export_command(file: AdapterFile, path: Path, model: str) -> str:
    """Return the krona-convert command that makes `file`, called `path`, readable for diffusers and others: an exact
    LoRA where that is not larger than the dense difference, else a cut one; for the whole denoiser a merged pipeline
    of `model`. Empty for a type that has no exports.
    """
    if file.spec is not None and file.spec.type in OVER_BASE:
        return ""
    name = "krona-convert", str(path), str(path.with_suffix(""))
    if any(layer.kind == "all" for layer in file.layers):
        return shlex.join([*name[:2], f"{name[2]}-merged", "--to", "merged", "--model", model])
    words = [*name[:2], f"{name[2]}-lora.safetensors", "--to", "lora"]
    if any(exact_rank(file.groups[layer.name]) > _largest_rank(layer) for layer in file.layers):
        words += ["--rank", str(min(CUT_RANK, *map(_largest_rank, file.layers)))]
    return shlex.join(words)


def _largest_rank(layer: Layer) -> int:
    """Return the largest rank of a LoRA that is not larger than the dense difference; 1 for a single row or column."""
    return max(1, layer.in_features * layer.out_features // (layer.in_features + layer.out_features))


def _products_for_peft(file: AdapterFile) -> tuple[Pairs, str]:
    """Return layer -> (A, B), scale inside A, of a file whose products diffusers loads as LoKr; else {} and why not.

    PEFT derives both factors' shapes from one number for all layers.
    """
    if kind_of_adapter(file) not in ("krona", "lokr") or file.row_permutation:
        return {}, ""
    if file.family not in FAMILIES or not family_named(file.family).loads_lokr:
        return {}, f"; diffusers loads no LoKr file for family {file.family!r}"
    products: Pairs = {}
    for layer in file.layers:
        scale, matrices = terms({suffix: tensor.float() for suffix, tensor in file.groups[layer.name].items()})
        A, B = (matrix if isinstance(matrix, Tensor) else matrix[0] @ matrix[1] for matrix in matrices)
        products[layer.name] = (scale * A, B.contiguous())
    sizes = {tuple(A.shape) for A, _ in products.values()}
    (rows, columns), *others = sizes
    if others or rows != columns or any(rows > min(B.shape) for _, B in products.values()):
        return {}, "; diffusers loads a LoKr only where A is square, of one size in all layers, and not larger than B"
    return products, ""


def lora_pairs(file: AdapterFile, rank: int | None = None, reason: str = "") -> tuple[Pairs, list[str]]:
    """Return each layer as a LoRA, exact or truncated to `rank`, with remarks on the ranks and the truncation error.

    Raises ValueError where the exact pair would be larger than the dense difference and no rank is given; `reason` is
    added to what it says.
    """
    refuse_over_base(file)
    if rank is not None and rank < 1:
        raise ValueError(f"--rank {rank} is below 1")
    pairs, errors, norms = {}, {}, {}
    for layer in file.layers:
        if layer.kind == "all":
            raise ValueError(f"{file.path}: full fine-tuning of the whole denoiser is not a LoRA; use --to merged")
        group = {suffix: tensor.float() for suffix, tensor in file.groups[layer.name].items()}
        exact = exact_rank(group)
        if rank is None and exact > _largest_rank(layer):
            raise ValueError(
                f"{file.path}: layer {layer.name} has exact LoRA rank {exact}, larger than the dense difference of "
                f"{layer.out_features} x {layer.in_features}; truncate it with --rank, or use --to merged{reason}"
            )
        up, down, errors[layer.name] = _pair(group, exact if rank is None else min(rank, exact), exact)
        if file.options[layer.name].get("row_permutation"):
            up = up[row_order(*(group[name].shape[0] for name in ("lokr_w1", "lokr_w2")))]
        pairs[layer.name], norms[layer.name] = (up, down), norm(group)
    return pairs, _remarks(pairs, errors, norms)


def exact_rank(group: dict[str, Tensor]) -> int:
    """Return the rank of a layer's exact LoRA pair, from the shapes of its tensors."""
    return math.prod(
        min(matrix.shape)
        if isinstance(matrix, Tensor)
        else min(matrix[0].shape[1], matrix[0].shape[0], matrix[1].shape[1])
        for matrix in terms(group)[1]
    )


def row_order(a2: int, b2: int) -> Tensor:
    """perm (a2*b2,) with ΔW = (A ⊗ B)[perm] in the authors' layout: row β*a2 + α comes from row α*b2 + β."""
    return torch.arange(a2 * b2).reshape(a2, b2).T.reshape(-1)


def _shaped(file: AdapterFile, name: str, matrix: Tensor) -> Tensor:
    """Return a factor as other tools expect it: of a 1x1 convolution with its two sides of 1."""
    return matrix[:, :, None, None] if file.options[name].get("conv") else matrix


def _pair(group: dict[str, Tensor], rank: int, exact: int) -> tuple[Tensor, Tensor, float]:
    """Return (up, down, Frobenius error) of this rank; the optimal truncation if it is below the exact one."""
    scale, matrices = terms(group)
    if rank < exact and len(matrices) == 2:
        A, B = (matrix if isinstance(matrix, Tensor) else matrix[0] @ matrix[1] for matrix in matrices)
        up, down, error = lora_truncate(A, B, rank)
        return scale * up, down, abs(scale) * error
    pair = lora_pair(group)
    if pair is not None and rank >= pair[0].shape[1]:
        return *pair, 0.0
    up, down = pair or (group["diff"], torch.eye(group["diff"].shape[1]))
    left, core_left = torch.linalg.qr(up.double())
    right, core_right = torch.linalg.qr(down.double().T)
    U, S, V = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    root = S[:rank].sqrt()
    error = float(S[rank:].square().sum().sqrt())
    return (left @ U[:, :rank] * root).float(), (root[:, None] * V[:rank] @ right.T).float(), error


def _remarks(pairs: Pairs, errors: dict[str, float], norms: dict[str, float]) -> list[str]:
    ranks = Counter(up.shape[1] for up, _ in pairs.values())
    listed = ", ".join(f"rank {rank} in {count} layers" for rank, count in sorted(ranks.items()))
    lost, whole = (math.sqrt(sum(value**2 for value in values.values())) for values in (errors, norms))
    if lost == 0:
        return [f"exact: {listed}"]
    worst = max(errors, key=lambda name: errors[name] / (norms[name] or 1.0))
    share = errors[worst] / (norms[worst] or 1.0)
    return [
        f"cut: {listed}",
        f"error of the truncation: {lost / whole:.2%} of ‖ΔW‖ over all layers, at most {share:.2%} ({worst})",
    ]
