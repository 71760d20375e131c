"""Draw the images, noise and timesteps of a step as pure functions of (seed, step, index in the global batch).

This is why a run can be stopped, resumed and spread over processes: nothing depends on a generator that somebody else
has advanced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Shelf:
    """Pictures of one latent shape: how many, how many variants each, and the shape (C, h, w)."""

    pictures: int
    variants: int
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Draw:
    """The random part of some samples of one step; every tensor lies on the CPU and has the samples in front."""

    shelf: int
    picture: torch.Tensor
    variant: torch.Tensor
    t: torch.Tensor
    eps: torch.Tensor
    dropout: torch.Tensor
    """Uniform in [0, 1): below the dropout rate, the sample loses its caption."""
    turn: torch.Tensor | None = None
    """How often the picture was seen before: which of its captions is taken. None: the first."""


def generator_of(*key: object) -> torch.Generator:
    """Return a CPU generator that depends only on `key`."""
    digest = hashlib.blake2b("|".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@lru_cache(maxsize=64)
def _permutation(count: int, *key: object) -> tuple[int, ...]:
    return tuple(torch.randperm(count, generator=generator_of("permutation", *key)).tolist())


@lru_cache(maxsize=4)
def _shelves_of_a_pass(sizes: tuple[int, ...], *key: object) -> tuple[tuple[int, int], ...]:
    """Return (shelf, how often it came before) for each step of a pass; a shelf of n images comes n times."""
    shelves = [shelf for shelf, size in enumerate(sizes) for _ in range(size)]
    shuffled = [shelves[i] for i in _permutation(len(shelves), "shelves", *key)]
    seen = [0] * len(sizes)
    order = []
    for shelf in shuffled:
        order.append((shelf, seen[shelf]))
        seen[shelf] += 1
    return tuple(order)


def draw(
    seed: int,
    step: int,
    indices: Sequence[int],
    global_batch: int,
    shelves: Sequence[Shelf],
    *,
    draw_t: Callable[[torch.Generator], torch.Tensor],
    noise_offset: float = 0.0,
    stream: str = "instance",
) -> Draw:
    """Return images, variants, times and noise of the samples `indices` of the global batch at `step`.

    `draw_t` is the process's: one time from one generator.

    One shelf serves the whole global batch, so that it can be stacked. Each shelf is walked in seeded permutations of
    its pictures without gaps, and comes up in proportion to its size: every picture is seen equally often.
    """
    sizes = tuple(shelf.pictures for shelf in shelves)
    around, position = divmod(step, sum(sizes))
    number, visits = _shelves_of_a_pass(sizes, seed, stream, around)[position]
    shelf = shelves[number]
    first = (around * shelf.pictures + visits) * global_batch
    pictures, variants, times, noises, dropouts, turns = [], [], [], [], [], []
    for index in indices:
        turn, place = divmod(first + index, shelf.pictures)
        pictures.append(_permutation(shelf.pictures, seed, stream, number, turn)[place])
        turns.append(turn)
        generator = generator_of(seed, stream, step, index)
        variants.append(torch.randint(shelf.variants, (), generator=generator))
        times.append(draw_t(generator))
        dropouts.append(torch.rand((), generator=generator))
        offset = torch.randn(shelf.shape[0], 1, 1, generator=generator)
        noises.append(torch.randn(shelf.shape, generator=generator) + noise_offset * offset)
    return Draw(
        number,
        torch.tensor(pictures),
        torch.stack(variants),
        torch.stack(times),
        torch.stack(noises),
        torch.stack(dropouts),
        torch.tensor(turns),
    )
