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
from tests.tiny.anima import make_anima
from tests.tiny.flux1 import make_chroma, make_flux1, make_sd3
from tests.tiny.flux2 import make_flux2, make_klein
from tests.tiny.qwenimage import make_krea2, make_qwenimage
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
    pipe: Any, noise: Tensor, prompt: str | None, negative: str, steps: int, guidance: float, **more: Any
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


def packed(pipe: Any, latents: Tensor) -> Tensor:
    return pipe._pack_latents(latents, *latents.shape)


def qwen_encoded(pipe: Any, prompt: str) -> dict[str, Tensor]:
    embeds, mask = pipe.encode_prompt(prompt, "cpu")
    assert mask is None
    return {"prompt_embeds": embeds[0]}


def qwen_step(pipe: Any, x_t: Tensor, t: Tensor, row: dict[str, Tensor]) -> Tensor:
    shapes = [[(1, HEIGHT // 16, WIDTH // 16)]]
    tokens = pipe.transformer(packed(pipe, x_t), row["prompt_embeds"][None], None, t, shapes).sample
    return pipe._unpack_latents(tokens, HEIGHT, WIDTH, 8).squeeze(2)


def qwen_call(pipe: Any, noise: Tensor, prompt: str, negative: str, steps: int, guidance: float) -> Tensor:
    tokens = pipe(
        prompt,
        negative_prompt=negative,
        true_cfg_scale=guidance,
        height=HEIGHT,
        width=WIDTH,
        latents=packed(pipe, noise),
        num_inference_steps=steps,
        output_type="latent",
    ).images
    return pipe._unpack_latents(tokens, HEIGHT, WIDTH, 8).squeeze(2)


def krea2_encoded(pipe: Any, prompt: str) -> dict[str, Tensor]:
    embeds, mask = pipe.encode_prompt(prompt, "cpu")
    return {"prompt_embeds": embeds[mask]}


def krea2_step(pipe: Any, x_t: Tensor, t: Tensor, row: dict[str, Tensor]) -> Tensor:
    embeds = row["prompt_embeds"][None]
    places = pipe.prepare_position_ids(embeds.shape[1], HEIGHT // 16, WIDTH // 16, "cpu")
    tokens = pipe.transformer(packed(pipe, x_t), embeds, t, places).sample
    return pipe._unpack_latents(tokens, HEIGHT, WIDTH).squeeze(2)


def krea2_call(pipe: Any, noise: Tensor, prompt: str, negative: str, steps: int, guidance: float) -> Tensor:
    tokens = unet_call(pipe, packed(pipe, noise), prompt, negative, steps, guidance - 1)
    return pipe._unpack_latents(tokens, HEIGHT, WIDTH).squeeze(2)


def flux1_encoded(pipe: Any, prompt: str) -> dict[str, Tensor]:
    embeds, pooled, _ = pipe.encode_prompt(prompt, device="cpu")
    return {"prompt_embeds": embeds[0], "pooled": pooled[0]}


def flux1_step(pipe: Any, x_t: Tensor, t: Tensor, row: dict[str, Tensor]) -> Tensor:
    embeds = row["prompt_embeds"][None]
    tokens = pipe.transformer(
        hidden_states=packed(pipe, x_t),
        timestep=t,
        encoder_hidden_states=embeds,
        txt_ids=torch.zeros(embeds.shape[1], 3),
        img_ids=pipe._prepare_latent_image_ids(1, HEIGHT // 16, WIDTH // 16, "cpu", torch.float32),
        **({"pooled_projections": row["pooled"][None], "guidance": torch.ones(1)} if "pooled" in row else {}),
    ).sample
    return pipe._unpack_latents(tokens, HEIGHT, WIDTH, 8)


def flux1_call(pipe: Any, noise: Tensor, prompt: str, negative: str, steps: int, guidance: float) -> Tensor:
    tokens = flux2_call(pipe, packed(pipe, noise), prompt, negative, steps, guidance)
    return pipe._unpack_latents(tokens, HEIGHT, WIDTH, 8)


def chroma_encoded(pipe: Any, prompt: str) -> dict[str, Tensor]:
    embeds, _, mask, *_ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds[mask.bool()]}


def chroma_call(pipe: Any, noise: Tensor, prompt: str, negative: str, steps: int, guidance: float) -> Tensor:
    """With the masks as truth values: the pipeline's own are numbers, which attention adds instead of masking."""
    found = pipe.encode_prompt(prompt, negative, device="cpu")
    given = {
        "prompt_embeds": found[0],
        "prompt_attention_mask": found[2].bool(),
        "negative_prompt_embeds": found[3],
        "negative_prompt_attention_mask": found[5].bool(),
    }
    tokens = flux2_call(pipe, packed(pipe, noise), None, negative, steps, guidance, **given)
    return pipe._unpack_latents(tokens, HEIGHT, WIDTH, 8)


def sd3_encoded(pipe: Any, prompt: str) -> dict[str, Tensor]:
    found = pipe.encode_prompt(prompt, None, None, device="cpu", do_classifier_free_guidance=False)
    return {"prompt_embeds": found[0][0], "pooled": found[2][0]}


def sd3_step(pipe: Any, x_t: Tensor, t: Tensor, row: dict[str, Tensor]) -> Tensor:
    return pipe.transformer(x_t, row["prompt_embeds"][None], row["pooled"][None], t * 1000).sample


def anima_encoded(pipe: Any, prompt: str) -> dict[str, Tensor]:
    from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep

    found = AnimaTextEncoderStep.encode_prompt(pipe, prompt, prepare_unconditional_embeds=False)
    names = ("qwen_prompt_embeds", "t5_input_ids", "t5_attention_mask", "qwen_attention_mask")
    return {"prompt_embeds": pipe.text_conditioner(*(found[name] for name in names))[0]}


def anima_step(pipe: Any, x_t: Tensor, t: Tensor, row: dict[str, Tensor]) -> Tensor:
    nothing = torch.zeros(1, 1, HEIGHT, WIDTH)
    return pipe.transformer(x_t[:, :, None], t, row["prompt_embeds"][None], padding_mask=nothing).sample[:, :, 0]


def anima_call(pipe: Any, noise: Tensor, prompt: str, negative: str, steps: int, guidance: float) -> Tensor:
    pipe.guider.guidance_scale = guidance
    state = pipe(
        prompt=prompt,
        negative_prompt=negative,
        height=HEIGHT,
        width=WIDTH,
        latents=noise[:, :, None],
        num_inference_steps=steps,
        output_type="pt",
    )
    return state.get("latents")[:, :, 0]


TINY = {
    "sd": Tiny(partial(make_pipeline, "sd15"), sd_encoded, sd_step, unet_call),
    "sdxl": Tiny(partial(make_pipeline, "sdxl"), sdxl_encoded, sdxl_step, unet_call),
    "zimage": Tiny(make_zimage, zimage_encoded, zimage_step, zimage_call),
    "flux2-klein": Tiny(make_klein, flux2_encoded, flux2_step, klein_call),
    "flux2": Tiny(make_flux2, flux2_encoded, partial(flux2_step, guidance=torch.ones(1)), dev_call),
    "qwenimage": Tiny(make_qwenimage, qwen_encoded, qwen_step, qwen_call),
    "krea2": Tiny(make_krea2, krea2_encoded, krea2_step, krea2_call),
    "flux1": Tiny(make_flux1, flux1_encoded, flux1_step, flux1_call),
    "chroma": Tiny(make_chroma, chroma_encoded, flux1_step, chroma_call),
    "sd3": Tiny(make_sd3, sd3_encoded, sd3_step, unet_call),
    "anima": Tiny(make_anima, anima_encoded, anima_step, anima_call),
}
"""A row for each of models.FAMILIES."""
