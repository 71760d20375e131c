"""Samplers by the short names that users of other tools know; each is built on the model's own noise schedule."""

from __future__ import annotations

import difflib
from typing import Any

from diffusekrona_train.models.contracts import Loaded

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Name -> diffusers class and what differs from the model's scheduler config."""


def check_scheduler(name: str) -> str:
    """`name` if it is known; a ValueError with the closest one otherwise."""
    if name not in SCHEDULERS:
        close = difflib.get_close_matches(name.lower(), SCHEDULERS, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"scheduler {name!r} is unknown: {hint}there are {', '.join(SCHEDULERS)}")
    return name


def build_scheduler(name: str, model_scheduler: Loaded) -> Any:
    """Scheduler `name` with the model's betas, prediction type and timestep spacing."""
    import diffusers

    cls, options = SCHEDULERS[check_scheduler(name)]
    return getattr(diffusers, cls).from_config(dict(model_scheduler.config), **options)
