"""Compute with A ⊗ B: apply it, expand it, truncate it, count it. Needs only torch.

Everywhere A is (a2, a1) and B is (b2, b1), torch's (out, in) layout: a1 and b1 split the input width a1*b1, a2 and b2
the output width a2*b2. Row α*b2+β, column p*b1+q of A ⊗ B is A[α, p] * B[β, q], as in `torch.kron`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kron_linear(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Compute `x @ torch.kron(A, B).T`, (..., a2*b2) for x (..., a1*b1), without building the dense matrix.

    The products run in the type of x, under autocast in autocast's; the result has that type. The backward pass keeps
    x and the two factors and nothing else: the small intermediate is cheaper to make again than to store.

    Raises ValueError where the last dimension of x is not a1*b1.
    """
    a1, b1 = A.shape[1], B.shape[1]
    if x.shape[-1] != a1 * b1:
        raise ValueError(
            f"x has width {x.shape[-1]}, but A {tuple(A.shape)} and B {tuple(B.shape)} take {a1} * {b1} = {a1 * b1}"
        )
    dtype = _compute_dtype(x)
    return _KronLinear.apply(x if x.dtype == dtype else x.to(dtype), A, B)  # type: ignore[return-value]


def kron_delta(A: Tensor, B: Tensor) -> Tensor:
    """Return the dense A ⊗ B (a2*b2, a1*b1) in the factors' type."""
    # torch.kron refuses some strided inputs, (n, 1) columns among them, where .contiguous() changes nothing
    contiguous = torch.contiguous_format
    return torch.kron(A.clone(memory_format=contiguous), B.clone(memory_format=contiguous))


def kron_macs(a1: int, a2: int, b1: int, b2: int) -> tuple[int, int]:
    """Count multiplications per token with B contracted first, and with A first."""
    return a1 * b1 * b2 + a1 * a2 * b2, a1 * a2 * b1 + a2 * b1 * b2


