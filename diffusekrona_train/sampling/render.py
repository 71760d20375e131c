"""Generate images: the one sampling path of validation, class images, evaluation and krona-sample.

The noise of an image depends only on its (prompt, seed): not on the batch, the device, the process or earlier images.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusekrona_train.common.device import moved
from diffusekrona_train.config import RunConfig
from diffusekrona_train.config.strengths import parse_strengths
from diffusekrona_train.models.contracts import Conditioning, Family, Loaded, Request, Tensors
from diffusekrona_train.models.schedulers import build_scheduler

Job = tuple[str, int]
"""(prompt with its identifier filled in, seed)."""


@dataclass(frozen=True)
class SampleSettings:
    """How an image is sampled. Height and width in pixels (None: the model's own); scheduler: a row of SCHEDULERS;
    strength_schedule: as in `config.strengths` ("": strength 1 throughout)."""

    steps: int = 50
    guidance: float = 7.5
    negative: str = ""
    height: int | None = None
    width: int | None = None
    scheduler: str | None = None
    noise: str = "prompt"
    """What the noise of an image depends on: `prompt` and seed, or only `seed`, to compare prompts at one seed."""
    strength_schedule: str = ""

    def __post_init__(self) -> None:
        parse_strengths(self.strength_schedule)
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


def settings_of(config: RunConfig) -> SampleSettings:
    """Return how a run's own images are sampled: its validation settings, at the size that it trains at."""
    wanted, side = config.validation, config.data.resolution
    negative, schedule = config.subject.fill(wanted.negative), wanted.strength_schedule
    return SampleSettings(wanted.steps, wanted.guidance, negative, side, side, strength_schedule=schedule)


def noise_generator(prompt: str, seed: int) -> torch.Generator:
    """Return a CPU generator that depends only on (prompt, seed), the same in every process and release."""
    digest = hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@torch.no_grad()
def render(
    pipe: Loaded,
    family: Family,
    jobs: Sequence[Job],
    settings: SampleSettings,
    *,
    batch_size: int = 1,
    decoded_at_once: int | None = None,
    conditioning_of: Callable[[str], Tensors] | None = None,
    on_image: Callable[[int, Image.Image], None] | None = None,
) -> list[Image.Image]:
    """Generate an image for each (prompt, seed) of `jobs` with a diffusers pipeline; PIL images in the order of jobs.

    conditioning_of: text -> family.encode_prompt's tensors (cached embeddings); without it the pipeline's own
    text encoders are asked, once a prompt. decoded_at_once: images that the VAE decodes together, which takes the
    most memory (None: the batch). on_image(index, image) is called as soon as an image is there. On the CPU
    in fp32, images from different batch sizes agree within 2/255; with the same batch size they are bitwise equal.
    """
    conditioning_of = conditioning_of or pipe_encoder(pipe, family)
    model_scheduler = pipe.scheduler
    if settings.scheduler is not None:
        pipe.scheduler = build_scheduler(settings.scheduler, model_scheduler)
    images: list[Image.Image] = []
    try:
        for start in range(0, len(jobs), batch_size):
            latents = draw_latents(pipe, family, jobs[start : start + batch_size], settings, conditioning_of)
            for part in latents.split(decoded_at_once or batch_size):
                for pixels in family.decode(pipe.vae, part).cpu():
                    images.append(to_picture(pixels))
                    if on_image is not None:
                        on_image(len(images) - 1, images[-1])
    finally:
        pipe.scheduler = model_scheduler
    return images


def draw_latents(
    pipe: Loaded,
    family: Family,
    jobs: Sequence[Job],
    settings: SampleSettings,
    conditioning_of: Callable[[str], Tensors],
) -> Tensor:
    """Run one batch through the denoiser: latents (B, C, h, w) for the family's decode, in the denoiser's type."""
    dtype, device = denoiser_of(pipe, family).dtype, pipe._execution_device
    height, width = picture_size(pipe, family, settings)
    shape = (1, *family.latent_shape(pipe.vae.config, height, width))
    generators = [noise_generator(prompt if settings.noise == "prompt" else "", seed) for prompt, seed in jobs]
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])

    def batch(texts: Sequence[str]) -> Conditioning:
        return family.collate([moved(conditioning_of(text), device, dtype) for text in texts])

    negative = batch([settings.negative] * len(jobs)) if family.negative_prompt else None
    # samplers that add noise continue each image's own random stream
    request = Request(settings.steps, settings.guidance, height, width, generators, not settings.negative)
    return family.sample(pipe, noise.to(device, dtype), batch([prompt for prompt, _ in jobs]), negative, request)


def denoiser_of(pipe: Loaded, family: Family) -> Loaded:
    """Return the denoiser of a pipeline."""
    return getattr(pipe, family.parts.denoiser.folder)


def picture_size(pipe: Loaded, family: Family, settings: SampleSettings) -> tuple[int, int]:
    """Return (height, width) in pixels: the settings', else the size the model was trained for. ValueError where the
    family's latents do not divide so."""
    own = family.default_resolution(denoiser_of(pipe, family).config, pipe.vae.config)
    size = settings.height or own, settings.width or own
    for name, value in zip(("height", "width"), size, strict=True):
        if value % family.side_multiple:
            raise ValueError(f"{name} is {value}; this model needs a multiple of {family.side_multiple} pixels")
    return size


def pipe_encoder(pipe: Loaded, family: Family) -> Callable[[str], Tensors]:
    """Return a conditioning_of that uses the pipeline's own text encoders."""
    tokenizers = [getattr(pipe, part.folder) for part in family.parts.tokenizers]
    encoders = [getattr(pipe, part.folder) for part in family.parts.text_encoders]
    return functools.cache(lambda text: family.encode_prompt(tokenizers, encoders, text))


def to_picture(pixels: Tensor) -> Image.Image:
    """Convert (3, H, W) in [0, 1] to 8-bit RGB, rounded as diffusers rounds."""
    array = (pixels.float().permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return Image.fromarray(array)
