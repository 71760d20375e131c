"""Change the adapters' strength with the noise level while a denoiser samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from diffusekrona_train.config.strengths import parse_strengths, strength_at
from diffusekrona_train.models.contracts import Loaded


def levels_of(scheduler: Loaded) -> int:
    """Return how many noise levels a model's scheduler counts down; ValueError where its timesteps are no levels."""
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError("strength_schedule: works for models with discrete noise levels (SD, SDXL); leave it out")
    return int(scheduler.config.num_train_timesteps)


@contextmanager
def scheduled(denoiser: nn.Module, schedule: str, scheduler: Loaded, apply: Callable[[float], None]) -> Iterator[None]:
    """Within, call `apply` with the schedule's strength before the denoiser works at a noise level that changes it.

    denoiser(sample, timestep, …) is called with the scheduler's timesteps, from its last level (noise) down to 0, so
    that a sampler with several evaluations a step is served too. The strength is 1 when the block begins and again at
    its end. ValueError for a schedule where the scheduler's timesteps are not noise levels.
    """
    parts = parse_strengths(schedule)
    if not parts:
        yield
        return
    now, levels = 1.0, levels_of(scheduler)

    def set_to(strength: float) -> None:
        nonlocal now
        if strength != now:
            apply(strength)
            now = strength

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        t = float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)
        set_to(strength_at(parts, 1 - t / (levels - 1)))

    handle = denoiser.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        set_to(1.0)
