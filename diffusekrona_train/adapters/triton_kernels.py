"""Run (A ⊗ B) x and its factor gradients as Triton kernels. Importing this module needs triton; `operator` decides.

A (a2, a1) and B (b2, b1) as in `kron`. A token is a small matrix X (a1, b1), its result A X Bᵀ (a2, b2). The product is
made in the cheaper order, and the intermediate never leaves the chip:

- B first: Z = X Bᵀ (a1, b2), then A Z: `_b_first`.
- A first: W = A X (a2, b1), then W Bᵀ: `_a_first`. The gradient with regard to x is the product with Aᵀ and Bᵀ, so what
  runs B first forward runs A first backward, and the other way round.
- `_factor_gradients` is written for B first. A first is the same problem with x and the gradient exchanged and both
  factors transposed.

Products take 16-bit (or fp32) operands and sum in fp32; the intermediate is rounded to the type of x in between, as
`kron_linear` does. No atomics: each program writes its sums to its own row of a buffer, and `_reduce` adds the rows in
a fixed order, so that two runs on one card agree bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusekrona_train.adapters import blocks
from diffusekrona_train.adapters.blocks import Launch, Sizes

# numpy knows no bf16, and the interpreter multiplies the bits as if they were integers: there, fp32 operands that
# were rounded to bf16 give what the hardware gives
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def add_product(out: Tensor, base: Tensor | None, x: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    """Write base + scale * (A ⊗ B) x into `out` (n, a2*b2); `base` may be `out` itself, or None for zero.

    x (n, a1*b1), out and base are of one type and have unit stride along their rows; the factors may be of any float
    type and strided anyhow.
    """
    sizes, n = sizes_of(A, B), x.shape[0]
    if n == 0:
        return
    before = out if base is None else base
    strides = (out.stride(0), before.stride(0), x.stride(0), *A.stride(), *B.stride())
    with torch.cuda.device_of(x):
        _run(blocks.product(sizes, n, base is not None), out, before, x, A, B, scale, n, *strides)


def factor_gradients(
    grad_A: Tensor, grad_B: Tensor, x: Tensor, grad: Tensor, A: Tensor, B: Tensor, scale: float, accumulate: bool
) -> None:
    """Write the gradients of both factors, times `scale`, into contiguous fp32 `grad_A` and `grad_B`, or add them.

    x (n, a1*b1) and grad (n, a2*b2), the gradient of the product, are of one type with unit stride along their rows.
    """
    sizes, n = sizes_of(A, B), x.shape[0]
    to_A, to_B = (sizes.a1, 1), (sizes.b1, 1)  # row and column strides in the buffers
    if not sizes.b_first:
        x, grad, A, B = grad, x, A.mT, B.mT
        to_A, to_B = to_A[::-1], to_B[::-1]
    launch = blocks.factor_gradients(sizes.oriented, n)
    in_b1, in_a2, chunks = launch.grid
    sums_A = torch.empty(in_b1 * chunks, A.numel(), dtype=torch.float32, device=x.device)
    sums_B = torch.empty(in_a2 * chunks, B.numel(), dtype=torch.float32, device=x.device)
    strides = (x.stride(0), grad.stride(0), *A.stride(), *B.stride(), *to_A, *to_B)
    total = blocks.total(sizes, max(len(sums_A), len(sums_B)), accumulate)
    with torch.cuda.device_of(x):
        _run(launch, sums_A, sums_B, x, grad, A, B, n, *strides)
        _run(total, grad_A, grad_B, sums_A, sums_B, scale, len(sums_A), len(sums_B))


def sizes_of(A: Tensor, B: Tensor) -> Sizes:
    return Sizes(A.shape[1], A.shape[0], B.shape[1], B.shape[0])


def _run(launch: Launch, *arguments: Tensor | float) -> None:
    kernel = KERNELS[launch.kernel]
    kernel[launch.grid](*arguments, **launch.constants, num_warps=launch.num_warps, num_stages=launch.num_stages)  # pyright: ignore[reportCallIssue]  Triton takes more than it declares


# In the kernels `P` pads the side that the intermediate shares with the tokens (a1, or a2 with A first), `T` its other
# side, and a row of a tile is (token, t) or (token, p). tl.dot takes no side below 16, so a P of 4 is repeated
# COPIES = 4 times, with zeros in the factor for all copies but the first: that costs no loads.


@triton.jit(do_not_specialize=["n"])
def _b_first(
    out, base, x, A, B, scale, n, out_row, base_row, x_row, a_row, a_col, b_row, b_col,
    A1: tl.constexpr, A2: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    TOKENS: tl.constexpr, P: tl.constexpr, T: tl.constexpr, COPIES: tl.constexpr,
    INNER: tl.constexpr, OUTER: tl.constexpr, HAS_BASE: tl.constexpr,
):  # fmt: skip
    dtype = x.dtype.element_ty
    first = tl.program_id(0) * TOKENS
    row = tl.arange(0, TOKENS * P)
    token, p = first + row // P, row % P
    t = tl.arange(0, T)
    source = x + token.to(tl.int64) * x_row + p * B1
    known = (token < n) & (p < A1)
    z = tl.zeros((TOKENS * P, T), tl.float32)
    for start in range(0, B1, INNER):
        q = start + tl.arange(0, INNER)
        tile = tl.load(source[:, None] + q[None, :], known[:, None] & (q < B1)[None, :], 0.0)
        right = tl.load(B + q[:, None] * b_col + t[None, :] * b_row, (q < B1)[:, None] & (t < B2)[None, :], 0.0)
        z = _dot(tile, right.to(dtype), z)
    z = _repeated(z.to(dtype), TOKENS, P, T, COPIES)  # (TOKENS * T, P * COPIES)

    k = tl.arange(0, P * COPIES)
    row = tl.arange(0, TOKENS * T)
    token, t = first + row // T, row % T
    known = (token < n) & (t < B2)
    target, before = out + token.to(tl.int64) * out_row + t, base + token.to(tl.int64) * base_row + t
    for start in range(0, A2, OUTER):
        r = start + tl.arange(0, OUTER)
        wanted = (k % COPIES == 0) & (k // COPIES < A1)
        left = tl.load(
            A + r[None, :] * a_row + (k // COPIES)[:, None] * a_col, wanted[:, None] & (r < A2)[None, :], 0.0
        )
        y = _dot(z, left.to(dtype), None) * scale
        mask = known[:, None] & (r < A2)[None, :]
        if HAS_BASE:
            y += tl.load(before[:, None] + r[None, :] * B2, mask, 0.0).to(tl.float32)
        tl.store(target[:, None] + r[None, :] * B2, y.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["n"])
def _a_first(
    out, base, x, A, B, scale, n, out_row, base_row, x_row, a_row, a_col, b_row, b_col,
    A1: tl.constexpr, A2: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    TOKENS: tl.constexpr, P: tl.constexpr, T: tl.constexpr, COPIES: tl.constexpr,
    INNER: tl.constexpr, OUTER: tl.constexpr, HAS_BASE: tl.constexpr,
):  # fmt: skip
    dtype = x.dtype.element_ty
    first = tl.program_id(0) * TOKENS
    row = tl.arange(0, TOKENS * T)
    token, t = first + row // T, row % T
    k = tl.arange(0, P * COPIES)
    wanted = (k % COPIES == 0) & (k // COPIES < A2)
    source = x + token.to(tl.int64) * x_row + t
    known = (token < n) & (t < B1)
    w = tl.zeros((TOKENS * T, P * COPIES), tl.float32)
    for start in range(0, A1, INNER):
        s = start + tl.arange(0, INNER)
        tile = tl.load(source[:, None] + s[None, :] * B1, known[:, None] & (s < A1)[None, :], 0.0)
        left = tl.load(
            A + (k // COPIES)[None, :] * a_row + s[:, None] * a_col, (s < A1)[:, None] & wanted[None, :], 0.0
        )
        w = _dot(tile, left.to(dtype), w)
    w = _merged(w, TOKENS, P, T, COPIES).to(dtype)  # (TOKENS * P, T)

    row = tl.arange(0, TOKENS * P)
    token, p = first + row // P, row % P
    known = (token < n) & (p < A2)
    t = tl.arange(0, T)
    target = out + token.to(tl.int64) * out_row + p * B2
    before = base + token.to(tl.int64) * base_row + p * B2
    for start in range(0, B2, OUTER):
        q = start + tl.arange(0, OUTER)
        right = tl.load(B + q[None, :] * b_row + t[:, None] * b_col, (t < B1)[:, None] & (q < B2)[None, :], 0.0)
        y = _dot(w, right.to(dtype), None) * scale
        mask = known[:, None] & (q < B2)[None, :]
        if HAS_BASE:
            y += tl.load(before[:, None] + q[None, :], mask, 0.0).to(tl.float32)
        tl.store(target[:, None] + q[None, :], y.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["n"])
def _factor_gradients(
    sums_A, sums_B, x, grad, A, B, n, x_row, grad_row, a_row, a_col, b_row, b_col,
    to_a_row, to_a_col, to_b_row, to_b_col,
    A1: tl.constexpr, A2: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    TOKENS: tl.constexpr, P: tl.constexpr, T: tl.constexpr, COPIES: tl.constexpr,
    INNER: tl.constexpr, OUTER: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One chunk of tokens, one block of a2 and one of b1.

    Z is a sum over the blocks of b1, its gradient one over those of a2, and both factors' gradients are linear in them:
    so each program takes its own part of either, and the sum over programs is right.
    """
    dtype = x.dtype.element_ty
    in_b1, in_a2, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k, t = tl.arange(0, P * COPIES), tl.arange(0, T)
    q, r = in_b1 * INNER + tl.arange(0, INNER), in_a2 * OUTER + tl.arange(0, OUTER)
    in_left = (r < A2)[:, None] & ((k % COPIES == 0) & (k // COPIES < A1))[None, :]
    in_right = (t < B2)[:, None] & (q < B1)[None, :]
    left = tl.load(A + r[:, None] * a_row + (k // COPIES)[None, :] * a_col, in_left, 0.0).to(dtype)
    right = tl.load(B + t[:, None] * b_row + q[None, :] * b_col, in_right, 0.0).to(dtype)
    sum_A = tl.zeros((OUTER, P * COPIES), tl.float32)
    sum_B = tl.zeros((T, INNER), tl.float32)
    flat_p, flat_t = tl.arange(0, TOKENS * P), tl.arange(0, TOKENS * T)
    for step in range(0, STEPS):
        first = (chunk * STEPS + step) * TOKENS
        token, p = first + flat_p // P, flat_p % P
        rows = x + token.to(tl.int64) * x_row + p * B1
        tile = tl.load(rows[:, None] + q[None, :], ((token < n) & (p < A1))[:, None] & (q < B1)[None, :], 0.0)
        token, column = first + flat_t // T, flat_t % T
        rows = grad + token.to(tl.int64) * grad_row + column
        known = (token < n) & (column < B2)
        above = tl.load(rows[:, None] + r[None, :] * B2, known[:, None] & (r < A2)[None, :], 0.0)

        grad_z = _merged(_dot(above, left, None), TOKENS, P, T, COPIES).to(dtype)  # (TOKENS * P, T)
        sum_B = _dot(tl.trans(grad_z), tile, sum_B)
        z = _repeated(_dot(tile, tl.trans(right), None).to(dtype), TOKENS, P, T, COPIES)  # (TOKENS * T, P * COPIES)
        sum_A = _dot(tl.trans(above), z, sum_A)
    sums_A += (chunk * tl.num_programs(0) + in_b1).to(tl.int64) * (A1 * A2)
    sums_B += (chunk * tl.num_programs(1) + in_a2).to(tl.int64) * (B1 * B2)
    tl.store(sums_A + r[:, None] * to_a_row + (k // COPIES)[None, :] * to_a_col, sum_A, in_left)
    tl.store(sums_B + t[:, None] * to_b_row + q[None, :] * to_b_col, sum_B, in_right)


@triton.jit(do_not_specialize=["count_A", "count_B"])
def _reduce(
    grad_A, grad_B, sums_A, sums_B, scale, count_A, count_B,
    SIZE_A: tl.constexpr, SIZE_B: tl.constexpr, BLOCKS_A: tl.constexpr, ACCUMULATE: tl.constexpr,
    ROUNDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The rows of both buffers added up from the first to the last, ROWS at once; blocks of A's come before B's."""
    block = tl.program_id(0)
    if block < BLOCKS_A:
        _reduce_one(grad_A, sums_A, scale, count_A, block, SIZE_A, ACCUMULATE, ROUNDS, ROWS, COLUMNS)
    else:
        _reduce_one(grad_B, sums_B, scale, count_B, block - BLOCKS_A, SIZE_B, ACCUMULATE, ROUNDS, ROWS, COLUMNS)


@triton.jit
def _reduce_one(
    grad, sums, scale, count, block,
    SIZE: tl.constexpr, ACCUMULATE: tl.constexpr, ROUNDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for step in range(0, ROUNDS):
        row = step * ROWS + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & (column < SIZE)[None, :]
        total += tl.sum(tl.load(sums + row.to(tl.int64)[:, None] * SIZE + column[None, :], mask, 0.0), axis=0)
    total *= scale
    if ACCUMULATE:
        total += tl.load(grad + column, column < SIZE, 0.0)
    tl.store(grad + column, total, column < SIZE)


@triton.jit
def _dot(a, b, total):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _repeated(z, TOKENS: tl.constexpr, P: tl.constexpr, T: tl.constexpr, COPIES: tl.constexpr):
    """(TOKENS * P, T) -> (TOKENS * T, P * COPIES), each p COPIES times."""
    z = tl.permute(tl.reshape(z, (TOKENS, P, T)), (0, 2, 1))
    z = tl.broadcast_to(tl.reshape(z, (TOKENS, T, P, 1)), (TOKENS, T, P, COPIES))
    return tl.reshape(z, (TOKENS * T, P * COPIES))


@triton.jit
def _merged(w, TOKENS: tl.constexpr, P: tl.constexpr, T: tl.constexpr, COPIES: tl.constexpr):
    """(TOKENS * T, P * COPIES) -> (TOKENS * P, T), the copies added: all but one are zero."""
    w = tl.sum(tl.reshape(w, (TOKENS, T, P, COPIES)), axis=3)
    return tl.reshape(tl.permute(w, (0, 2, 1)), (TOKENS * P, T))


KERNELS = {"b_first": _b_first, "a_first": _a_first, "factor_gradients": _factor_gradients, "reduce": _reduce}
