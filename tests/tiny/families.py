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
from tests.tiny.flux2 import make_flux2, make_klein
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


def flux2_encoded(pipe: Any, prompt: str) -> dict[str, Tensor]:
    return {"prompt_embeds": pipe.encode_prompt(prompt, "cpu")[0][0]}


def flux2_step(pipe: Any, x_t: Tensor, t: Tensor, row: dict[str, Tensor], guidance: Tensor | None = None) -> Tensor:
    embeds = row["prompt_embeds"][None]
    tokens = pipe.transformer(
        pipe._pack_latents(x_t),
        embeds,
        t,
        img_ids=pipe._prepare_latent_ids(x_t),
        txt_ids=pipe._prepare_text_ids(embeds),
        guidance=guidance,
    ).sample
    return pipe._unpack_latents_with_ids(tokens, pipe._prepare_latent_ids(x_t))


def flux2_call(
    pipe: Any, noise: Tensor, prompt: str, negative: str, steps: int, guidance: float, **more: Any
) -> Tensor:
    return pipe(
        prompt=prompt,
        height=HEIGHT,
        width=WIDTH,
        latents=noise,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
        **more,
    ).images


def dev_call(pipe: Any, noise: Tensor, prompt: str, negative: str, steps: int, guidance: float) -> Tensor:
    tokens = flux2_call(pipe, noise, prompt, negative, steps, guidance)
    return pipe._unpack_latents_with_ids(tokens, pipe._prepare_latent_ids(noise))


def klein_call(pipe: Any, noise: Tensor, prompt: str, negative: str, steps: int, guidance: float) -> Tensor:
    """The pipeline gives the VAE's own latents; what it does to an image's makes the transformer's of them."""
    against = {"negative_prompt_embeds": pipe.encode_prompt(negative, "cpu")[0]}
    raw = flux2_call(pipe, noise, prompt, negative, steps, guidance, **against)
    bn = pipe.vae.bn
    return torch.nn.functional.batch_norm(pipe._patchify_latents(raw), bn.running_mean, bn.running_var, eps=bn.eps)


TINY = {
    "sd": Tiny(partial(make_pipeline, "sd15"), sd_encoded, sd_step, unet_call),
    "sdxl": Tiny(partial(make_pipeline, "sdxl"), sdxl_encoded, sdxl_step, unet_call),
    "zimage": Tiny(make_zimage, zimage_encoded, zimage_step, zimage_call),
    "flux2-klein": Tiny(make_klein, flux2_encoded, flux2_step, klein_call),
    "flux2": Tiny(make_flux2, flux2_encoded, partial(flux2_step, guidance=torch.ones(1)), dev_call),
}
"""A row for each of models.FAMILIES."""
