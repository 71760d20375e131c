"""Run (A ⊗ B) x and its factor gradients as Triton kernels. Importing this module needs triton; `operator` decides.

A (a2, a1) and B (b2, b1) as in `kron`. A token is a small matrix X (a1, b1), its result A X Bᵀ (a2, b2). The product is
made in the cheaper order, and the intermediate never leaves the chip:

- B first: Z = X Bᵀ (a1, b2), then A Z: `_b_first`.
- A first: W = A X (a2, b1), then W Bᵀ: `_a_first`. The gradient with regard to x is the product with Aᵀ and Bᵀ, so what
  runs B first forward runs A first backward, and the other way round.
- `_factor_gradients` is written for B first. A first is the same problem with x and the gradient exchanged and both
  factors transposed.

Products take 16-bit (or fp32) operands and sum in fp32; the intermediate is rounded to the type of x in between, as
`kron_linear` does. No atomics: each program writes its sums to its own row of a buffer and `_reduce` adds the rows in a
fixed order, so that two runs on one card agree bit for bit. Block sizes follow from the shapes alone: tuning by the
clock could choose another order of summation in the next run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# What the kernels take, in the orientation B first: a1, b2 and a2. They bound the registers of a program.
LARGEST_SHARED, LARGEST_SMALL, LARGEST_LONG = 32, 64, 128
LEAST_DOT = 16  # the shortest side that tl.dot takes for 16-bit operands
# numpy knows no bf16, and the interpreter multiplies the bits as if they were whole numbers: there, fp32 operands that
# were rounded to bf16 give what the hardware gives
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
SUM_ROWS, SUM_COLUMNS = 32, 64
FACTOR_PROGRAMS = (64, 1024)
MANY_TOKENS = 4096


class Sizes(NamedTuple):
    """The four factor sizes, A (a2, a1) and B (b2, b1)."""

    a1: int
    a2: int
    b1: int
    b2: int

    @property
    def transposed(self) -> Sizes:
        return Sizes(self.a2, self.a1, self.b2, self.b1)

    @property
    def b_first(self) -> bool:
        """True where contracting B first takes no more multiplications (see `kron.kron_macs`)."""
        a1, a2, b1, b2 = self
        return a1 * b1 * b2 + a1 * a2 * b2 <= a1 * a2 * b1 + a2 * b1 * b2


class Launch(NamedTuple):
    """A kernel with all its constants: what `scripts/bench/triton_compile.py` compiles is what runs."""

    kernel: triton.JITFunction
    constants: dict[str, int]
    num_warps: int
    num_stages: int

    def run(self, grid: tuple[int, ...], *arguments: Tensor | float) -> None:
        self.kernel[grid](*arguments, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages)


def supported(sizes: Sizes) -> bool:
    """Return whether the kernels take these factors: two small sides and one of at most 128, in the cheaper order."""
    a1, a2, _, b2 = sizes if sizes.b_first else sizes.transposed
    return a1 <= LARGEST_SHARED and b2 <= LARGEST_SMALL and a2 <= LARGEST_LONG


def add_product(out: Tensor, base: Tensor | None, x: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    """Write base + scale * (A ⊗ B) x into `out` (n, a2*b2); `base` may be `out` itself, or None for zero.

    x (n, a1*b1), out and base are of one type and have unit stride along their rows; the factors may be of any float
    type and strided anyhow.
    """
    sizes, n = sizes_of(A, B), x.shape[0]
    if n == 0:
        return
    launch = plan_product(sizes, n, base is not None)
    before = out if base is None else base
    strides = (out.stride(0), before.stride(0), x.stride(0), *A.stride(), *B.stride())
    with torch.cuda.device_of(x):
        launch.run((triton.cdiv(n, launch.constants["TOKENS"]),), out, before, x, A, B, scale, n, *strides)


def factor_gradients(
    grad_A: Tensor, grad_B: Tensor, x: Tensor, grad: Tensor, A: Tensor, B: Tensor, scale: float, accumulate: bool
) -> None:
    """Write the gradients of both factors, times `scale`, into contiguous fp32 `grad_A` and `grad_B`, or add them.

    x (n, a1*b1) and grad (n, a2*b2), the gradient of the product, are of one type with unit stride along their rows.
    """
    sizes, n = sizes_of(A, B), x.shape[0]
    to_A, to_B = (sizes.a1, 1), (sizes.b1, 1)  # row and column strides in the buffers
    if not sizes.b_first:
        x, grad, A, B, sizes = grad, x, A.mT, B.mT, sizes.transposed
        to_A, to_B = to_A[::-1], to_B[::-1]
    launch, grid = plan_factor_gradients(sizes, n)
    rows_A, rows_B = grid[0] * grid[2], grid[1] * grid[2]
    sums_A = torch.empty(rows_A, A.numel(), dtype=torch.float32, device=x.device)
    sums_B = torch.empty(rows_B, B.numel(), dtype=torch.float32, device=x.device)
    strides = (x.stride(0), grad.stride(0), *A.stride(), *B.stride(), *to_A, *to_B)
    blocks_A, blocks_B = (triton.cdiv(factor.numel(), SUM_COLUMNS) for factor in (A, B))
    total = plan_sum(sizes, max(rows_A, rows_B), accumulate)
    with torch.cuda.device_of(x):
        launch.run(grid, sums_A, sums_B, x, grad, A, B, n, *strides)
        counts = (rows_A, rows_B, blocks_A)
        total.run((blocks_A + blocks_B,), grad_A, grad_B, sums_A, sums_B, scale, *counts)


def sizes_of(A: Tensor, B: Tensor) -> Sizes:
    return Sizes(A.shape[1], A.shape[0], B.shape[1], B.shape[0])


def plan_product(sizes: Sizes, n: int, has_base: bool = True) -> Launch:
    """Choose the kernel and its blocks for n tokens."""
    a1, a2, b1, b2 = sizes
    shared, small = (a1, b2) if sizes.b_first else (a2, b1)
    P, T = power(shared), _block(small, LARGEST_SMALL)
    # each program reads both factors, so with many tokens to share out it takes twice as many
    rows, num_warps = (512, 8) if n >= MANY_TOKENS else (256, 4)
    constants = _named(sizes) | {"P": P, "T": T, "COPIES": max(LEAST_DOT // P, 1), "HAS_BASE": has_base}
    tokens = constants["TOKENS"] = max(LEAST_DOT // P, rows // T)
    if sizes.b_first:
        constants |= {"INNER": _block(b1, 64), "OUTER": LEAST_DOT}
        return Launch(_b_first, constants, num_warps, num_stages=2)
    constants |= {"INNER": _block(a1, 32), "OUTER": _block(b2, min(64, 2048 * num_warps // (tokens * P)))}
    return Launch(_a_first, constants, num_warps, num_stages=2)


def plan_factor_gradients(sizes: Sizes, n: int) -> tuple[Launch, tuple[int, int, int]]:
    """Choose blocks for the orientation B first, and the grid: blocks of b1, blocks of a2, chunks of tokens.

    More chunks fill a card better, but each writes its sums: they may come to 1.5 times the bytes of a 16-bit x.
    """
    a1, a2, b1, b2 = sizes
    P, T, inner, outer = power(a1), _block(b2, LARGEST_SMALL), _block(b1, 128), _block(a2, 64)
    tokens = max(LEAST_DOT // P, 4096 // (T * outer))
    in_b1, in_a2, all_steps = triton.cdiv(b1, inner), triton.cdiv(a2, outer), max(1, triton.cdiv(n, tokens))
    sums = in_a2 * b1 * b2 + in_b1 * a1 * a2
    least, most = (max(1, programs // (in_b1 * in_a2)) for programs in FACTOR_PROGRAMS)
    chunks = max(least, min(most, 3 * n * a1 * b1 // (8 * sums)))
    steps = power(triton.cdiv(all_steps, chunks))  # a power of two: runs over many image sizes compile few kernels
    constants = _named(sizes) | {"TOKENS": tokens, "P": P, "T": T, "COPIES": max(LEAST_DOT // P, 1)}
    constants |= {"INNER": inner, "OUTER": outer, "STEPS": steps}
    grid = (in_b1, in_a2, triton.cdiv(all_steps, steps))
    return Launch(_factor_gradients, constants, num_warps=4, num_stages=1), grid


def plan_sum(sizes: Sizes, rows: int, accumulate: bool = False) -> Launch:
    """Choose the blocks that add up the rows of both buffers, at most so many."""
    a1, a2, b1, b2 = sizes
    constants = {"SIZE_A": a1 * a2, "SIZE_B": b1 * b2, "ACCUMULATE": accumulate}
    constants |= {"ROUNDS": power(triton.cdiv(rows, SUM_ROWS)), "ROWS": SUM_ROWS, "COLUMNS": SUM_COLUMNS}
    return Launch(_reduce, constants, num_warps=4, num_stages=2)


def _named(sizes: Sizes) -> dict[str, int]:
    return {name.upper(): size for name, size in sizes._asdict().items()}


def _block(length: int, most: int) -> int:
    return min(most, max(LEAST_DOT, power(length)))


def power(n: int) -> int:
    return triton.next_power_of_2(n)


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


@triton.jit(do_not_specialize=["count_A", "count_B", "blocks_A"])
def _reduce(
    grad_A, grad_B, sums_A, sums_B, scale, count_A, count_B, blocks_A,
    SIZE_A: tl.constexpr, SIZE_B: tl.constexpr, ACCUMULATE: tl.constexpr,
    ROUNDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The rows of both buffers added up from the first to the last, ROWS at once; blocks of A's come before B's."""
    block = tl.program_id(0)
    if block < blocks_A:
        _reduce_one(grad_A, sums_A, scale, count_A, block, SIZE_A, ACCUMULATE, ROUNDS, ROWS, COLUMNS)
    else:
        _reduce_one(grad_B, sums_B, scale, count_B, block - blocks_A, SIZE_B, ACCUMULATE, ROUNDS, ROWS, COLUMNS)


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