def lora_truncate(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the best approximation of A ⊗ B of rank `rank`: up (a2*b2, rank), down (rank, a1*b1), and its Frobenius
    error.

    The singular values of A ⊗ B are the products σ_i(A)σ_j(B) with vectors U_A[:, i] ⊗ U_B[:, j], so the largest ones
    give the dense Eckart-Young optimum from two small decompositions. Raises ValueError for a rank below 1 or above
    the exact one.
    """
    exact = min(A.shape) * min(B.shape)
    if not 1 <= rank <= exact:
        raise ValueError(
            f"rank {rank} is not between 1 and {exact}, the exact rank of A {tuple(A.shape)} and B {tuple(B.shape)}"
        )
    U_A, S_A, V_A = torch.linalg.svd(A.double(), full_matrices=False)
    U_B, S_B, V_B = torch.linalg.svd(B.double(), full_matrices=False)
    sigma, order = torch.outer(S_A, S_B).flatten().sort(descending=True, stable=True)
    i, j = order[:rank] // len(S_B), order[:rank] % len(S_B)
    root = sigma[:rank].sqrt()
    up = torch.einsum("ar,br->abr", U_A[:, i], U_B[:, j]).reshape(-1, rank) * root
    down = torch.einsum("rp,rq->rpq", V_A[i], V_B[j]).reshape(rank, -1) * root[:, None]
    return up.to(A.dtype), down.to(A.dtype), float(sigma[rank:].square().sum().sqrt())


class _KronLinear(torch.autograd.Function):
    """y = A X Bᵀ for each token X (a1, b1), in the cheaper order; x (..., a1*b1) -> (..., a2*b2) in the type of x.

    Written by hand because autograd would keep the intermediate too and sum n copies of A's gradient. The backward is
    made of differentiable operations on the inputs alone, so second derivatives are right as well. A model has hundreds
    of these, and where a GPU waits for its next kernel each microsecond here counts: hence the casts and reshapes in
    here, where autograd makes no nodes of them, and no `setup_context`, for which torch inspects a signature each time.
    """

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(x, A, B)
        tokens = x.reshape(-1, A.shape[1], B.shape[1])
        first, second = A.to(x.dtype), B.to(x.dtype)
        y = _left(first, _right(tokens, second)) if _b_first(A, B) else _right(_left(first, tokens), second)
        return y.reshape(*x.shape[:-1], A.shape[0] * B.shape[0])

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, A, B = ctx.saved_tensors
        needs_x, needs_A, needs_B = ctx.needs_input_grad
        tokens, dtype = x.reshape(-1, A.shape[1], B.shape[1]), (A.dtype, B.dtype)
        grad = grad.reshape(-1, A.shape[0], B.shape[0])
        A, B = A.to(x.dtype), B.to(x.dtype)
        grad_x = grad_A = grad_B = None
        if _b_first(A, B):
            grad_z = _left(A.mT, grad) if needs_x or needs_B else None  # (n, a1, b2)
            if needs_A:
                grad_A = _gram_left(grad, _right(tokens, B))
            if grad_z is not None:
                grad_x = _right(grad_z, B.mT) if needs_x else None
                grad_B = _gram_right(grad_z, tokens) if needs_B else None
        else:
            grad_z = _right(grad, B.mT) if needs_x or needs_A else None  # (n, a2, b1)
            if needs_B:
                grad_B = _gram_right(grad, _left(A, tokens))
            if grad_z is not None:
                grad_x = _left(A.mT, grad_z) if needs_x else None
                grad_A = _gram_left(grad_z, tokens) if needs_A else None
        return (
            None if grad_x is None else grad_x.reshape(x.shape),
            None if grad_A is None else grad_A.to(dtype[0]),
            None if grad_B is None else grad_B.to(dtype[1]),
        )


def _b_first(A: Tensor, B: Tensor) -> bool:
    b_first, a_first = kron_macs(A.shape[1], A.shape[0], B.shape[1], B.shape[0])
    return b_first <= a_first


def _left(M: Tensor, x: Tensor) -> Tensor:
    """Multiply M (r, s) with each x (n, s, t) -> (n, r, t). A batched product: torch.matmul may copy x to fold the
    batch."""
    return torch.bmm(M.expand(x.shape[0], -1, -1), x)


def _right(x: Tensor, M: Tensor) -> Tensor:
    """Multiply each x (n, s, t) with Mᵀ, M (r, t) -> (n, s, r), as one flat product."""
    return torch.mm(x.reshape(-1, x.shape[2]), M.mT).reshape(x.shape[0], x.shape[1], M.shape[0])


def _gram_left(y: Tensor, x: Tensor) -> Tensor:
    """Return Σ_n y_n x_nᵀ, y (n, r, t), x (n, s, t) -> (r, s)."""
    return torch.mm(y.transpose(0, 1).reshape(y.shape[1], -1), x.transpose(0, 1).reshape(x.shape[1], -1).mT)


def _gram_right(y: Tensor, x: Tensor) -> Tensor:
    """Return Σ_n y_nᵀ x_n, y (n, s, r), x (n, s, t) -> (r, t)."""
    return torch.mm(y.reshape(-1, y.shape[2]).mT, x.reshape(-1, x.shape[2]))


def computes_in_own_type(x: Tensor) -> bool:
    """Return False if autocast would compute the products in another type."""
    return _compute_dtype(x) == x.dtype


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    if x.dtype != torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind):  # meta knows no autocast
        return torch.get_autocast_dtype(kind)
    return x.dtype


# ---- the two products, for adapters that are computed together ------------------------------------------------------
#
# A factor M (o, i) maps a part of each token: `Right` its last side, `Left` its first. KronA with B first is Right by
# B, then Left by A; with A first the other way round; LoRA is Right twice. Each is one kernel that adds to what is
# there. Tensors come as (n tokens, anything), contiguous and of one type; sums are made by BLAS in fp32 and rounded
# once. `across` takes all tokens' first parts, then all their second parts, ...: so either product of s members with s
# inputs is one kernel, and sums over tokens too.


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

    @staticmethod
    def across(Ms: Tensor, parts: Tensor) -> Tensor:
        """Ms (s, o, i), each on its own (p, n, i) of parts (s, p, n, i) -> (s, p, n, o), in one product."""
        return torch.bmm(parts.view(len(Ms), -1, Ms.shape[2]), Ms.mT).view(*parts.shape[:3], Ms.shape[1])

    @staticmethod
    def across_grams(out: Tensor, grads: Tensor, parts: Tensor, scale: float) -> None:
        """out (s, o, i) = scale * the gradients of Ms in `across`, for grads (s, p, n, o), in one product."""
        members, o, i = out.shape
        left, right = grads.view(members, -1, o).mT, parts.view(members, -1, i)
        torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)


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

    @staticmethod
    def across(Ms: Tensor, parts: Tensor) -> Tensor:
        """As Right.across, for parts (s, i, n, q) -> (s, o, n, q)."""
        members, o, i = Ms.shape
        return torch.bmm(Ms, parts.view(members, i, -1)).view(members, o, *parts.shape[2:])

    @staticmethod
    def across_grams(out: Tensor, grads: Tensor, parts: Tensor, scale: float) -> None:
        """As Right.across_grams, for grads (s, o, n, q)."""
        members, o, i = out.shape
        left, right = grads.view(members, o, -1), parts.view(members, i, -1).mT
        torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)


Side = type[Right] | type[Left]
Sides = tuple[tuple[Side, str], tuple[Side, str]]
"""The two products that an adapter is, the inner one first, with the names of their factors."""


def kron_sides(A: Tensor, B: Tensor, name_A: str, name_B: str) -> Sides:
    """Split (A ⊗ B) x into two products, in the cheaper order."""
    right, left = (Right, name_B), (Left, name_A)
    return (right, left) if _b_first(A, B) else (left, right)
