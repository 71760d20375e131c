"""The diffusion process and what a step draws from it: pure functions, one value a sample, torch alone.

`draw` is why a run can be stopped, resumed and spread over processes: everything random about a sample is a function of
(seed, step, index in the global batch), never of a generator that somebody else has advanced.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


# ---- the forward process -------------------------------------------------------------------------------------------


def noise_schedule(scheduler: object) -> torch.Tensor:
    """alphas_cumprod (T,), fp32, from a scheduler's config (a mapping, or an object with `.config`)."""
    config: Mapping = getattr(scheduler, "config", scheduler)  # type: ignore[assignment]
    betas = _betas(config)
    if config.get("rescale_betas_zero_snr"):
        betas = _rescale_zero_terminal_snr(betas)
    return torch.cumprod(1.0 - betas, dim=0).float()


def _betas(config: Mapping) -> torch.Tensor:
    steps = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 2e-2))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    if kind == "squaredcos_cap_v2":
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    raise ValueError(f"scheduler beta_schedule {kind!r} is not known; linear, scaled_linear or squaredcos_cap_v2")


def _rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Betas whose last step holds no signal (Lin et al. 2023, algorithm 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    bar = ((root - last) * first / (first - last)) ** 2
    return 1.0 - torch.cat([bar[:1], bar[1:] / bar[:-1]])


def _per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def add_noise(x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps; x_0 and eps (B, ...), t (B,)."""
    a = _per_sample(alphas_cumprod[t], x_0)
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


def target(
    x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, alphas_cumprod: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """What the denoiser should predict at x_t: the noise, v = sqrt(a_t) eps - sqrt(1 - a_t) x_0, or the sample."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "v_prediction":
        a = _per_sample(alphas_cumprod[t], x_0)
        return a.sqrt() * eps - (1 - a).sqrt() * x_0
    if prediction_type == "sample":
        return x_0
    raise ValueError(f"prediction_type {prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")


# ---- losses and weightings -----------------------------------------------------------------------------------------

HUBER_C = 0.1
"""Where the pseudo-Huber loss turns from square to linear."""


def mse(prediction: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample, (B,)."""
    return (prediction - wanted).square().flatten(1).mean(1)


def huber(prediction: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Pseudo-Huber loss of each sample, (B,): 2c (sqrt(d^2 + c^2) - c), near d^2 for small d."""
    distance = (prediction - wanted).square()
    return (2 * HUBER_C * ((distance + HUBER_C**2).sqrt() - HUBER_C)).flatten(1).mean(1)


LOSSES = {"mse": mse, "huber": huber}


def _min_snr(snr: torch.Tensor, gamma: float) -> torch.Tensor:
    """Hang et al. 2023: min(SNR, gamma) on the error of the sample."""
    return snr.clamp(max=gamma)


def _debiased(snr: torch.Tensor, gamma: float) -> torch.Tensor:
    """Yu et al. 2023: 1 / sqrt(SNR) on the error of the noise, so sqrt(SNR) on the error of the sample."""
    return snr.sqrt()


WEIGHTINGS = {"none": None, "min_snr": _min_snr, "debiased": _debiased}
"""Weight on the error of the predicted *sample*; `weights` carries it over to what is predicted."""


def weights(
    name: str, t: torch.Tensor, alphas_cumprod: torch.Tensor, prediction_type: str, gamma: float = 5.0
) -> torch.Tensor:
    """Weight of each sample's loss, (B,). Errors of noise, v and sample relate as SNR : SNR + 1 : 1 (Salimans & Ho)."""
    weighting = WEIGHTINGS[name]
    if weighting is None:
        return torch.ones_like(alphas_cumprod[t])
    a = alphas_cumprod[t].double()
    # A schedule with zero terminal SNR would give 0 / 0 for the noise.
    snr = (a / (1 - a)).clamp(1e-8, 1e8)
    per_error = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
    return (weighting(snr, gamma) / per_error).float()


# ---- learning rate -------------------------------------------------------------------------------------------------


def learning_rate_factor(schedule: str, step: int, steps: int, warmup_steps: int) -> float:
    """Share of the learning rate at optimiser step `step` of `steps`; knows nothing of processes or accumulation."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    if schedule == "constant":
        return 1.0
    return 1.0 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


# ---- what a step draws ---------------------------------------------------------------------------------------------


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


def generator_of(*key: object) -> torch.Generator:
    """A CPU generator that depends on `key` alone."""
    digest = hashlib.blake2b("|".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@lru_cache(maxsize=64)
def _permutation(count: int, *key: object) -> tuple[int, ...]:
    return tuple(torch.randperm(count, generator=generator_of("permutation", *key)).tolist())


@lru_cache(maxsize=4)
def _shelves_of_a_pass(sizes: tuple[int, ...], *key: object) -> tuple[tuple[int, int], ...]:
    """(shelf, how often it came before in this pass) for each step of a pass; a shelf of n pictures comes n times."""
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
    timesteps: int,
    noise_offset: float = 0.0,
    stream: str = "instance",
) -> Draw:
    """Pictures, variants, timesteps and noise of the samples `indices` of the global batch at `step`.

    One shelf serves the whole global batch, so that it can be stacked. Each shelf is walked in seeded permutations of
    its pictures without gaps, and comes up in proportion to its size: every picture is seen equally often.
    """
    sizes = tuple(shelf.pictures for shelf in shelves)
    around, position = divmod(step, sum(sizes))
    number, visits = _shelves_of_a_pass(sizes, seed, stream, around)[position]
    shelf = shelves[number]
    first = (around * shelf.pictures + visits) * global_batch
    pictures, variants, times, noises, dropouts = [], [], [], [], []
    for index in indices:
        turn, place = divmod(first + index, shelf.pictures)
        pictures.append(_permutation(shelf.pictures, seed, stream, number, turn)[place])
        generator = generator_of(seed, stream, step, index)
        variants.append(torch.randint(shelf.variants, (), generator=generator))
        times.append(torch.randint(timesteps, (), generator=generator))
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
    )
