"""The two products that adapters are made of, each as one kernel that adds to what is there.

A factor M (o, i) maps a part of each token: `Right` its last side, `Left` its first. KronA with B first is Right by B,
then Left by A; with A first the other way round; LoRA is Right twice. Tensors come as (n tokens, anything), contiguous.
The types of all are one; sums are made by BLAS in fp32 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusekrona_train.adapters.kron import kron_macs


class Right:
    """Each row of width i becomes M times it: (n, k, i) -> (n, k, o)."""

    @staticmethod
    def add(target: Tensor, M: Tensor, source: Tensor, scale: float, *, beta: int = 1, fresh: bool = False) -> Tensor:
        """Compute target * beta + scale * M ∘ source, in place unless `fresh`. With beta 0 the target may hold
        anything."""
        into = target.view(-1, M.shape[0])
        out = None if fresh else into
        total = torch.addmm(into, source.view(-1, M.shape[1]), M.mT, beta=beta, alpha=scale, out=out)
        return total.view(target.shape) if fresh else target

    @staticmethod
    def many(Ms: Tensor, source: Tensor) -> Tensor:
        """Ms (s, o, i) each on the same source (n, k * i) -> (s, n, k * o), in one product."""
        rows = source.view(-1, Ms.shape[2])
        return torch.bmm(rows.expand(len(Ms), -1, -1), Ms.mT).view(len(Ms), len(source), -1)

    @staticmethod
    def grams(out: Tensor, grads: list[Tensor], sources: list[Tensor], scales: list[float]) -> None:
        """out[j] (o, i) = scale * Σ grad ⊗ source, the gradient of M of each member."""
        for into, grad, source, scale in zip(out, grads, sources, scales, strict=True):
            left = grad.view(-1, into.shape[0]).mT
            torch.addmm(into, left, source.view(-1, into.shape[1]), beta=0, alpha=scale, out=into)

    @staticmethod
    def grams_of_one(out: Tensor, grads: Tensor, source: Tensor) -> None:
        """The same for members with one source (n, k * i) and grads (s, n, k * o), in one product."""
        rows = source.view(-1, out.shape[2])
        torch.bmm(grads.view(len(out), -1, out.shape[1]).mT, rows.expand(len(out), -1, -1), out=out)


class Left:
    """Each token (i, w) becomes M times it: (n, i, w) -> (n, o, w). A batched product: torch.matmul would copy."""

    @staticmethod
    def add(target: Tensor, M: Tensor, source: Tensor, scale: float, *, beta: int = 1, fresh: bool = False) -> Tensor:
        """As Right.add."""
        into = target.view(len(target), M.shape[0], -1)
        out = None if fresh else into
        tokens = source.view(len(source), M.shape[1], -1)
        total = torch.baddbmm(into, M.expand(len(source), -1, -1), tokens, beta=beta, alpha=scale, out=out)
        return total.view(target.shape) if fresh else target

    @staticmethod
    def many(Ms: Tensor, source: Tensor) -> Tensor:
        """As Right.many, in one product for each member."""
        out = source.new_empty(len(Ms), len(source), source.shape[1] // Ms.shape[2] * Ms.shape[1])
        for into, M in zip(out, Ms, strict=True):
            Left.add(into, M, source, 1.0, beta=0)
        return out

    @staticmethod
    def grams(out: Tensor, grads: list[Tensor], sources: list[Tensor], scales: list[float]) -> None:
        """As Right.grams. Σ over tokens of small products: to join the tokens for one product would copy the grads."""
        members, o, i = out.shape
        parts = out.new_empty(members, len(grads[0]), o, i)
        for part, grad, source, scale in zip(parts, grads, sources, scales, strict=True):
            left, right = grad.view(len(grad), o, -1), source.view(len(source), i, -1).mT
            torch.baddbmm(part, left, right, beta=0, alpha=scale, out=part)
        torch.sum(parts, 1, out=out)

    @staticmethod
    def grams_of_one(out: Tensor, grads: Tensor, source: Tensor) -> None:
        """As Right.grams_of_one, in two kernels more a member."""
        Left.grams(out, list(grads), [source] * len(grads), [1.0] * len(grads))


Side = type[Right] | type[Left]
Sides = tuple[tuple[Side, str], tuple[Side, str]]
"""The two products that an adapter is, the inner one first, with the names of their factors."""


def kron_sides(A: Tensor, B: Tensor, name_A: str, name_B: str) -> Sides:
    """Split (A ⊗ B) x into two products, in the cheaper order."""
    b_first, a_first = kron_macs(A.shape[1], A.shape[0], B.shape[1], B.shape[0])
    right, left = (Right, name_B), (Left, name_A)
    return (right, left) if b_first <= a_first else (left, right)
