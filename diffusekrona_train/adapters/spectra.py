"""Measure what an adapter learnt: norms and singular values, in closed form.

Works on a layer's tensors as an adapter file holds them. Each kind is a scale times a Kronecker product of small
matrices, each whole or a product of two thin ones: ‖A ⊗ B‖ = ‖A‖‖B‖ and σ(A ⊗ B) = σ(A)σ(B), so no dense ΔW is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusekrona_train.adapters.kron import kron_delta
from diffusekrona_train.models.contracts import Layer

Matrix = Tensor | tuple[Tensor, Tensor]
"""A matrix, or (up, down) that stand for up @ down."""


def terms(tensors: dict[str, Tensor]) -> tuple[float, list[Matrix]]:
    """Return a layer's file tensors (suffix -> tensor) as (scale, matrices) with ΔW = scale * (matrix ⊗ matrix …).

    LoKr's alpha counts only where a factor has low rank, as in LyCORIS; LoHa (A·B) ⊙ (C·D) becomes its exact thin pair
    of rank r². Raises ValueError for tensors of no known kind.
    """
    alpha = float(tensors["alpha"]) if "alpha" in tensors else None
    if any(suffix.startswith("diff") for suffix in tensors):
        return 1.0, [
            torch.cat([tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None] for tensor in tensors.values()], 1)
        ]
    if "lora_up.weight" in tensors:
        up, down = tensors["lora_up.weight"], tensors["lora_down.weight"]
        return _scale(alpha, up.shape[1]), [(up, down)]
    if "hada_w1_a" in tensors:
        a, b, c, d = (tensors[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        up = torch.einsum("or,os->ors", a, c).flatten(1)
        down = torch.einsum("ri,si->rsi", b, d).flatten(0, 1)
        return _scale(alpha, a.shape[1]), [(up, down)]
    if any(suffix.startswith("lokr_w1") for suffix in tensors):
        matrices, rank = [], None
        for name in ("lokr_w1", "lokr_w2"):
            whole = name in tensors
            matrices.append(tensors[name] if whole else (tensors[f"{name}_a"], tensors[f"{name}_b"]))
            rank = rank if whole else tensors[f"{name}_b"].shape[0]
        return 1.0 if rank is None else _scale(alpha, rank), matrices
    if "terms_a" in tensors:
        return 1.0, [_pair_of_terms(tensors["terms_a"], tensors["terms_b"])]
    if "dora_up" in tensors or "rotation" in tensors:
        kind = "DoRA" if "dora_up" in tensors else "OFT"
        raise ValueError(f"is a {kind} adapter: what it adds depends on the base model, so it cannot be exported")
    raise ValueError(f"tensors {', '.join(sorted(tensors))} do not belong to a known adapter type")


def _pair_of_terms(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ A_k ⊗ B_k as an exact thin pair: (I A_k) ⊗ (B_k I) = (I ⊗ B_k)(A_k ⊗ I), rank r rho²."""
    identity = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    up = [kron_delta(identity, each) for each in B]
    down = [kron_delta(each, identity) for each in A]
    return torch.cat(up, 1), torch.cat(down)


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


def singular_values(tensors: dict[str, Tensor]) -> Tensor:
    """Return all singular values that can be non-zero of a layer's ΔW, largest first, in fp64."""
    scale, matrices = terms(tensors)
    values = torch.ones(1, dtype=torch.float64)
    for matrix in matrices:
        values = torch.outer(values, _singular_values(matrix)).flatten()
    return abs(scale) * values.sort(descending=True).values


def _singular_values(matrix: Matrix) -> Tensor:
    if isinstance(matrix, Tensor):
        return torch.linalg.svdvals(matrix.double())
    up, down = matrix
    if up.shape[1] >= min(up.shape[0], down.shape[1]):
        return torch.linalg.svdvals(up.double() @ down.double())
    core = torch.linalg.qr(up.double()).R @ torch.linalg.qr(down.double().T).R.T
    return torch.linalg.svdvals(core)


def norm(tensors: dict[str, Tensor]) -> float:
    """Return the Frobenius norm of a layer's ΔW."""
    scale, matrices = terms(tensors)
    return abs(scale) * math.prod(_norm(matrix) for matrix in matrices)


def _norm(matrix: Matrix) -> float:
    if isinstance(matrix, Tensor):
        return float(matrix.double().norm())
    up, down = (part.double() for part in matrix)
    return math.sqrt(max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0))


def lora_pair(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return the exact LoRA pair (up, down), the scale inside up, rank min(A.shape) * min(B.shape); None for a full
    ΔW.

    Needs no SVD: each factor is split into itself and an identity, and (uA dA) ⊗ (uB dB) = (uA ⊗ uB)(dA ⊗ dB).
    """
    if "diff" in tensors:
        return None
    scale, matrices = terms(tensors)
    up = down = torch.ones(1, 1)
    for matrix in matrices:
        left, right = matrix if isinstance(matrix, tuple) else _split(matrix)
        up, down = kron_delta(up, left), kron_delta(down, right)
    return scale * up, down


def _split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return (up, down) with up @ down = matrix, the identity on the longer side."""
    identity = torch.eye(min(matrix.shape), dtype=matrix.dtype)
    return (matrix, identity) if matrix.shape[1] <= matrix.shape[0] else (identity, matrix)


@dataclass(frozen=True)
class LayerSpectrum:
    """What one layer learnt. `relative` is ‖ΔW‖ / ‖W‖ (None: ‖W‖ unknown); energy_rank_90 holds 90 % of ‖ΔW‖²."""

    name: str
    projection: str
    kind: str
    norm: float
    relative: float | None
    singular_values: list[float]
    energy_rank_90: int

    @property
    def size(self) -> float:
        """Return the relative norm, or the absolute one if that is not known."""
        return self.norm if self.relative is None else self.relative


def strongest(rows: list[LayerSpectrum]) -> list[LayerSpectrum]:
    """Sort layers, those that changed most first."""
    return sorted(rows, key=lambda row: row.size, reverse=True)


def measure(
    groups: dict[str, dict[str, Tensor]], layers: list[Layer], base_norms: dict[str, float] | None = None, top: int = 64
) -> list[LayerSpectrum]:
    """Return one LayerSpectrum per layer, with its `top` largest singular values; `groups` maps layer names to their
    tensors."""
    rows = []
    for layer in layers:
        values = singular_values(groups[layer.name])
        total = norm(groups[layer.name])
        base = (base_norms or {}).get(layer.name)
        energy = (values**2).cumsum(0)
        rank_90 = int((energy < 0.9 * energy[-1]).sum()) + 1 if total > 0 else 0
        kept = [float(value) for value in values[:top]]
        rows.append(
            LayerSpectrum(
                layer.name, layer.projection, layer.kind, total, total / base if base else None, kept, rank_90
            )
        )
    return rows
