"""The one sampling path: validation, class images, evaluation and krona-sample all render here.

The noise of a picture depends on its (prompt, seed) alone: not on the batch it is drawn in, the device, the process or
the pictures before it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusekrona_train.models.schedulers import build_scheduler

Job = tuple[str, int]
"""(prompt with its identifier filled in, seed)."""


@dataclass(frozen=True)
class SampleSettings:
    """How a picture is drawn. Height and width in pixels (None: the model's own); scheduler: a row of SCHEDULERS."""

    steps: int = 50
    guidance: float = 7.5
    negative: str = ""
    height: int | None = None
    width: int | None = None
    scheduler: str | None = None
    noise: str = "prompt"
    """What the noise of a picture depends on: `prompt` and seed, or `seed` alone, to compare prompts at one seed."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; give 1 or more")
        if not 0 <= self.guidance <= 100:
            raise ValueError(f"guidance is {self.guidance}; give a number from 0 to 100")
        if self.noise not in ("prompt", "seed"):
            raise ValueError(f"noise is {self.noise!r}; give prompt or seed")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None and (value < 8 or value % 8):
                raise ValueError(f"{name} is {value}; give a multiple of 8 pixels")


def noise_generator(prompt: str, seed: int) -> torch.Generator:
    """A CPU generator that depends on (prompt, seed) alone, the same in every process and release."""
    digest = hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@torch.no_grad()
def render(
    pipe: Any,
    family: Any,
    jobs: Sequence[Job],
    settings: SampleSettings,
    *,
    batch_size: int = 1,
    conditioning_of: Callable[[str], dict[str, Tensor]] | None = None,
    on_image: Callable[[int, Image.Image], None] | None = None,
) -> list[Image.Image]:
    """Draw each (prompt, seed) of `jobs` with a diffusers pipeline; PIL pictures in the order of the jobs.

    conditioning_of: text -> family.encode_prompt's dict with one row (cached embeddings); without it the pipeline's own
    text encoders are asked, once a prompt. on_image(index, picture) is called as soon as a picture is there. On the CPU
    in fp32, pictures from different batch sizes agree within 2/255; with the same batch size they are bitwise equal.
    """
    conditioning_of = conditioning_of or pipe_encoder(pipe, family)
    model_scheduler = pipe.scheduler
    if settings.scheduler is not None:
        pipe.scheduler = build_scheduler(settings.scheduler, model_scheduler)
    images: list[Image.Image] = []
    try:
        for start in range(0, len(jobs), batch_size):
            latents = draw_latents(pipe, family, jobs[start : start + batch_size], settings, conditioning_of)
            for pixels in family.decode(pipe.vae, latents).cpu():
                images.append(to_picture(pixels))
                if on_image is not None:
                    on_image(len(images) - 1, images[-1])
    finally:
        pipe.scheduler = model_scheduler
    return images


def draw_latents(
    pipe: Any, family: Any, jobs: Sequence[Job], settings: SampleSettings, conditioning_of: Callable
) -> Tensor:
    """One batch through the denoiser: scaled latents (B, C, h, w) in the denoiser's type."""
    dtype, device = pipe.unet.dtype, pipe._execution_device
    height, width = picture_size(pipe, settings)
    shape = (1, pipe.unet.config.in_channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    generators = [noise_generator(prompt if settings.noise == "prompt" else "", seed) for prompt, seed in jobs]
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])

    positive = _stack([conditioning_of(prompt) for prompt, _ in jobs], dtype, device)
    negative = _stack([conditioning_of(settings.negative)] * len(jobs), dtype, device)
    return pipe(
        **family.call_arguments(pipe, positive, negative, empty=not settings.negative),
        latents=noise.to(device, dtype),
        generator=generators,  # samplers that add noise go on with each picture's own stream
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        height=height,
        width=width,
        output_type="latent",
        return_dict=False,
    )[0]


def picture_size(pipe: Any, settings: SampleSettings) -> tuple[int, int]:
    """(height, width) in pixels: the settings', else the size the model was trained for."""
    own = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return settings.height or own, settings.width or own


def pipe_encoder(pipe: Any, family: Any) -> Callable[[str], dict[str, Tensor]]:
    """conditioning_of from the text encoders that the pipeline holds."""
    tokenizers = [getattr(pipe, name) for name in family.tokenizers]
    encoders = [getattr(pipe, name) for name, _ in family.text_encoders]
    return functools.cache(lambda text: family.encode_prompt(tokenizers, encoders, [text]))


def to_picture(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> 8-bit RGB, rounded as diffusers rounds."""
    array = (pixels.float().permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return Image.fromarray(array)


def _stack(rows: list[dict[str, Tensor]], dtype: torch.dtype, device: Any) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]).to(device, dtype) for name in rows[0]}
