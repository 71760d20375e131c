"""Choose how the Triton kernels are cut: block sizes and grids from the factors' shapes only. Needs neither torch nor
triton.

Nothing is tuned by the clock: the next run could choose another order of summation, and two runs on one card would no
longer agree bit for bit. The numbers come from what compiles without spilling registers on sm_80 to sm_120
(`scripts/bench/triton_compile.py`) and from counting bytes; none was timed on a GPU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

LEAST_DOT = 16  # the shortest side of a product of 16-bit tiles in Triton
MANY_TOKENS = 4096
FACTOR_PROGRAMS = (64, 1024)  # at least, so that a GPU is not left idle, and at most
SUM_ROWS, SUM_COLUMNS = 32, 64
# a1, b2 and a2 of what the kernels take, in the orientation B first: they bound the registers of a program
LARGEST_SHARED, LARGEST_SMALL, LARGEST_LONG = 32, 64, 128
# a block of b1 has the gradient read once more, a block of a2 x: beyond this PyTorch's products read less
MOST_READS = 10


class Sizes(NamedTuple):
    """The sides of both factors, A (a2, a1) and B (b2, b1)."""

    a1: int
    a2: int
    b1: int
    b2: int

    @property
    def transposed(self) -> Sizes:
        return Sizes(self.a2, self.a1, self.b2, self.b1)

    @property
    def b_first(self) -> bool:
        """Return whether contracting B first takes no more multiplications, as in `kron.kron_macs`."""
        a1, a2, b1, b2 = self
        return a1 * b1 * b2 + a1 * a2 * b2 <= a1 * a2 * b1 + a2 * b1 * b2

    @property
    def oriented(self) -> Sizes:
        """Return these sizes, or those of the transposed problem, so that B comes first."""
        return self if self.b_first else self.transposed


class Launch(NamedTuple):
    """A kernel by name, its compile-time constants, its grid, and what Triton takes beside them."""

    kernel: str
    constants: dict[str, int]
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int


def supported(sizes: Sizes) -> bool:
    """Return whether the kernels take these factors: oriented, a1 up to 32, b2 up to 64, a2 up to 128, any b1."""
    a1, a2, _, b2 = sizes.oriented
    return a1 <= LARGEST_SHARED and b2 <= LARGEST_SMALL and a2 <= LARGEST_LONG


def worthwhile(sizes: Sizes) -> bool:
    """Return whether the kernels should be faster than PyTorch's products: an estimate by bytes, not measured."""
    if not supported(sizes):
        return False
    in_b1, in_a2, _ = factor_gradients(sizes.oriented, 1).grid
    return in_b1 + in_a2 <= MOST_READS


@functools.lru_cache(maxsize=4096)
def product(sizes: Sizes, n: int, has_base: bool = True) -> Launch:
    """Plan base + scale * (A ⊗ B) x for n tokens."""
    a1, a2, b1, b2 = sizes
    shared, small = (a1, b2) if sizes.b_first else (a2, b1)
    P, T = power(shared), _block(small, LARGEST_SMALL)
    # each program reads both factors, so where there are many tokens it takes twice as many of them
    rows, num_warps, num_stages = (512, 8, 2) if n >= MANY_TOKENS else (256, 4, 3)
    tokens = max(LEAST_DOT // P, rows // T)
    constants = _named(sizes) | {"TOKENS": tokens, "P": P, "T": T, "COPIES": max(LEAST_DOT // P, 1)}
    if sizes.b_first:
        constants |= {"INNER": _block(b1, 64), "OUTER": LEAST_DOT}
    else:
        constants |= {"INNER": _block(a1, 32), "OUTER": _block(b2, min(64, 2048 * num_warps // (tokens * P)))}
    kernel = "b_first" if sizes.b_first else "a_first"
    return Launch(kernel, constants | {"HAS_BASE": has_base}, (ceil(n, tokens),), num_warps, num_stages)


@functools.lru_cache(maxsize=4096)
def factor_gradients(sizes: Sizes, n: int) -> Launch:
    """Plan the gradients of both factors for oriented sizes; the grid is blocks of b1, blocks of a2, chunks of tokens.

    More chunks keep a card busier, but each writes its sums: they may come to 1.5 times the bytes of a 16-bit x.
    """
    a1, a2, b1, b2 = sizes
    P, T, outer = power(a1), _block(b2, LARGEST_SMALL), _block(a2, 64)
    inner = _block(b1, 128 if P * T < 256 else 64)
    tokens = max(LEAST_DOT // P, 4096 // (T * outer))
    in_b1, in_a2, all_steps = ceil(b1, inner), ceil(a2, outer), max(1, ceil(n, tokens))
    sums = in_a2 * b1 * b2 + in_b1 * a1 * a2
    least, most = (max(1, programs // (in_b1 * in_a2)) for programs in FACTOR_PROGRAMS)
    chunks = max(least, min(most, 3 * n * a1 * b1 // (8 * sums)))
    steps = power(ceil(all_steps, chunks))  # a power of two: a run over many image sizes compiles few kernels
    constants = _named(sizes) | {"TOKENS": tokens, "P": P, "T": T, "COPIES": max(LEAST_DOT // P, 1)}
    constants |= {"INNER": inner, "OUTER": outer, "STEPS": steps}
    return Launch("factor_gradients", constants, (in_b1, in_a2, ceil(all_steps, steps)), num_warps=4, num_stages=1)


@functools.lru_cache(maxsize=4096)
def total(sizes: Sizes, rows: int, accumulate: bool = False) -> Launch:
    """Plan the sum of both buffers' rows, at most `rows` in either; blocks of A come before those of B."""
    size_A, size_B = sizes.a1 * sizes.a2, sizes.b1 * sizes.b2
    constants = {"SIZE_A": size_A, "SIZE_B": size_B, "BLOCKS_A": ceil(size_A, SUM_COLUMNS), "ACCUMULATE": accumulate}
    constants |= {"ROUNDS": power(ceil(rows, SUM_ROWS)), "ROWS": SUM_ROWS, "COLUMNS": SUM_COLUMNS}
    grid = (constants["BLOCKS_A"] + ceil(size_B, SUM_COLUMNS),)
    return Launch("reduce", constants, grid, num_warps=4, num_stages=2)


def power(n: int) -> int:
    """Return the least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def ceil(n: int, by: int) -> int:
    return -(-n // by)


def _named(sizes: Sizes) -> dict[str, int]:
    return {name.upper(): size for name, size in sizes._asdict().items()}


def _block(length: int, most: int) -> int:
    return min(most, max(LEAST_DOT, power(length)))
