"""Stable Diffusion 1.x and 2.x: one text encoder, no size ids, epsilon or v prediction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusekrona_train.common.device import ran_out


class SD:
    """How SD 1.4, 1.5, 2.0 and 2.1 turn pictures and prompts into tensors, and predict."""

    name = "sd"
    file_prefix = "lora_unet_"
    text_encoders = (("text_encoder", "CLIPTextModel"),)
    tokenizers = ("tokenizer",)

    def matches(self, denoiser_config: dict) -> bool:
        """True for a UNet with cross-attention to one text encoder and 4 or more latent channels."""
        is_unet = denoiser_config.get("_class_name") == "UNet2DConditionModel"
        return is_unet and denoiser_config.get("addition_embed_type") is None

    def encode_image(self, vae: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w), scaled; the posterior's mean without a generator."""
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        latents = posterior.mean if generator is None else posterior.sample(generator)
        return latents * vae.config.scaling_factor

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w), scaled -> images (B, 3, H, W) fp32 in [0, 1], computed in the VAE's own type.

        Where memory ends, or the VAE's tiling is on, in overlapping tiles of half the side: nearly the same picture
        in a quarter of the memory. (The VAE's own tiles are as large as the pictures that it was trained on.)
        """
        unscaled, pixels = latents.to(vae.dtype) / vae.config.scaling_factor, None
        try:
            if not vae.use_tiling:
                pixels = vae.decode(unscaled, return_dict=False)[0]
        except RuntimeError as error:
            if not ran_out(error):
                raise
        if pixels is None:  # not in the handler: its traceback keeps what the decoder had made so far
            pixels = decode_in_tiles(vae, unscaled)
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def encode_prompt(self, tokenizers: list, text_encoders: list, prompts: list[str]) -> dict[str, Tensor]:
        """Prompts -> {"prompt_embeds": (B, T, D)}, as diffusers' StableDiffusionPipeline.encode_prompt gives them.

        Prompts pass one by one, so that an embedding never depends on the prompts beside it.
        """
        (tokenizer,), (encoder,) = tokenizers, text_encoders
        rows = []
        for prompt in prompts:
            tokens = tokenize(tokenizer, prompt)
            masked = getattr(encoder.config, "use_attention_mask", False)
            mask = tokens.attention_mask.to(encoder.device) if masked else None
            with torch.no_grad():
                rows.append(encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0])
        return {"prompt_embeds": torch.cat(rows)}

    def size_ids(self, original_hw: tuple, crop_top_left: tuple, target_hw: tuple) -> Tensor:
        """SD knows no sizes: an empty (0,)."""
        return torch.zeros(0)

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """x_t (B, C, h, w), t (B,) -> the model's prediction (B, C, h, w)."""
        return denoiser(x_t, t, encoder_hidden_states=conditioning["prompt_embeds"], return_dict=False)[0]

    def pipeline(self, parts: dict[str, Any]) -> Any:
        """diffusers' pipeline around loaded parts; text encoders and tokenizers may be missing."""
        from diffusers import StableDiffusionPipeline

        encoder: Any = (parts.get("text_encoders") or [None])[0]
        tokenizer: Any = (parts.get("tokenizers") or [None])[0]
        pipe = StableDiffusionPipeline(
            vae=parts["vae"],
            text_encoder=encoder,
            tokenizer=tokenizer,
            unet=parts["denoiser"],
            scheduler=parts["scheduler"],
            safety_checker=None,  # type: ignore[arg-type]
            feature_extractor=None,  # type: ignore[arg-type]
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call_arguments(self, pipe: Any, positive: dict[str, Tensor], negative: dict[str, Tensor], empty: bool) -> dict:
        """Keyword arguments of the pipeline's call for embeddings of B rows; `empty`: the negative prompt is ''."""
        return {"prompt_embeds": positive["prompt_embeds"], "negative_prompt_embeds": negative["prompt_embeds"]}


def decode_in_tiles(vae: Any, latents: Tensor) -> Tensor:
    """As vae.decode, in blended tiles of at most half the longer side; the VAE's own settings for tiles stay."""
    side = max(4, max(latents.shape[-2:]) // 8 * 4)  # a quarter of it is the overlap, in whole latents
    names = ("use_tiling", "tile_latent_min_size", "tile_sample_min_size")
    before = {name: getattr(vae, name) for name in names}
    scale = before["tile_sample_min_size"] // before["tile_latent_min_size"]
    if latents.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        for name, value in zip(names, (True, side, side * scale), strict=True):
            setattr(vae, name, value)
        return vae.decode(latents, return_dict=False)[0]
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def tokenize(tokenizer: Any, prompt: str) -> Any:
    """One prompt, padded and cut to the tokenizer's length: input_ids and attention_mask (1, T)."""
    length = tokenizer.model_max_length
    return tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")


FAMILY = SD()
