"""What the contract test needs of each family: a tiny pipeline, and diffusers' own way to do what the family does.

A new family is one entry in TINY. Every function here is written from diffusers' pipeline, not from our family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.tiny import make_pipeline
from tests.tiny.zimage import make_zimage

HEIGHT, WIDTH = 64, 96
"""Pixels: not square, so that nobody can take one side for the other."""


@dataclass(frozen=True)
class Tiny:
    """One family in miniature. `pipe` is diffusers' pipeline with all its parts."""

    make: Callable[[Path], Path]
    """Writes a pipeline with random weights as a diffusers folder."""
    encoded: Callable[[Any, str], dict[str, Tensor]]
    """A prompt by the pipeline's own encode_prompt -> what the family calls its tensors, without a batch axis."""
    step: Callable[[Any, Tensor, Tensor, dict[str, Tensor]], Tensor]
    """(pipe, x_t of one picture (1, C, h, w), its time (1,), its tensors) -> the prediction, called by hand."""
    call: Callable[..., Tensor]
    """(pipe, noise, prompt, negative, steps, guidance) -> latents (B, C, h, w) by the pipeline's own call."""


def sd_encoded(pipe: Any, prompt: str) -> dict[str, Tensor]:
    return {"prompt_embeds": pipe.encode_prompt(prompt, "cpu", 1, False)[0][0]}


def sdxl_encoded(pipe: Any, prompt: str) -> dict[str, Tensor]:
    found = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    return {"prompt_embeds": found[0][0], "pooled": found[2][0]}


def sd_step(pipe: Any, x_t: Tensor, t: Tensor, row: dict[str, Tensor]) -> Tensor:
    return pipe.unet(x_t, t, row["prompt_embeds"][None]).sample


def sdxl_step(pipe: Any, x_t: Tensor, t: Tensor, row: dict[str, Tensor]) -> Tensor:
    added = {"text_embeds": row["pooled"][None], "time_ids": torch.tensor([[100.0, 80, 4, 2, HEIGHT, WIDTH]])}
    return pipe.unet(x_t, t, row["prompt_embeds"][None], added_cond_kwargs=added).sample


def unet_call(pipe: Any, noise: Tensor, prompt: str, negative: str, steps: int, guidance: float) -> Tensor:
    return pipe(
        prompt,
        negative_prompt=negative or None,
        height=HEIGHT,
        width=WIDTH,
        latents=noise,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
    ).images


def zimage_encoded(pipe: Any, prompt: str) -> dict[str, Tensor]:
    return {"prompt_embeds": pipe.encode_prompt(prompt, "cpu", False)[0][0]}


def zimage_step(pipe: Any, x_t: Tensor, t: Tensor, row: dict[str, Tensor]) -> Tensor:
    return -pipe.transformer([x_t[0][:, None]], 1 - t, [row["prompt_embeds"]]).sample[0][None, :, 0]


def zimage_call(pipe: Any, noise: Tensor, prompt: str, negative: str, steps: int, guidance: float) -> Tensor:
    return unet_call(pipe, noise, prompt, negative, steps, guidance - 1)


TINY = {
    "sd": Tiny(partial(make_pipeline, "sd15"), sd_encoded, sd_step, unet_call),
    "sdxl": Tiny(partial(make_pipeline, "sdxl"), sdxl_encoded, sdxl_step, unet_call),
    "zimage": Tiny(make_zimage, zimage_encoded, zimage_step, zimage_call),
}
"""A row for each of models.FAMILIES."""
